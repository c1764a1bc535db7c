"""Measured runs side by side: which may be compared, which value is best, and how numbers are shown."""

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from oasis_jax.config import METHOD_FIELDS, PRESETS, Config
from oasis_jax.evaluation.bootstrap import Interval
from oasis_jax.evaluation.evaluator import Measurements, Value
from oasis_jax.evaluation.interventions import Effect


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
    measurements: Measurements | None = None  # what intervals and differences come from
    intervals: Mapping[str, Interval | None] = MappingProxyType({})  # of scalar metrics
    interventions: Sequence[Effect] = ()
    view: Mapping | None = None  # as `oasis_jax.evaluation.report.views.look` says
    quantization: Mapping[str, dict] = MappingProxyType(
        {}
    )  # by scheme, as `oasis_jax.evaluation.quantization.inference` says
    tasks: Mapping[str, dict] = MappingProxyType({})  # as `oasis_jax.evaluation.tasks.table.run_tasks` says
    notes: Sequence[str] = ()  # what was done to a pretrained model, and how its texts begin
    parameters: int | None = None


class Row(NamedTuple):
    """A scalar metric in the comparison table."""

    name: str
    title: str
    direction: str  # "lower": lower is better; "none": neither is


TABLE = (
    Row("perplexity", "perplexity", "lower"),
    Row("bits_per_byte", "bits per byte", "lower"),
    Row("top_1_accuracy", "top-1 accuracy", "none"),
    Row("top_5_accuracy", "top-5 accuracy", "none"),
    Row("squared_error", "squared error", "lower"),
    Row("max_inf_norm", "max |x|, all taps", "lower"),
    Row("max_ffn_inf_norm", "max |x|, MLP outputs", "lower"),
    Row("max_layer_inf_norm", "max |x|, layer outputs", "lower"),
    Row("avg_kurtosis", "kurtosis, mean over taps", "lower"),
    Row("max_kurtosis", "kurtosis, largest tap", "lower"),
    Row("sink_rate", "sink rate", "lower"),
    Row("sink_rate_conditional", "sink rate, without the null", "lower"),
    Row("first_token_mass", "first-token mass", "lower"),
    Row("first_token_mass_conditional", "first-token mass, without the null", "lower"),
    Row("null_mass", "null mass", "none"),
    Row("secondary_sink_rate", "secondary sink rate", "lower"),
    Row("secondary_sink_rate_conditional", "secondary sink rate, without the null", "lower"),
    Row("attention_entropy", "attention entropy (nats)", "none"),
    Row("attention_entropy_conditional", "attention entropy, without the null", "none"),
    Row("max_probability", "largest probability of a row", "none"),
    Row("max_probability_conditional", "largest probability, without the null", "none"),
    Row("massive_activations", "massive activations, a sequence", "lower"),
    Row("largest_activation_ratio", "largest activation / median", "lower"),
    Row("avg_token_kurtosis", "kurtosis of a token, mean over taps", "lower"),
    Row("residual_sink_ratio", "residual sink, channel / median", "lower"),
    Row("residual_sink_share", "residual sink, share of tokens", "lower"),
    Row("residual_peak", "residual norm, first token / others", "none"),
    Row("value_drain", "value norm, first token / others", "none"),
    Row("head_output_norm", "norm of head outputs", "none"),
    Row("non_trigger_first_token_mass", "first-token mass, no trigger", "lower"),
    Row("non_trigger_first_token_mass_max", "… in the strongest head", "lower"),
    Row("non_trigger_null_mass", "null mass, no trigger", "none"),
    Row("trigger_first_token_mass", "first-token mass, trigger", "lower"),
    Row("trigger_null_mass", "null mass, trigger", "none"),
    Row("trigger_excess_risk", "excess risk, trigger (nats)", "lower"),
    Row("non_trigger_excess_risk", "excess risk, no trigger (nats)", "lower"),
    Row("depth_embedding_weight", "depth weight, embedding", "none"),
    Row("depth_max_weight", "depth weight, largest", "none"),
    Row("depth_entropy", "depth entropy (nats)", "none"),
    Row("depth_sink_rate", "depth sink rate, embedding", "none"),
    Row("depth_null_mass", "depth null mass", "none"),
    Row("beta", "coupling beta", "none"),
    Row("joint_leakage_first_token_identity_outcome", "joint leakage, first token", "lower"),
    Row("joint_leakage_first_token_attention_only_conditional", "… of attention alone", "lower"),
    Row("joint_concentration_identity_outcome", "joint concentration", "none"),
    Row("joint_concentration_attention_only_conditional", "… of attention alone", "none"),
    Row("joint_negative_entropy_identity_outcome", "joint negative entropy (nats)", "none"),
    Row("joint_negative_entropy_attention_only_conditional", "… of attention alone", "none"),
)
ABSENT, NOT_APPLICABLE = "–", "n/a"


def show(value: float | None) -> str:
    """Three or four significant digits; an en dash for what does not apply."""
    if value is None:
        return ABSENT
    size = abs(value)
    if size >= 10_000 or 0 < size < 1e-4:
        return f"{value:.2e}"
    if size < 0.1:
        return f"{value:.3g}"
    return (
        f"{value:.0f}"
        if size >= 1000
        else f"{value:.1f}"
        if size >= 100
        else f"{value:.2f}"
        if size >= 10
        else f"{value:.3f}"
    )


def cell(row: Row, run: MeasuredRun) -> str:
    """A value as shown; what does not apply to a model is told from what was not measured, and is never 0."""
    if run.metrics[row.name] is None and run.absent.get(row.name, "").startswith("not applicable"):
        return NOT_APPLICABLE
    return show(run.metrics[row.name])


def interval_text(interval: Interval | None, form: Callable[[float], str] = show) -> str:
    """ "4.1 to 4.3"; empty without one, and where both ends are the same."""
    ends = [form(end) for end in interval or ()]
    return " to ".join(ends) if len(set(ends)) == 2 else ""


def change_text(change: float | None) -> str:
    """A relative change: "+0.31 %"; an en dash for one that is not finite."""
    if change is None:
        return ABSENT
    size = abs(100 * change)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 3
    return f"{100 * change:+.{digits}f}\N{NO-BREAK SPACE}%"


def nats_text(value: float) -> str:
    """A difference of losses: "+0.411"."""
    return f"{value:+.3f}"


def best(row: Row, runs: Sequence[MeasuredRun]) -> set[str]:
    """Labels of the runs with the best value as shown; empty where no direction is better or nothing is to
    choose from.
    """
    values = {run.label: run.metrics[row.name] for run in runs if run.metrics[row.name] is not None}
    shown = {label: show(value) for label, value in values.items()}
    if row.direction == "none" or len(set(shown.values())) < 2:
        return set()
    lowest = show(min(values.values()))
    return {label for label, text in shown.items() if text == lowest}


def having(runs: Sequence[MeasuredRun], name: str) -> list[MeasuredRun]:
    """The runs to which a metric applies."""
    return [run for run in runs if run.metrics[name] is not None]


def method(config: Config) -> str:
    """The preset, and the method's fields that were set otherwise: "residual, normalizer=softmax1"."""
    preset = PRESETS[config.model.preset]
    changed = [
        f"{name}={getattr(config.model, name)}" for name in METHOD_FIELDS if getattr(config.model, name) != preset[name]
    ]
    return ", ".join([config.model.preset, *changed])


def _data_parts(run: MeasuredRun) -> dict[str, object]:
    """What has to be equal for two perplexities to be comparable."""
    return {
        "corpus": run.corpus,
        "tokenizer": run.tokenizer,
        "sequence length": run.config.data.sequence_length,
        # A pretrained model's begin token is not scored: with or without, the same tokens are.
        "begin token": run.config.data.begin_token and not run.notes,
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
    """The held-out examples of one group: "64 held-out sequences of 256 byte tokens (corpus stdlib)"."""
    run = runs[0]
    kind = (
        "vectors"
        if run.tokenizer is None
        else "byte tokens"
        if run.tokenizer["kind"] == "bytes"
        else f"{run.tokenizer['kind']} tokens"
    )
    return (
        f"{run.samples['sequences']} held-out sequences of {run.config.data.sequence_length} {kind} "
        f"(corpus {run.corpus['name']})"
    )


def not_comparable(runs: Sequence[MeasuredRun]) -> str | None:
    """Why perplexities must not be compared across these runs, in one sentence; None where they may be."""
    if not differences(runs):
        return None
    return (
        f"The runs differ in {listed(differences(runs))}: their perplexities and losses are not comparable, and "
        "best values are marked only "
        "among runs that read the same examples. Bits per byte may be compared across tokenizers, for similar text."
    )


def listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def rows(runs: Sequence[MeasuredRun]) -> list[Row]:
    """The rows of the table that apply to at least one of the runs."""
    return [row for row in TABLE if having(runs, row.name)]
