"""The comparison of runs, from made-up numbers: what is best, what may be compared, and what is said of it."""

import unicodedata

import pytest
from evaluation.test_report import check_self_contained

from oasis_jax.config import Config, DataConfig, ModelConfig
from oasis_jax.errors import printable
from oasis_jax.evaluation import DEFINITIONS
from oasis_jax.evaluation.interventions import Effect
from oasis_jax.evaluation.report.comparison import TABLE, MeasuredRun, best, groups, method, not_comparable, rows, show
from oasis_jax.evaluation.report.page import write_report
from oasis_jax.evaluation.report.terminal import print_comparison
from oasis_jax.evaluation.report.words import findings, summary


def measured(label: str, preset: str = "oasis", data: DataConfig | None = None, **metrics) -> MeasuredRun:
    values = dict.fromkeys(DEFINITIONS) | dict(
        perplexity=5.0, max_inf_norm=10.0, avg_kurtosis=4.0, max_kurtosis=9.0, sink_rate=0.25, first_token_mass=0.2
    )
    identity = {"name": "stdlib", "sha256": "0" * 64}
    config = Config(model=ModelConfig(preset=preset), data=data or DataConfig())
    tokenizer = {"kind": "bytes", "vocab_size": 258, "sha256": "1"}
    samples = {"sequences": 8, "positions": 8 * 256}
    return MeasuredRun(
        label, f"runs/{label}", 1, config, identity, tokenizer, samples, values | metrics, {}, [], {"jax": "0"}
    )


def row(name: str):
    return next(row for row in TABLE if row.name == name)


def test_best_is_marked_where_lower_is_better():
    runs = [measured("a", perplexity=5.0), measured("b", perplexity=4.9), measured("c", perplexity=4.90001)]
    assert best(row("perplexity"), runs) == {"b", "c"}  # equal as shown
    assert best(row("perplexity"), runs[1:]) == set()
    assert best(row("null_mass"), [measured("a", null_mass=0.1), measured("b", null_mass=0.2)]) == set()
    assert best(row("bits_per_byte"), [measured("a"), measured("b", bits_per_byte=1.0)]) == set()
    assert not [row for row in rows(runs) if row.name == "beta"]


def test_words_say_so_when_oasis_is_worse():
    oasis, twin = (
        measured("oasis", perplexity=5.5, max_inf_norm=12.0),
        measured("twin", preset="attnres_cumulative", perplexity=5.0),
    )
    text = summary([oasis, twin])
    assert "the perplexity is lowest in twin, 5.000 (5.500 in oasis)." in text
    assert "The largest activation is lowest in twin, 10.00 (12.00 in oasis)." in text
    assert "The mean kurtosis of activations is 4.000 in all runs." in text
    assert "OASIS does not come first in perplexity and largest activation." in text
    assert "trained once" in text


def test_words_say_so_when_oasis_is_better():
    values = dict(perplexity=4.5, null_mass=0.4, first_token_mass_conditional=0.3, beta=0.01)
    oasis, twin = measured("oasis", **values), measured("twin", preset="attnres_cumulative")
    text = summary([twin, oasis])
    assert "lowest in oasis, 4.500 (5.000 in twin)" in text and "does not" not in text
    found = findings([twin, oasis])
    assert list(found) == ["Null", "Depth"]
    assert "the null takes 40\N{NO-BREAK SPACE}% in oasis" in found["Null"]
    assert (
        "gets 30\N{NO-BREAK SPACE}% in oasis" in found["Null"] and "gets 20\N{NO-BREAK SPACE}% in twin" in found["Null"]
    )
    assert "is 0.01 in oasis" in found["Depth"]


def test_words_about_one_run():
    text = summary([measured("only")])
    assert "perplexity is 5.000." in text and "in all runs" not in text and "trained once" not in text


def test_runs_are_compared_only_on_the_same_examples():
    same, other = [measured("a"), measured("b")], measured("c", data=DataConfig(sequence_length=64))
    assert groups([*same, other]) == [same, [other]]
    assert not_comparable(same) is None
    assert "differ in sequence length" in not_comparable([*same, other])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.25, "0.250"),
        (0.0067, "0.0067"),
        (0.00012345, "0.000123"),
        (0.000012345, "1.23e-05"),
        (5.1234, "5.123"),
        (51.234, "51.23"),
        (512.34, "512.3"),
        (5123.4, "5123"),
        (51234.0, "5.12e+04"),
    ],
)
def test_numbers_as_shown(value, text):
    assert show(value) == text


def test_method_names_what_differs_from_the_preset():
    assert (
        method(Config(model=ModelConfig(preset="residual", normalizer="softmax1"))) == "residual, normalizer=softmax1"
    )
    assert method(Config(model=ModelConfig(preset="oasis"))) == "oasis"


@pytest.mark.parametrize("label", ["[/b]x", "[red]x[link=http://x]", "a\x1b[31mb\x07", "a\u202eb", "\udcff", "\\[b]"])
def test_labels_cannot_steer_the_terminal(label, capsys):
    """Neither markup nor escapes; every letter is seen."""
    effect = Effect("sources", mean_weight=0.5, loss=1.6, change=0.1, interval=(0.0, 0.2))
    run = measured(label)._replace(interventions=[effect])
    print_comparison([run])
    said = capsys.readouterr().out
    assert not [c for c in said if c != "\n" and unicodedata.category(c) in ("Cc", "Cs", "Cf")]
    assert printable(label).replace(" ", "") in "".join(said.split())


def test_labels_cannot_break_the_page(tmp_path):
    values = {"inf_norm_by_tap": {kind: [1.0, None] for kind in ("attention_output", "mlp_output", "layer_output")}}
    values |= {"kurtosis_by_tap": values["inf_norm_by_tap"], "first_token_mass_by_head": [[0.1, 0.2], [0.3, 0.4]]}
    assert write_report([measured("<script>alert(1)</script>", **values)], tmp_path) == []
    page = check_self_contained((tmp_path / "index.html").read_text())
    assert "<script>alert(1)</script>" in page.text
