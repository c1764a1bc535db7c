"""What the numbers of comparable runs say, in words computed from them, whether they speak for OASIS or not."""

from collections.abc import Callable, Sequence

from oasis_jax.evaluation.bootstrap import paired_differences
from oasis_jax.evaluation.measures.sinks import EPSILON
from oasis_jax.evaluation.report.comparison import MeasuredRun, change_text, describe_data, having, listed, show

Runs = Sequence[MeasuredRun]
Form = Callable[[float], str]


def percent(value: float) -> str:
    """0.5 -> "50 %", 0.997 -> "99.7 %"; the space does not break."""
    digits = 0 if 0.1 <= value <= 0.99 or value in (0, 1) else 1
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def _labelled(runs: Runs, name: str, form: Form) -> str:
    return listed([f"{form(run.metrics[name])} in {run.label}" for run in runs])


def _each(runs: Runs, name: str, form: Form = show) -> str:
    """ "0.31 in a and 0.24 in b" over the runs to which a metric applies; "0.31", or "0.31 in all runs", where one
    number says it.
    """
    values = {form(run.metrics[name]) for run in having(runs, name)}
    if len(values) == 1 and having(runs, name) == list(runs):
        return values.pop() + (" in all runs" if len(runs) > 1 else "")
    return _labelled(having(runs, name), name, form)


def _lowest(runs: Runs, name: str, form: Form = show) -> str:
    """ "12.0", "12.0 in all runs", or "lowest in a, 12.0 (13.0 in b and 15.0 in c)"."""
    order = sorted(having(runs, name), key=lambda run: run.metrics[name])
    values = [form(run.metrics[name]) for run in order]
    if len(set(values)) == 1:
        return values[0] + (" in all runs" if len(values) > 1 else "")
    return f"lowest in {order[0].label}, {values[0]} ({_labelled(order[1:], name, form)})"


def summary(runs: Runs) -> str:
    """The first paragraph: prediction, outliers and sinks, and where OASIS does not come first."""
    name, title = ("perplexity", "perplexity") if having(runs, "perplexity") else ("squared_error", "squared error")
    measures = {
        f"On {describe_data(runs)}, the {title}": (name, show),
        "The largest activation": ("max_inf_norm", show),
        "The mean kurtosis of activations": ("avg_kurtosis", show),
        f"The sink rate, the share of heads that give the first token more than {percent(EPSILON)} of their "
        "attention,": (
            "sink_rate",
            percent,
        ),
    }
    texts = [
        f"{subject} is {_lowest(runs, name, form)}." for subject, (name, form) in measures.items() if having(runs, name)
    ]
    texts += _quantization(runs)
    texts += _behind(
        runs, {name: title, "max_inf_norm": "largest activation", "avg_kurtosis": "kurtosis", "sink_rate": "sink rate"}
    )
    return " ".join(texts + ["Each run was trained once, so small differences may be chance."] * (len(runs) > 1))


def _quantization(runs: Runs) -> list[str]:
    """Which scheme costs each run least and most; or what the only one costs."""
    costs = {
        run.label: {name: found["relative_change"] for name, found in run.quantization.items()}
        for run in runs
        if run.quantization
    }
    finite = {
        label: {name: change for name, change in cost.items() if change is not None} for label, cost in costs.items()
    }
    what = "perplexity" if having(runs, "perplexity") else "squared error"
    parts = []
    for label, cost in finite.items():
        where = f" of {label}" if len(runs) > 1 else ""
        broken = [name for name in costs[label] if name not in cost]
        diverges = f"{listed(broken)} breaks it" if broken else ""
        least, most = (pick(cost, key=lambda name: abs(cost[name]), default=None) for pick in (min, max))
        span = [f"{change_text(cost[name])} ({name})" for name in dict.fromkeys((least, most)) if name]
        parts.append(
            f"the {what}{where}" + (f" by {' to '.join(span)}" if span else "") + (f"; {diverges}" if broken else "")
        )
    return [f"Quantization changes {' and '.join(parts)}."] if parts else []


def _behind(runs: Runs, measures: dict[str, str]) -> list[str]:
    """Names what another method did better than the best run with the inter-layer null signal."""
    oasis = [run for run in runs if run.config.model.coupling]
    others = [run for run in runs if not run.config.model.coupling]
    worse = []
    for name, title in measures.items():
        lowest = [min((run.metrics[name] for run in having(part, name)), default=None) for part in (oasis, others)]
        if None not in lowest and lowest[0] > lowest[1] and show(lowest[0]) != show(lowest[1]):
            worse.append(title)
    return [f"OASIS does not come first in {listed(worse)}."] if worse else []


def findings(runs: Runs) -> dict[str, str]:
    """Topic -> what there is to say beyond the summary; only topics that apply."""
    found = {"Chance": _chance(runs), "Null": _null(runs), "Sink task": _sink_task(runs), "Depth": _depth(runs)}
    return {topic: " ".join(texts) for topic, texts in found.items() if texts}


def _chance(runs: Runs) -> list[str]:
    """Whether the intervals of the prediction measure tell the best two runs apart on this text."""
    name = "perplexity" if having(runs, "perplexity") else "squared_error"
    order = sorted((run for run in having(runs, name) if run.measurements), key=lambda run: run.metrics[name])[:2]
    if len(order) < 2:
        return []
    first, second = (run.measurements for run in order)
    if first.identity != second.identity:
        return [f"{order[0].label} and {order[1].label} differ in depth or text, so their difference has no interval."]
    found = paired_differences(second.estimates, first.estimates, (second.identity, first.identity))[name]
    if found["interval"] is None:
        return ["One sequence was read, so no difference has an interval."]
    low, high = found["interval"]
    said = (
        "is more than the choice of sequences explains" if low > 0 else "may be chance of the sequences that were read"
    )
    title = name.replace("_", " ")
    between = (
        f"{show(found['difference'])} between {order[1].label} and {order[0].label} "
        f"(95\N{NO-BREAK SPACE}% interval {show(low)} to {show(high)})"
    )
    return [f"Paired by sequence, the difference in {title} of {between} {said}."]


def _null(runs: Runs) -> list[str]:
    if not having(runs, "null_mass"):
        return []
    null, rest = (_each(runs, name, percent) for name in ("null_mass", "first_token_mass_conditional"))
    texts = [f"Of all attention the null takes {null}; of what is left on tokens, the first token gets {rest}."]
    if softmax := [run for run in runs if run.metrics["null_mass"] is None]:
        texts.append(f"Without a null the first token gets {_labelled(softmax, 'first_token_mass', percent)}.")
    return texts


def _sink_task(runs: Runs) -> list[str]:
    if not having(runs, "non_trigger_first_token_mass"):
        return []
    first = _each(runs, "non_trigger_first_token_mass_max", percent)
    texts = [
        "Rows without a trigger have nothing to look for; the head that relies most on the first token gives it "
        f"{first} of such a row."
    ]
    if having(runs, "non_trigger_null_mass"):
        texts.append(f"Of such rows the null takes, over all heads, {_each(runs, 'non_trigger_null_mass', percent)}.")
    return texts


def _depth(runs: Runs) -> list[str]:
    texts = []
    if having(runs, "depth_embedding_weight"):
        texts.append(
            f"Depth routers give the embedding a mean weight of {_each(runs, 'depth_embedding_weight', percent)}."
        )
    if having(runs, "depth_null_mass"):
        texts.append(f"Their own null takes {_each(runs, 'depth_null_mass', percent)}.")
    if having(runs, "beta"):
        texts.append(f"The coupling beta, which training starts at 0.00672, is {_each(runs, 'beta')}.")
    return texts
