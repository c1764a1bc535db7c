"""Measured runs side by side: which may be compared, which value is best, and what the numbers say in words."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from oasis_jax.config import METHOD_FIELDS, PRESETS, Config
from oasis_jax.evaluation.evaluator import Value


class MeasuredRun(NamedTuple):
    """One run and what was measured of it."""

    label: str  # short and unique among the runs of a report
    workdir: str
    step: int
    config: Config
    corpus: dict  # identity of the corpus
    tokenizer: dict | None  # identity of the tokenizer
    samples: dict[str, int]  # "sequences" and "positions" that were read
    metrics: dict[str, Value]
    absent: dict[str, str]  # metric -> why it is None
    history: list[dict]  # the lines of its metrics.jsonl
    versions: dict[str, str]


class Row(NamedTuple):
    """A scalar metric in the comparison table."""

    name: str
    title: str
    direction: str  # "lower": lower is better; "none": neither is


TABLE = (
    Row("perplexity", "perplexity", "lower"),
    Row("bits_per_byte", "bits per byte", "lower"),
    Row("squared_error", "squared error", "lower"),
    Row("max_inf_norm", "largest activation, all taps", "lower"),
    Row("max_ffn_inf_norm", "largest activation, MLP outputs", "lower"),
    Row("max_layer_inf_norm", "largest activation, layer outputs", "lower"),
    Row("avg_kurtosis", "kurtosis, mean over taps", "lower"),
    Row("max_kurtosis", "kurtosis, largest tap", "lower"),
    Row("sink_rate", "sink rate", "lower"),
    Row("sink_rate_conditional", "sink rate, null left out", "lower"),
    Row("first_token_mass", "mass on the first token", "lower"),
    Row("first_token_mass_conditional", "mass on the first token, null left out", "lower"),
    Row("null_mass", "mass on the null", "none"),
    Row("non_trigger_first_token_mass", "first token, rows without trigger", "lower"),
    Row("non_trigger_first_token_mass_max", "the same, strongest head", "lower"),
    Row("non_trigger_null_mass", "null, rows without trigger", "none"),
    Row("trigger_first_token_mass", "first token, rows with trigger", "lower"),
    Row("trigger_null_mass", "null, rows with trigger", "none"),
    Row("depth_embedding_weight", "depth weight of the embedding", "none"),
    Row("depth_max_weight", "largest depth weight", "none"),
    Row("depth_entropy", "depth entropy (nats)", "none"),
    Row("depth_sink_rate", "depth sink rate of the embedding", "none"),
    Row("depth_null_mass", "depth mass on the null", "none"),
    Row("beta", "coupling beta", "none"),
)
ABSENT = "–"


def show(value: float | None) -> str:
    """Three or four significant digits; an en dash for what does not apply."""
    if value is None:
        return ABSENT
    size = abs(value)
    if size >= 10_000 or 0 < size < 0.001:
        return f"{value:.2e}"
    return f"{value:.0f}" if size >= 1000 else f"{value:.1f}" if size >= 100 else f"{value:.2f}" if size >= 10 else f"{value:.3f}"


def best(row: Row, runs: Sequence[MeasuredRun]) -> set[str]:
    """Labels of the runs with the best value as shown; empty where no direction is better or nothing is to choose from."""
    values = {run.label: run.metrics[row.name] for run in runs if run.metrics[row.name] is not None}
    shown = {label: show(value) for label, value in values.items()}
    if row.direction == "none" or len(set(shown.values())) < 2:
        return set()
    lowest = show(min(values.values()))
    return {label for label, text in shown.items() if text == lowest}


def method(config: Config) -> str:
    """The preset, and the method's fields that were set otherwise: "residual, normalizer=softmax1"."""
    preset = PRESETS[config.model.preset]
    changed = [f"{name}={getattr(config.model, name)}" for name in METHOD_FIELDS if getattr(config.model, name) != preset[name]]
    return ", ".join([config.model.preset, *changed])


def _data_parts(run: MeasuredRun) -> dict[str, object]:
    """What has to be equal for two perplexities to be comparable."""
    return {
        "corpus": run.corpus,
        "tokenizer": run.tokenizer,
        "sequence length": run.config.data.sequence_length,
        "begin token": run.config.data.begin_token,
        "number of held-out sequences": run.samples["sequences"],
    }


def groups(runs: Sequence[MeasuredRun]) -> list[list[MeasuredRun]]:
    """The runs that were measured on the same examples, together, in the order given."""
    found: dict[str, list[MeasuredRun]] = {}
    for run in runs:
        found.setdefault(json.dumps(_data_parts(run), sort_keys=True), []).append(run)
    return list(found.values())


def differences(runs: Sequence[MeasuredRun]) -> list[str]:
    """In which of the things that make examples comparable the runs differ."""
    parts = [_data_parts(run) for run in runs]
    return [name for name in parts[0] if any(other[name] != parts[0][name] for other in parts)]


def describe_data(runs: Sequence[MeasuredRun]) -> str:
    """The held-out examples of one group: "64 sequences of 256 byte tokens of stdlib"."""
    run = runs[0]
    kind = "vectors" if run.tokenizer is None else "byte tokens" if run.tokenizer["kind"] == "bytes" else f"{run.tokenizer['kind']} tokens"
    return f"{run.samples['sequences']} sequences of {run.config.data.sequence_length} {kind} of {run.corpus['name']}"


def not_comparable(runs: Sequence[MeasuredRun]) -> str | None:
    """Why perplexities must not be compared across these runs, in one sentence; None where they may be."""
    if not differences(runs):
        return None
    return (
        f"The runs differ in {_listed(differences(runs))}: their perplexities and losses are not comparable, and best values are marked only "
        "among runs that read the same examples. Bits per byte may be compared across tokenizers, for similar text."
    )


def _listed(words: Sequence[str]) -> str:
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.1f} %"


def _each(runs: Sequence[MeasuredRun], name: str, form=show) -> str:
    """ "0.31 (a), 0.24 (b)" over the runs to which a metric applies."""
    having = [run for run in runs if run.metrics[name] is not None]
    if len(having) == 1 == len(runs):
        return form(having[0].metrics[name])
    return _listed([f"{form(run.metrics[name])} ({run.label})" for run in having])


def _has(runs: Sequence[MeasuredRun], name: str) -> list[MeasuredRun]:
    return [run for run in runs if run.metrics[name] is not None]


def _prediction(runs: Sequence[MeasuredRun]) -> list[str]:
    """Who predicts best, by how much, and whether OASIS helped."""
    name, title = ("perplexity", "perplexity") if _has(runs, "perplexity") else ("squared_error", "squared error")
    order = sorted(_has(runs, name), key=lambda run: run.metrics[name])
    if len(order) < 2:
        return [f"The {title} of {run.label} on {describe_data(runs)} is {show(run.metrics[name])}." for run in order]
    first, second, last = order[0], order[1], order[-1]
    texts = [
        f"On {describe_data(runs)}, {first.label} has the lowest {title}, {show(first.metrics[name])}: "
        f"{_relative(first, second, name)} below {second.label} ({show(second.metrics[name])})"
        + (f" and {_relative(first, last, name)} below {last.label} ({show(last.metrics[name])})." if last is not second else ".")
    ]
    oasis = [run for run in order if run.config.model.coupling]
    if oasis and len(oasis) < len(order) and not first.config.model.coupling:
        texts.append(f"OASIS did not help prediction here: {oasis[0].label} comes after {first.label}.")
    return texts


def _relative(low: MeasuredRun, high: MeasuredRun, name: str) -> str:
    share = 1 - low.metrics[name] / high.metrics[name] if high.metrics[name] else 0.0
    return f"{100 * share:.1f} %"


def _outliers(runs: Sequence[MeasuredRun]) -> list[str]:
    texts = [f"The largest activation is {_each(runs, 'max_inf_norm')}, the mean kurtosis {_each(runs, 'avg_kurtosis')}."]
    oasis = [run for run in runs if run.config.model.coupling]
    others = [run for run in runs if not run.config.model.coupling]
    for name, what in (("max_inf_norm", "largest activation"), ("avg_kurtosis", "kurtosis")):
        lowest = [min((run.metrics[name] for run in _has(part, name)), default=None) for part in (oasis, others)]
        if None not in lowest and lowest[0] > lowest[1]:
            texts.append(f"OASIS did not lower the {what}.")
    return texts


def _sinks(runs: Sequence[MeasuredRun]) -> list[str]:
    texts = [
        f"The share of heads with a sink on the first token is {_each(runs, 'sink_rate', _percent)}; "
        f"the first token gets {_each(runs, 'first_token_mass', _percent)} of all attention."
    ]
    null = _has(runs, "null_mass")
    if null:
        texts.append(
            f"The null takes {_each(runs, 'null_mass', _percent)} of it; of what is left on tokens, the first gets "
            f"{_each(runs, 'first_token_mass_conditional', _percent)}."
        )
    return texts


def _trigger(runs: Sequence[MeasuredRun]) -> list[str]:
    """The sink task: where rows without a trigger send their attention."""
    if not _has(runs, "non_trigger_first_token_mass"):
        return []
    text = (
        "In rows without a trigger, which have nothing to look for, the head that relies most on the first token gives it "
        f"{_each(runs, 'non_trigger_first_token_mass_max', _percent)}"
    )
    null = _has(runs, "non_trigger_null_mass")
    return [f"{text}; over all heads the null takes {_each(runs, 'non_trigger_null_mass', _percent)}." if null else f"{text}."]


def _depth(runs: Sequence[MeasuredRun]) -> list[str]:
    texts = []
    if _has(runs, "depth_embedding_weight"):
        texts.append(f"Depth routers give the embedding a mean weight of {_each(runs, 'depth_embedding_weight', _percent)}.")
    if _has(runs, "depth_null_mass"):
        texts.append(f"Their own null takes {_each(runs, 'depth_null_mass', _percent)}.")
    if _has(runs, "beta"):
        texts.append(f"The coupling beta is {_each(runs, 'beta')}; training starts it at 0.0067.")
    return texts


def sentences(runs: Sequence[MeasuredRun]) -> list[str]:
    """What the numbers of one group of comparable runs say, good or bad, computed from them."""
    texts = [*_prediction(runs), *_outliers(runs), *_sinks(runs), *_trigger(runs), *_depth(runs)]
    once = "Each method was trained once, so small differences may be chance."
    return [*texts, once] if len(runs) > 1 else texts


def rows(runs: Sequence[MeasuredRun]) -> list[Row]:
    """The rows of the table that apply to at least one of the runs."""
    return [row for row in TABLE if _has(runs, row.name)]
