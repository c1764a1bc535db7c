"""GSM8K: what a model is asked, how its texts are scored, kept and gone on with, and what is refused."""

import dataclasses
import itertools
import json
import math
import re
from fractions import Fraction

import pytest
from pretrained.tiny import random_model

from oasis_jax.config import ModelConfig
from oasis_jax.data.tokenizers import BytesTokenizer
from oasis_jax.decoding import Generated
from oasis_jax.errors import UserError
from oasis_jax.evaluation.tasks import gsm8k
from oasis_jax.evaluation.tasks.answers import strict
from oasis_jax.evaluation.tasks.gsm8k_prompts import FIXED
from oasis_jax.evaluation.tasks.scores import pass_at, score, wilson
from oasis_jax.evaluation.tasks.table import prepare

QUESTIONS = [(f"What is {i} and {i}?", f"It is {2 * i}.\n#### {2 * i}") for i in range(7)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in QUESTIONS))
    return path


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(preset="oasis", width=24, num_heads=4, num_layers=1, mlp_dim=20, vocab_size=258)
    return random_model(config).replace(tokenizer=BytesTokenizer(), begin_token=256)


def task(file, **settings):
    return gsm8k.Task.of(
        gsm8k.Settings(gsm8k_file=str(file), **{"shots": 0, "rows": 3, "max_new_tokens": 5} | settings)
    )


@pytest.fixture
def made(monkeypatch):
    """In place of a model: sums are right but for 3 and 3, which is in words; and what was asked."""
    asked = []

    def generate(model, rows, *, seed, **options):
        found = []
        for row, own in zip(rows, seed):
            text = bytes(row[1:]).decode()
            number = int(re.findall(r"What is (\d+) and", text)[-1])
            asked.append((number, own, text))
            found.append(Generated(" six" if number == 3 else f" It is\n#### {2 * number}.0", [1], [0.0], "length"))
        return found

    monkeypatch.setattr(gsm8k, "generate", generate)
    return asked


def test_every_question_is_asked_scored_and_kept(file, model, made, tmp_path):
    found = task(file, shots=2).run(model, tmp_path / "texts.jsonl", "t")
    assert found["questions"] == 7 and found["prompt"] == "2 worked examples of this library's own"
    assert found["scores"]["strict"]["value"] == pytest.approx(6 / 7)
    assert found["scores"]["strict"]["none"] == pytest.approx(1 / 7)
    header, *records = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert header["task"] == "gsm8k" and header["shots"] == 2 and sorted(r["item"] for r in records) == [*range(7)]
    assert {r["item"]: r["right"]["strict"] for r in records} == {i: i != 3 for i in range(7)}
    assert records[0]["text"] and records[0]["ended"] == "length"
    assert made[0][2].startswith("Question: A baker") and made[0][2].endswith("?\nAnswer:")
    assert made[0][2].count("#### ") == 2


def test_a_question_is_not_among_its_own_examples(file, model, made, tmp_path):
    task(file, shots=3, gsm8k_train=str(file)).run(model, tmp_path / "texts.jsonl", "t")
    for number, _, text in made:
        assert text.count(f"What is {number} and") == 1 and text.count("#### ") == 3


@pytest.mark.parametrize("torn", [b"", b'{"item": 6, "sam', b'{"item": 6, "sample": 0}'])
def test_an_interrupted_run_is_gone_on_with_and_repeats_nothing(file, model, made, tmp_path, torn):
    path = tmp_path / "texts.jsonl"
    whole = task(file).run(model, path, "t")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + torn)
    made.clear()
    assert task(file, rows=2).run(model, path, "t") == whole
    assert len(made) == 4 and sorted(path.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())
    made.clear()
    assert task(file).run(model, path, "t") == whole and not made


def test_more_questions_go_on_from_fewer(file, model, made, tmp_path):
    path = tmp_path / "texts.jsonl"
    assert task(file, limit=2).run(model, path, "t")["questions"] == 2
    assert task(file).run(model, path, "t")["questions"] == 7
    assert len(made) == 7


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(shots=1), "holds generations with shots=0, and asked for is 1"),
        (dict(max_new_tokens=6), "holds generations with max_new_tokens=5"),
        (dict(gsm8k_prompt="boxed"), "holds generations with gsm8k_prompt='cot'"),
        (dict(temperature=1.0), "holds generations with temperature=0.0"),
    ],
)
def test_texts_of_something_else_are_refused_by_name(file, model, made, tmp_path, change, says):
    path = tmp_path / "texts.jsonl"
    task(file).run(model, path, "t")
    before = path.read_bytes()
    with pytest.raises(UserError, match=re.escape(says)):
        task(file, **change).run(model, path, "t")
    assert path.read_bytes() == before


def test_another_model_another_file_or_damage_is_refused(file, model, made, tmp_path):
    path = tmp_path / "texts.jsonl"
    task(file).run(model, path, "t")
    other = random_model(model.config, 1).replace(tokenizer=model.tokenizer, begin_token=256)
    with pytest.raises(UserError, match=r"texts\.jsonl: holds generations with parameters="):
        task(file).run(other, path, "t")
    quantized = model.changed(model.config, model.params, "quantized: w8a8")
    with pytest.raises(UserError, match=r"texts\.jsonl: holds generations with changes="):
        task(file).run(quantized, path, "t")
    changed = tmp_path / "changed.jsonl"
    changed.write_text(file.read_text().replace("#### 8", "#### 9"))
    with pytest.raises(UserError, match=r"texts\.jsonl: holds generations with sha256="):
        task(changed).run(model, path, "t")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "damage", *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=r"texts.jsonl:2: is no record of a generation; move the file away"):
        task(file).run(model, path, "t")


def test_what_is_drawn_does_not_depend_on_batches_or_interruptions(file, model, tmp_path):
    settings = dict(samples=2, pass_at=2, temperature=1.0, limit=2, max_new_tokens=4, rows=4)
    records = lambda path: sorted(path.read_text().splitlines()[1:])
    task(file, **settings).run(model, tmp_path / "a.jsonl", "t")
    task(file, **settings | dict(limit=1)).run(model, tmp_path / "b.jsonl", "t")
    task(file, **settings).run(model, tmp_path / "b.jsonl", "t")
    assert records(tmp_path / "a.jsonl") == records(tmp_path / "b.jsonl") and len(records(tmp_path / "a.jsonl")) == 4
    texts = [json.loads(line)["text"] for line in records(tmp_path / "a.jsonl")]
    assert len(set(texts)) > 2


def test_fixed_examples_end_in_the_numbers_that_they_compute():
    assert [strict(shot.answer) for shot in FIXED] == [18, 18, 180, 90, 100, 12, 21, 8]
    for shot in FIXED:
        last = shot.answer.split("####")[0]
        assert str(strict(shot.answer)) in last
        for left, op, right, value in re.findall(r"(?<![-+*/] )(?<![\d.])([\d.]+) ([-+*/]) ([\d.]+) = ([\d.]+)", last):
            a, b = Fraction(left), Fraction(right)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[op] == Fraction(value)


@pytest.mark.parametrize("samples, right, k", [(5, 0, 1), (5, 2, 1), (5, 2, 3), (6, 1, 6), (6, 6, 2), (7, 5, 3)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples, right, k):
    draws = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    assert pass_at(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_intervals():
    assert wilson(0, 20) == pytest.approx((0, 0.16113), abs=1e-4)  # Newcombe (1998) and any table
    assert wilson(10, 20) == pytest.approx((0.29930, 0.70070), abs=1e-4)
    assert wilson(20, 20)[1] == 1
    found = score([[True, False], [False, False], [True, True]], 1)
    assert found["value"] == pytest.approx(0.5) and found["method"].startswith("percentile bootstrap over questions")
    assert found["interval"][0] == 0 and found["interval"][1] == 1
    assert math.isclose(score([[True], [False]], 1)["value"], 0.5)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(gsm8k_prompt="chain"), "--gsm8k-prompt: unknown name 'chain'"),
        (dict(shots=-1), "--shots: must be at least 0, got -1"),
        (dict(shots=9), "--shots: there are 8 fixed ones; more need --gsm8k-train FILE"),
        (dict(samples=0), "--samples: must be at least 1, got 0"),
        (dict(samples=3, pass_at=4, temperature=1.0), "--pass-at: must be at most --samples, 3, got 4"),
        (dict(samples=3), "--samples: 3 greedy texts are all the same; give a --temperature above 0"),
        (dict(temperature=-0.5), "--temperature: must be at least 0, got -0.5"),
        (dict(temperature=float("nan")), "--temperature: must be finite, got nan"),
        (dict(top_p=0.0), "--top-p: must be above 0 and not above 1, got 0.0"),
        (dict(max_new_tokens=0), "--max-new-tokens: must be at least 1, got 0"),
        (dict(limit=-1), "--limit: must be at least 0, got -1"),
        (dict(gsm8k_prompt="boxed", gsm8k_train="x"), "--gsm8k-train: worked examples are of --gsm8k-prompt=cot"),
        (dict(gsm8k_file="gone.jsonl"), "--gsm8k-file: cannot read 'gone.jsonl': No such file or directory"),
        (dict(gsm8k_file=""), "--tasks: gsm8k needs --gsm8k-file FILE"),
    ],
)
def test_settings_that_cannot_be_are_one_line(file, change, says):
    with pytest.raises(UserError) as caught:
        prepare(["gsm8k"], {"gsm8k_file": str(file)} | change, [])
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_unknown_tasks_schemes_without_text_and_files_that_do_not_do(file, model, tmp_path):
    own = {"gsm8k_file": str(file)}
    refusals = [
        ((["gsm8l"], own, []), "--tasks: unknown name 'gsm8l' (did you mean 'gsm8k'?); allowed: gsm8k"),
        ((["gsm8k", "gsm8k"], own, []), "--tasks: 'gsm8k' is given twice"),
        ((["gsm8k"], own, ["w16a8_tensor"]), "--quantize: w16a8_tensor takes ranges of a whole batch"),
        ((["gsm8k"], own | {"shots": 8, "gsm8k_train": str(file)}, []), "--shots: "),
    ]
    (tmp_path / "bare.jsonl").write_text('\n{"question": "a", "answer": "five"}\n')
    bare = f"--gsm8k-file: {tmp_path}/bare.jsonl:2: the answer has no number behind '####'"
    refusals.append(((["gsm8k"], {"gsm8k_file": str(tmp_path / "bare.jsonl")}, []), bare))
    for arguments, says in refusals:
        with pytest.raises(UserError) as caught:
            prepare(*arguments)
        assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
    assert prepare([], {}, ["w16a8_tensor"]) == {}


def test_prompts_longer_than_the_context_are_refused_before_any_text_is_made(file, model, made, tmp_path):
    short = model.replace(config=dataclasses.replace(model.config, context_length=39))
    with pytest.raises(
        UserError, match=r"test.jsonl:1: a prompt of 35 tokens and 5 new ones do not fit the model's 39;"
    ):
        task(file).run(short, tmp_path / "texts.jsonl", "t")
    with pytest.raises(UserError, match=r"^chat: "):
        task(file, gsm8k_prompt="chat").run(model, tmp_path / "texts.jsonl", "t")
    assert not made and not (tmp_path / "texts.jsonl").exists()
