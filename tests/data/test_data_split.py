"""What is held out: how much, in which documents, and that nothing lies on both sides."""

import json
import os
import re

import numpy as np
import pytest

from oasis_jax.config import DataConfig
from oasis_jax.data import load_corpus, split
from oasis_jax.data.split import hold_out, hold_out_by_name
from oasis_jax.errors import UserError

FRACTIONS = [0.013, 0.05, 0.25, 0.5, 0.93]


def texts(*sizes, seed=0):
    """Different texts of so many bytes."""
    random = np.random.default_rng(seed)
    return [random.integers(97, 123, size, np.uint8).tobytes() for size in sizes]


# Kinds of corpora, from those of many small documents to those that have to be cut.
CORPORA = {
    "two of a megabyte": texts(1_000_000, 1_000_003),
    "one": texts(70_001),
    "many": texts(*range(200, 1200, 7)),
    "one huge and many": texts(500_000, *range(200, 900, 3)),
    "two huge and one tiny": texts(100_001, 5, 100_003),
    "three": texts(3_001, 4_001, 9_001),
    "one of characters of four bytes": ["\U0001f600é漢a".encode() * 997],
}


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("name", CORPORA)
def test_the_share_is_within_a_tenth_and_nothing_is_lost_or_twice(name, fraction):
    documents = CORPORA[name]
    split, total = hold_out(documents, fraction), sum(map(len, documents))
    size = sum(map(len, split.heldout))
    assert abs(size - fraction * total) <= 0.1 * fraction * total and not split.notes
    assert f"{size} of {total} bytes in {len(split.heldout)} of {len(documents)} documents" in split.rule
    left = [text for text in documents if text not in split.train and text not in split.heldout]
    assert len(left) <= 1 and sum(map(len, [*split.train, *split.heldout])) == total
    for text in left:  # the one that was cut: its head is trained on, its tail held out, between two characters
        pieces = [(head, tail) for head in split.train for tail in split.heldout if head + tail == text]
        assert len(pieces) == 1 and all(piece.decode() for piece in pieces[0])
        assert "its tail alone" in split.rule
    inside = [[text for text in documents if text in part] for part in (split.train, split.heldout)]
    assert [[text for text in part if text in documents] for part in (split.train, split.heldout)] == inside


def test_what_is_held_out_depends_on_content_alone():
    documents = CORPORA["many"]
    order = np.random.default_rng(5).permutation(len(documents))
    first, second = hold_out(documents, 0.05), hold_out([documents[i] for i in order], 0.05)
    assert sorted(first.heldout) == sorted(second.heldout) and first.heldout != second.heldout
    assert first.sha256 != second.sha256  # another order is another stream
    assert first.sha256 == hold_out(documents, 0.05).sha256
    assert first.sha256 != hold_out(documents, 0.06).sha256


@pytest.mark.parametrize("documents", [[b"a"], [b"a", b"b"], [b"ab", b"cde"]])
def test_a_share_that_cannot_be_met_is_said(documents):
    split = hold_out(documents, 0.05)
    size, total = sum(map(len, split.heldout)), sum(map(len, documents))
    (note,) = split.notes
    assert note.startswith(f"held out: {size} of {total} bytes") and "data.holdout_fraction=0.05" in note
    assert b"".join(split.heldout) and all(split.train) and all(split.heldout)


def test_no_text_is_refused():
    with pytest.raises(UserError, match="no text"):
        hold_out([], 0.05)


def repeated(folder):
    """A corpus with copies, a hard and a symbolic link, a copy with other line ends, and repeated lines of jsonl."""
    lines = [text.decode() for text in texts(*[40] * 50, seed=7)]
    for i in range(9):
        (folder / f"{i}.txt").write_text("\n".join(lines[i * 3 : i * 3 + 3]), newline="")
        (folder / f"copy{i}.txt").write_bytes((folder / f"{i}.txt").read_bytes())
    os.link(folder / "1.txt", folder / "hard.txt")
    (folder / "soft.txt").symlink_to(folder / "2.txt")
    (folder / "dos.txt").write_bytes((folder / "3.txt").read_bytes().replace(b"\n", b"\r\n"))
    (folder / "marked.txt").write_bytes(b"\xef\xbb\xbf" + (folder / "4.txt").read_bytes())
    records = [json.dumps({"text": lines[30 + i % 11], "number": i}) for i in range(44)]
    (folder / "lines.jsonl").write_text("\n".join(records))
    return lines


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6])
def test_identical_content_counts_once_and_lies_on_one_side(tmp_path, fraction):
    lines = repeated(tmp_path)
    config = DataConfig(corpus="files", pattern=f"{tmp_path}/*", sequence_length=5, holdout_fraction=fraction)
    corpus = load_corpus(config, seed=0)
    sides = [corpus.tokenizer.decode(part.tokens).decode() for part in (corpus.train, corpus.heldout)]
    for line in lines[:27] + lines[30:41]:
        assert sum(side.count(line) for side in sides) <= 1  # 0: the one that is cut
    pieces = [sum(side.count(line) for side in sides) for line in lines[:27] + lines[30:41]]
    assert sum(pieces) >= len(pieces) - 1
    (note,) = corpus.notes
    assert re.match(r"left out: 46 of 66 documents \(\d+ bytes\), which repeat the content of others", note)


def test_a_library_is_split_by_name():
    names, documents = [f"{i}.py" for i in range(40)], texts(*range(100, 140))
    others = texts(*range(100, 140), seed=1)
    split, changed = (hold_out_by_name(names, found, 0.1) for found in (documents, others))
    assert [documents.index(text) for text in split.heldout] == [others.index(text) for text in changed.heldout]
    assert split.rule.startswith(f"by file: {len(split.heldout)} of 40 files")
    assert sorted([*split.train, *split.heldout]) == sorted(documents)


@pytest.mark.parametrize("seed", range(40))
def test_documents_are_chosen_one_after_another_as_long_as_they_fit(seed):
    """As said in words, one by one; sizes of many kinds, hashes with NULs at their ends among them."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 200))
    sizes = [int(size) for size in np.ceil(random.pareto(0.5 + seed % 4, count) * 20) % 10**6 + 1]
    keys = [random.bytes(31) + bytes([random.integers(0, 2)]) for _ in range(count)]
    fraction = float(random.uniform(0.01, 0.5))
    wanted, size, expected = fraction * sum(sizes), 0, set()
    for i in sorted(range(count), key=keys.__getitem__):
        if size + sizes[i] <= wanted:
            expected.add(i)
            size += sizes[i]
    chosen, cut = split.choose(keys, sizes, fraction)
    assert chosen == expected
    assert cut == {} if size >= 0.9 * wanted else len(cut) == 1 and not set(cut) & chosen
    again = split.choose(np.array(keys, "S32"), np.array(sizes), fraction)
    assert again == (chosen, cut)
