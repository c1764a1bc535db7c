"""Pretrained models in a report: what they read, the four forms of one model, and what is refused."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
from pretrained.tiny import CONFIG, write

from oasis_jax import UserError
from oasis_jax.data.tokenizers import LibraryTokenizer
from oasis_jax.evaluation.runs import evaluate
from oasis_jax.evaluation.subjects import ModelOptions, subjects_of_model

WORDS = CONFIG["vocab_size"]


@pytest.fixture
def model(tmp_path):
    """A tiny Llama whose tokenizer puts token 1 first."""
    return with_tokenizer(write(tmp_path / "tiny"))


def with_tokenizer(folder, begin=1):
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if begin is not None:
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"w{begin} $A", special_tokens=[(f"w{begin}", begin)]
        )
    library.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in np.random.default_rng(0).integers(2, WORDS, 400)))
    return str(path)


def test_the_four_forms_of_a_model_are_one_in_float(model, text, tmp_path):
    options = ModelOptions(text=text, length=12, num_batches=2, batch_size=3, transplant="begin", rotate=True)
    runs = evaluate(
        [], tmp_path / "report", models=[model], options=options, measures=["perplexity", "sinks"], quantize=["w8a8"]
    )
    assert [run.label for run in runs] == ["tiny", "tiny, transplanted", "tiny, rotated", "tiny, both"]
    first = runs[0].metrics
    assert first["null_mass"] is None and runs[1].metrics["null_mass"] > 0.01
    for run in runs:
        assert run.metrics["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert run.samples == {"sequences": 6, "positions": 72}
        assert run.quantization["w8a8"]["float"] == pytest.approx(np.exp(first["loss"]), rel=1e-4)
    found = json.loads((tmp_path / "report/metrics.json").read_text())
    assert list(found["runs"]) == [run.label for run in runs]
    assert len(found["paired"]) == 6 and all("differences" in pair for pair in found["paired"])
    assert len(found["comparable"]) == 1
    assert found["runs"]["tiny, transplanted"]["notes"] == [
        "sink transplanted: 1 ('w1')",
        "texts begin with no begin token",
    ]
    assert "texts begin with a begin token, 1" in (tmp_path / "report/index.html").read_text()


def test_a_begin_token_adds_nothing_to_what_is_scored(model, text):
    with_begin, without = (
        next(
            subjects_of_model(model, "", ModelOptions(text=text, length=9, num_batches=1, batch_size=2, begin_token=b))
        )
        for b in ("auto", "none")
    )
    (one,), (other,) = with_begin.batches, without.batches
    assert one["inputs"].shape == (2, 10) and set(one["inputs"][:, 0]) == {1}
    np.testing.assert_array_equal(one["inputs"][:, 1:], other["inputs"])
    np.testing.assert_array_equal(one["targets"][one["weights"] > 0], other["targets"][other["weights"] > 0])
    windows = np.concatenate([other["inputs"], other["targets"][:, -1:]], axis=1)
    read = LibraryTokenizer.encode(with_begin.tokenizer, pathlib.Path(text).read_text())
    assert all(any((read[i : i + 10] == row).all() for i in range(0, len(read) - 9, 10)) for row in windows)
    assert not {tuple(row) for row in windows} & {tuple(row[1:]) for row in with_begin.calibration()[0]["inputs"]}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(length=64), "--length: 65 tokens, the begin token included, but .* was made for 64"),
        (dict(length=30, num_batches=9), "holds 400 tokens, 12 sequences of 31; 18 to measure and 2 to calibrate"),
        (
            dict(begin_token="first"),
            "--begin-token: must be auto, none or the number of a token below 211, got 'first'",
        ),
        (dict(begin_token="211"), "below 211, got '211'"),
        (dict(transplant="w1"), "--transplant: must be begin, auto, or numbers of tokens"),
        (dict(transplant="begin", begin_token="none"), "have no begin token; name one with --begin-token"),
        (dict(text="nothing/*.txt"), "--text: no file matches"),
    ],
)
def test_what_cannot_be_read_says_so(model, text, options, message):
    options = ModelOptions(**(dict(text=text, length=9, num_batches=1, batch_size=2) | options))
    with pytest.raises(UserError, match=message):
        list(subjects_of_model(model, "", options))


def test_a_model_with_windows_is_not_transplanted(tmp_path, text):
    folder = with_tokenizer(write(tmp_path / "windows", model_type="mistral", sliding_window=4))
    with pytest.raises(UserError, match="layers 0, 1 have a window"):
        next(subjects_of_model(folder, "", ModelOptions(text=text, length=9, transplant="begin")))


def test_a_model_without_a_tokenizer_reads_no_text(tmp_path, text):
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        next(subjects_of_model(str(write(tmp_path / "tiny")), "", ModelOptions(text=text)))
