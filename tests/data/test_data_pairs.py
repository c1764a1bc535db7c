"""Corpus `pairs`: what is packed, what is scored, what is held out, and what is refused."""

import json

import numpy as np
import pytest

from oasis_jax.config import DataConfig
from oasis_jax.data import load_corpus
from oasis_jax.errors import UserError

PAIRS = [(f"What is {i} and {i}?", f"It is {'so ' * (i % 5)}\n#### {2 * i}") for i in range(37)]


def written(path, pairs=PAIRS):
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs) + "\n")
    return path


def pairs_config(path, **fields):
    return DataConfig(corpus="pairs", pattern=str(path), **{"sequence_length": 131, "batch_size": 3} | fields)


def documents(rows) -> list[tuple[bytes, bytes]]:
    """What the rows hold, read back: (what is not scored, what is), in bytes."""
    found = []
    for row in (rows[i] for i in range(len(rows))):
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            inputs, targets, scored = row["inputs"][here], row["targets"][here], row["weights"][here] == 1
            assert (inputs[1:] == targets[:-1]).all() and inputs[0] == 256 and targets[-1] == 257
            assert row["positions"][here].tolist() == list(range(here.sum()))
            assert (np.diff(np.flatnonzero(here)) == 1).all() and (np.diff(scored.astype(int)) >= 0).all()
            found.append((bytes(targets[~scored].tolist()), bytes(targets[scored][:-1].tolist())))
        padding = row["segment_ids"] == 0
        assert not row["weights"][padding].any() and (np.diff(padding.astype(int)) >= 0).all()
    return found


def test_every_pair_is_there_once_and_only_answers_are_scored(tmp_path):
    corpus = load_corpus(pairs_config(written(tmp_path / "a.jsonl"), holdout_fraction=0.2), seed=0)
    train, held = documents(corpus.train), documents(corpus.heldout)
    wanted = sorted((f"Question: {q}\nAnswer:".encode(), f" {a}".encode()) for q, a in PAIRS)
    assert sorted(train + held) == wanted and len(held) == 7
    assert len(corpus.train) < len(train)  # several a row
    assert corpus.identity["pairs"] == 37 and corpus.identity["holdout"]["pairs"] == 7


def test_a_question_is_never_on_both_sides(tmp_path):
    twice = [(question, answer + "0") for question, answer in PAIRS]
    corpus = load_corpus(pairs_config(written(tmp_path / "a.jsonl", PAIRS + twice), holdout_fraction=0.3), seed=0)
    train, held = ({question for question, _ in documents(part)} for part in (corpus.train, corpus.heldout))
    assert not train & held and len(train) + len(held) == 37


GOOD = '{"question": "a", "answer": "b"}'


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"question": "a"', "a.jsonl:2: not valid JSON: "),
        ('{"question": "a"}', "a.jsonl:2: no key 'answer'; keys of this line: 'question'"),
        ('{"question": "a", "anwser": "b"}', "a.jsonl:2: no key 'answer' (did you mean 'anwser'?)"),
        ('{"question": "a", "answer": 5}', "a.jsonl:2: 'answer' is not text but a int"),
        ('{"question": " ", "answer": "b"}', "a.jsonl:2: 'question' is empty"),
        ("[1]", "a.jsonl:2: expected a JSON object with 'question' and 'answer', got list"),
        ("[" * 100_000, "a.jsonl:2: not readable as JSON: nested too deeply"),
        ('{"question": "\\ud800", "answer": "b"}', "a.jsonl:2: 'question' has half of a surrogate pair"),
        ("\udcff", "a.jsonl:2: not UTF-8 at byte 0"),
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path, line, says):
    (tmp_path / "a.jsonl").write_bytes(f"{GOOD}\n{line}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as caught:
        load_corpus(pairs_config(tmp_path / "a.jsonl"), seed=0)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_do_not_do_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^data.pattern: corpus=pairs needs a glob of .jsonl files$"):
        DataConfig(corpus="pairs")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a\.txt' is no .jsonl file, which corpus=pairs reads"):
        load_corpus(pairs_config(tmp_path / "a.txt"), seed=0)
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"e\.jsonl' holds no question"):
        load_corpus(pairs_config(tmp_path / "e.jsonl"), seed=0)
    with pytest.raises(UserError, match="needs two questions at least"):
        load_corpus(pairs_config(written(tmp_path / "o.jsonl", PAIRS[:1])), seed=0)
    with pytest.raises(UserError, match=r"^data.sequence_length: .*l.jsonl:5 has \d+ tokens, a row 60; take longer"):
        load_corpus(pairs_config(written(tmp_path / "l.jsonl"), sequence_length=60), seed=0)
