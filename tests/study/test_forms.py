"""Studies that train nothing: forms of one pretrained model on parts of a text."""

import dataclasses
import json

import numpy as np
import pytest
from evaluation.test_subjects import WORDS, with_tokenizer
from pretrained.tiny import write

from oasis_jax.errors import UserError
from oasis_jax.evaluation.runs import evaluate
from oasis_jax.evaluation.subjects import ModelOptions
from oasis_jax.pretrained import rotate, transplant_sink
from oasis_jax.study import Claim, Form, Outcome, Source, Study
from oasis_jax.study.report import kept_records, write_study_report
from oasis_jax.study.run import prepare, run_study

NATS = "quantized.w8a8.nats"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in np.random.default_rng(0).integers(2, WORDS, 900)))
    return Source(
        model=with_tokenizer(write(folder / "tiny")), text=str(text), length=12, parts=3, sequences=4, batch_size=2
    )


def forms_of(source, **fields) -> Study:
    given = dict(
        title="Forms",
        source=source,
        methods={
            "as_it_is": Form("nothing", lambda model, rows: model),
            "begin": Form("the begin token is the null", lambda model, rows: transplant_sink(model)),
            "rotated": Form("turned", lambda model, rows: rotate(model)),
        },
        seeds=(0, 1, 2),
        measures=("perplexity", "sinks"),
        schemes=("w8a8",),
        outcomes=(Outcome("perplexity", "perplexity"), Outcome(NATS, "w8a8", relative=False)),
        claims=(Claim("It costs less", "ours", NATS, "rotated", "as_it_is"),),
    )
    return Study(**given | fields)


@pytest.fixture(scope="module")
def done(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("forms")
    run_study(lambda: forms_of(source), out)
    write_study_report(forms_of(source), out)
    return out


def test_forms_that_change_nothing_in_float_have_equal_losses_part_by_part(source, done):
    records = {(r["method"], r["seed"]): r for r in kept_records(forms_of(source), done)}
    assert len(records) == 9
    losses = {key: record["values"]["perplexity"] for key, record in records.items()}
    for part in range(3):
        np.testing.assert_allclose(losses["begin", part], losses["as_it_is", part], rtol=1e-4)
        np.testing.assert_allclose(losses["rotated", part], losses["as_it_is", part], rtol=1e-4)
    assert len({losses["as_it_is", part] for part in range(3)}) == 3


def test_fewer_parts_are_the_same_parts(source, done, tmp_path):
    few = lambda: forms_of(source, seeds=(0,))
    run_study(few, tmp_path, methods=("begin",))
    (record,) = kept_records(few(), tmp_path)
    assert record in kept_records(forms_of(source), done)


def test_parts_are_together_what_a_report_reads(source, done, tmp_path):
    """The mean of the parts' losses, which are of equally many tokens, is the loss of all sequences."""
    options = ModelOptions(text=source.text, length=12, num_batches=6, batch_size=2)
    (run,) = evaluate([], tmp_path / "report", models=[source.model], options=options, measures=["perplexity"])
    parts = [r for r in kept_records(forms_of(source), done) if r["method"] == "as_it_is"]
    found = np.mean([np.log(r["values"]["perplexity"]) for r in parts])
    np.testing.assert_allclose(found, np.log(run.metrics["perplexity"]), rtol=1e-5)


def test_the_report_says_that_nothing_was_trained(done):
    text = (done / "results.md").read_text()
    assert "3 forms of one model, nothing trained, each on the same 3 of 3 parts of a text, 4 sequences of 12" in text
    assert "| begin | the begin token is the null |" in text and "steps a cell" not in text and "seeds" not in text
    assert json.loads((done / "results.json").read_text())["done"] == 9


def test_another_text_is_another_study(source, done):
    with pytest.raises(UserError, match="holds another study: the settings of cells/all/as_it_is/seed0"):
        prepare(forms_of(dataclasses.replace(source, length=9)), done)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(source=None), "needs either base"),
        (dict(methods={"a": ()}), r"study.methods\['a'\]: must be a Form"),
        (dict(seeds=(1, 3)), "number the parts of the text, 0 to 2"),
        (dict(arms={"a": ("data.begin_token=false",)}), "there is one, without settings"),
    ],
)
def test_mistakes(source, fields, words):
    with pytest.raises(UserError, match=words):
        forms_of(fields.pop("source", source), **{"claims": ()} | fields)
