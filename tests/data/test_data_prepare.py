"""Shards of tokens: the stream that the files give, after kills and full disks too, and what is said of damage."""

import collections
import dataclasses
import gzip
import itertools
import json
import re
import resource
import sys

import numpy as np
import pytest

from oasis_jax.commands.prepare import main
from oasis_jax.config import DataConfig
from oasis_jax.data import load_corpus, prepare, prepared, train_batches
from oasis_jax.data.packing import PACKINGS
from oasis_jax.data.tokenizers import BPETokenizer, BytesTokenizer
from oasis_jax.errors import UserError

FIELDS = dict(sequence_length=11, batch_size=3, holdout_fraction=0.2, bpe_vocab_size=290)
SHARD = 900


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts of several kinds and sizes, one longer than a shard, some there twice, one empty."""
    folder, random = tmp_path_factory.mktemp("texts"), np.random.default_rng(3)
    words = ["pear", "fig", "zwölf", "漢字", "x"]
    text = lambda size: " ".join(random.choice(words, size))
    for i in range(7):
        (folder / f"{i}.txt").write_text(text(90 + 31 * i) + f" {i}")
    (folder / "long.txt").write_text(text(1500))
    (folder / "empty.txt").touch()
    lines = [json.dumps({"text": text(40) + f" line {i}"}) for i in range(23)]
    (folder / "a.jsonl").write_text("\n".join([*lines, lines[3], lines[5]]))
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return DataConfig(corpus="files", pattern=f"{folder}/*", tokenizer="bpe", **FIELDS)


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    prepare.prepare(config, None, out, licence="CC0", shard_bytes=SHARD)
    return out


def copy_of(made, out):
    out.mkdir()
    for path in made.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def reading(config, out, **fields):
    return load_corpus(dataclasses.replace(config, corpus="prepared", pattern=str(out), **fields), seed=0)


def refusal(call, *arguments, **keywords):
    """The one line that the call stops with."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shards(out, part="*"):
    return {path.name: path.read_bytes() for path in sorted(out.glob(f"{part}-*.arrayrecord"))}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("length, begin", [(11, True), (700, False), (1025, True)])
def test_examples_are_those_of_the_files(config, tmp_path, tokenizer, length, begin):
    fields = dict(tokenizer=tokenizer, sequence_length=length, begin_token=begin, holdout_fraction=0.45)
    asked = dataclasses.replace(config, **fields)
    index = prepare.prepare(asked, None, tmp_path, shard_bytes=SHARD)
    expected, found = load_corpus(asked, seed=0), reading(asked, tmp_path)
    assert found.tokenizer.identity == expected.tokenizer.identity
    for part, name in [("train", "train"), ("heldout", "heldout")]:
        ours, theirs = getattr(found, part), getattr(expected, part)
        assert len(ours) == len(theirs) > 0 and len(index["parts"][name]["shards"]) > 1
        for i in range(len(theirs)):
            for key, array in theirs[i].items():
                np.testing.assert_array_equal(ours[i][key], array)
        np.testing.assert_array_equal(ours.tokens[:], theirs.tokens)
    for name in ("sha256", "bytes", "files", "split"):
        assert found.identity[name] == expected.identity[name]


def test_the_index_says_what_was_made_from_what(config, made):
    index = json.loads((made / "index.json").read_text())
    assert index["licence"] == "CC0" and index["source"] == [config.pattern]
    assert index["left_out"][0] == "left out: 1 empty documents" and "2 documents, which repeat" in index["left_out"][1]
    assert index["tokenizer"]["identity"] == reading(config, made).tokenizer.identity
    tokenizer = reading(config, made).tokenizer
    for part in ("train", "heldout"):
        listed = index["parts"][part]
        assert {shard["file"] for shard in listed["shards"]} == set(shards(made, part))
        lengths = np.concatenate([np.load(made / shard["lengths"]["file"]) for shard in listed["shards"]])
        separators = len(lengths) - 1  # between documents
        assert len(lengths) == listed["documents"] and lengths.sum() + separators == listed["tokens"]
        ends = getattr(reading(config, made), part).tokens[:] == tokenizer.separator_id
        assert np.flatnonzero(ends).tolist() == (np.cumsum(lengths + 1) - 1)[:-1].tolist()
        assert listed["tokens"] == sum(shard["tokens"] for shard in listed["shards"])
    lengths = {name.replace(".arrayrecord", ".lengths.npy") for name in shards(made)}
    assert {path.name for path in made.iterdir()} == {*shards(made), *lengths, "index.json", ".lock"}
    assert prepared.verify(made) == len(shards(made)) > 6


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("after", [1, 4])
def test_a_stopped_preparation_goes_on_and_repeats_no_shard(config, made, tmp_path, monkeypatch, after):
    written, write = [], prepare.write_shard

    def watched(job, path, *arguments):
        written.append(path.name)
        if len(written) == after + 1:
            path.with_suffix(".unfinished").write_bytes(b"half")
            raise Killed
        return write(job, path, *arguments)

    monkeypatch.setattr(prepare, "write_shard", watched)
    with pytest.raises(Killed):
        prepare.prepare(config, None, tmp_path, licence="CC0", shard_bytes=SHARD)
    assert "goes on where it was stopped" in refusal(reading, config, tmp_path)
    first, said = written[:after], []
    written[:] = [""] * 99
    prepare.prepare(config, None, tmp_path, licence="CC0", shard_bytes=SHARD, say=said.append)
    assert not set(written) & set(first) and len(set(written)) == len(shards(made)) - after + 1
    assert shards(tmp_path) == shards(made)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in made.iterdir()}
    assert any(re.search(r"\d+ % of the text, \d+ s left", line) for line in said) and "100 %" in said[-1]
    written.clear()
    prepare.prepare(config, None, tmp_path, licence="CC0", shard_bytes=SHARD, say=said.append)
    assert not written and said[-1].endswith("is complete")


def test_another_preparation_in_the_same_folder_is_refused(config, made, tmp_path):
    other = dataclasses.replace(config, holdout_fraction=0.3)
    message = refusal(prepare.prepare, other, None, made, licence="CC0", shard_bytes=SHARD)
    assert "holdout_fraction was 0.2, is 0.3" in message and "take another folder" in message
    (tmp_path / "thesis.tex").touch()
    assert "not empty (it holds 'thesis.tex')" in refusal(prepare.prepare, config, None, tmp_path)
    with prepare._locked(tmp_path / "new"):
        assert "another preparation is writing" in refusal(prepare.prepare, config, None, tmp_path / "new")
    (tmp_path / "file").touch()
    assert "cannot write" in refusal(prepare.prepare, config, None, tmp_path / "file")


def test_no_space_stops_cleanly_and_goes_on(config, made, tmp_path):
    """A limit on the size of files, as a full disk fails: in the middle of a shard."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(map(len, shards(made).values()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))
    try:
        message = refusal(prepare.prepare, config, None, tmp_path, licence="CC0", shard_bytes=SHARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in message and "the same command goes on" in message
    assert not list(tmp_path.glob("*.unfinished")) and not (tmp_path / "index.json").exists()
    prepare.prepare(config, None, tmp_path, licence="CC0", shard_bytes=SHARD)
    assert shards(tmp_path) == shards(made)


def test_a_damaged_shard_is_named(config, made, tmp_path):
    out = copy_of(made, tmp_path / "copy")
    name = sorted(shards(out, "train"))[1]
    content = (out / name).read_bytes()
    lengths = out / name.replace(".arrayrecord", ".lengths.npy")
    counted = lengths.read_bytes()
    lengths.write_bytes(counted[:-2] + bytes([counted[-2] ^ 1]) + counted[-1:])
    assert lengths.name in refusal(prepared.verify, out)
    lengths.unlink()
    assert f"{lengths.name}: the shard is missing" in refusal(reading, config, out)
    lengths.write_bytes(counted)
    for i in range(0, len(content), 997):  # wherever the damage is
        (out / name).write_bytes(content[:i] + bytes([content[i] ^ 255]) + content[i + 1 :])
        assert name in refusal(prepared.verify, out)
    (out / name).write_bytes(content[:40] + bytes(256) + content[296:])  # as long as it was
    corpus = reading(config, out)
    assert f"{name}: the shard is corrupt" in refusal(lambda: corpus.train.tokens[:])
    (out / name).write_bytes(content[:-1])
    assert f"{name}: the shard is corrupt ({len(content) - 1} bytes" in refusal(reading, config, out)
    (out / name).unlink()
    assert f"{name}: the shard is missing" in refusal(reading, config, out)
    (out / name).write_bytes(content)
    (out / "index.json").write_text("{")
    assert "index.json: cannot be read" in refusal(reading, config, out)


def test_an_index_of_others_is_data(config, made, tmp_path):
    out = copy_of(made, tmp_path / "copy")
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps(index | {"bytes": index["bytes"] + 1}))
    assert "index.json: cannot be read: it has changed since it was written" in refusal(reading, config, out)
    del index["checksum"]  # as earlier versions wrote it
    for name in set(index) - {"format", "plan", "source", "licence", "left_out"}:
        (out / "index.json").write_text(json.dumps({key: value for key, value in index.items() if key != name}))
        assert f"does not say its {name}" in refusal(reading, config, out)
    for name in ("../copy/x", "/etc/passwd"):
        index["parts"]["train"]["shards"][0]["file"] = name
        (out / "index.json").write_text(json.dumps(index))
        assert "is no name of a file in its folder" in refusal(reading, config, out)


def test_what_does_not_fit_the_folder_is_refused(config, made):
    own = reading(config, made).tokenizer
    message = refusal(reading, config, made, tokenizer="bytes")
    assert "data.tokenizer=bpe" in message and own.identity["sha256"] in message
    other = BPETokenizer.train([b"other text"], 270)
    asked = dataclasses.replace(config, corpus="prepared", pattern=str(made))
    message = refusal(load_corpus, asked, seed=0, tokenizer=other)
    assert own.identity["sha256"] in message and other.identity["sha256"] in message
    assert "prepared with 0.2" in refusal(reading, config, made, holdout_fraction=0.3)
    length = int(re.search(r"use at most (\d+)", refusal(reading, config, made, sequence_length=10**6))[1])
    assert refusal(reading, config, made, sequence_length=length + 1)
    part = "heldout" if "held-out" in refusal(reading, config, made, sequence_length=length + 1) else "train"
    assert len(getattr(load_corpus(dataclasses.replace(asked, sequence_length=9), seed=0), part)) == length // 9
    assert "no prepared corpus" in refusal(reading, config, made / "nowhere")


def test_batches_go_on_bit_by_bit_where_they_were_saved(config, made, tmp_path):
    first = train_batches(reading(config, made).train, config, seed=5)
    for _ in range(7):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    moved = copy_of(made, tmp_path / "moved")
    second = train_batches(reading(config, moved).train, config, seed=5)
    second.set_state(state)
    for _ in range(9):
        ours, theirs = next(first), next(second)
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    first.close()
    second.close()
    assert reading(config, moved).identity == reading(config, made).identity


@pytest.mark.parametrize("packing", [*PACKINGS, "mixture"])
def test_other_host_counts_repeat_and_lose_nothing_within_an_epoch(config, made, packing):
    """An epoch that goes on, after every other batch, on another number of hosts."""
    fields = dict(packing=packing) if packing in PACKINGS else dict(mixture="1,1")
    pattern = str(made) if packing in PACKINGS else f"{made},{made}"
    asked = dataclasses.replace(config, corpus="prepared", pattern=pattern, batch_size=12, sequence_length=6, **fields)
    source = load_corpus(asked, seed=0).train
    content = lambda batch, row: tuple(np.concatenate([batch[name][row] for name in sorted(batch)]).tolist())
    expected = collections.Counter(content(source.batch([i]), 0) for i in range(len(source)))
    batches, state, seen = -(-len(source) // 12), {"next_index": 0}, []
    for step, hosts in zip(range(0, batches, 2), itertools.cycle([1, 3, 2, 4, 12, 6])):
        assert state == {"next_index": step}
        parts = []
        for part in range(hosts):
            iterator = train_batches(source, asked, seed=5, part=part, parts=hosts)
            iterator.set_state(state)
            parts.append([next(iterator) for _ in range(2)])
            reached = json.loads(json.dumps(iterator.get_state()))
            iterator.close()
        state = reached
        # Host p has the examples p, p + P, p + 2P, ... of every batch.
        for own in zip(*parts):
            seen += [content(own[row % hosts], row // hosts) for row in range(12)]
    assert len(seen) >= len(source) > 60
    assert collections.Counter(seen[: len(source)]) == expected


def test_a_vocabulary_past_two_bytes(config, tmp_path):
    class Wide(BytesTokenizer):
        def __init__(self):
            super().__init__()
            self.vocab_size = 70_000

        def encode_all(self, documents):
            encoded = super().encode_all(documents)
            return (ids + 69_000 for ids in encoded)

    index = prepare.prepare(config, Wide(), tmp_path, shard_bytes=SHARD)
    tokens = prepared.ShardedTokens(tmp_path, index["parts"]["heldout"]["shards"], np.dtype(index["dtype"]))
    assert tokens[:].max() > 69_000 and index["dtype"] == "<i4"


def test_bytes_of_nothing_among_text_are_said(config, tmp_path):
    for name, text in [("a.txt", b"text " * 40), ("b.txt", b"te\0xt " * 40)]:
        (tmp_path / name).write_bytes(text)
    said, asked = [], dataclasses.replace(config, pattern=f"{tmp_path}/*.txt", tokenizer="bytes")
    prepare.prepare(asked, None, tmp_path / "out", say=said.append)
    assert "NUL bytes, kept as text: in 1 of 2 files, such as 'b.txt'" in said


def test_a_share_that_is_missed_is_said_when_it_is_read(config, tmp_path):
    (tmp_path / "a.txt").write_text("漢" * 40)  # is cut between characters
    asked = dataclasses.replace(config, pattern=f"{tmp_path}/a.txt", tokenizer="bytes", holdout_fraction=0.03)
    prepare.prepare(asked, None, tmp_path / "out")
    (note,) = reading(asked, tmp_path / "out", sequence_length=2).notes
    assert note == load_corpus(dataclasses.replace(asked, sequence_length=2), seed=0).notes[0]
    assert "held out: 3 of 120 bytes (0.025) where data.holdout_fraction=0.03 was asked for" in note


def test_compressed_files_are_those_in_them(config, folder, made, tmp_path):
    for path in folder.iterdir():
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    asked = dataclasses.replace(config, pattern=f"{tmp_path}/*")
    prepare.prepare(asked, None, tmp_path / "out", shard_bytes=SHARD)
    assert sorted(shards(tmp_path / "out")) == sorted(shards(made))
    text = (tmp_path / "3.txt.gz").read_bytes()
    (tmp_path / "3.txt.gz").write_bytes(text[:-9])
    assert "3.txt.gz: cannot be decompressed" in refusal(prepare.prepare, asked, None, tmp_path / "again")


@pytest.mark.parametrize("name, package", [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_what_is_not_installed_is_named(config, tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    asked = dataclasses.replace(config, pattern=f"{tmp_path}/*")
    message = refusal(prepare.prepare, asked, None, tmp_path / "out")
    assert f"needs {package}; pip install 'oasis_jax[prepare]'" in message


def test_zstandard_and_parquet(config, tmp_path):
    zstandard, pyarrow = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {i} " * (9 + i) for i in range(9)]
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(texts[0].encode()))
    parquet.write_table(pyarrow.table({"text": [*texts[1:], None], "id": list(range(9))}), tmp_path / "b.parquet")
    asked = dataclasses.replace(config, pattern=f"{tmp_path}/*", tokenizer="bytes")
    index = prepare.prepare(asked, None, tmp_path / "out")
    assert sum(index["parts"][part]["bytes"] for part in ("train", "heldout")) == sum(map(len, texts))
    wrong = dataclasses.replace(asked, text_key="txt")
    assert "did you mean 'text'?); allowed: text, id" in refusal(prepare.prepare, wrong, None, tmp_path / "new")


def test_the_command(folder, tmp_path, capsys):
    words = [
        "--source",
        f"{folder}/*",
        "--tokenizer",
        "bytes",
        "--out",
        str(tmp_path),
        "--set",
        "data.holdout_fraction=0.2",
    ]
    main(words)
    said = capsys.readouterr()
    assert (
        "tokens to train on in 1 shards" in said.out
        and "9 files, " not in said.out
        and "10 files, 31 documents" in said.err
    )
    main(["--out", str(tmp_path), "--verify"])
    assert "2 shards, all as they were written" in capsys.readouterr().out
    assert "no such folder" in refusal(main, [*words[:3], "nowhere", *words[4:]])
    for wrong in (["--out", "x"], ["--out", "x", "--verify", "--source", "y"], [*words, "--set", "data.batch_size=3"]):
        with pytest.raises(SystemExit) as exit:
            main(wrong)
        assert exit.value.code == 2


@pytest.mark.parametrize(
    "name, content, flags, said",
    [
        (
            "a.txt",
            "",
            [],
            "--source: there is no text in 1 files (1 of their documents are empty, 0 files or documents",
        ),
        (
            "a.txt",
            "\0" * 9,
            ["--set", "data.corrupt=skip"],
            "no text in 1 files (0 of their documents are empty, 1 files",
        ),
        (
            "a.csv",
            "a",
            [],
            "--source: 'FOLDER/*' matches 'FOLDER/a.csv', which is neither .txt nor .jsonl nor .parquet",
        ),
        ("b/a.txt", "a", [], "--source: no file matches 'FOLDER/*' in 'FOLDER'; allowed are .txt, .jsonl, .parquet"),
        (
            "a.txt",
            "a",
            ["--tokenizer", "bpee"],
            "--tokenizer: no such folder or file: 'bpee' (did you mean 'bpe'?); all",
        ),
        (
            "a.txt",
            "a",
            ["--tokenizer", "a/b/c"],
            "--tokenizer: no such folder or file: 'a/b/c'; allowed: bytes, bpe, a",
        ),
    ],
)
def test_what_the_command_refuses_is_said_of_its_flags(tmp_path, name, content, flags, said):
    path = tmp_path / "texts" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    source = [
        "--source",
        f"{tmp_path}/texts/*",
        "--tokenizer",
        "bytes",
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    message = refusal(main, [*source, *flags]).replace(str(tmp_path / "texts"), "FOLDER")
    assert said in message and "data.pattern" not in message
