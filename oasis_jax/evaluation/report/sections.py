"""Parts of the report that are neither the comparison nor a picture: text with its attention, quantization,
interventions.
"""

import re
from collections.abc import Mapping, Sequence

from matplotlib.colors import to_hex

from oasis_jax.evaluation.interventions import INTERVENTIONS, Effect
from oasis_jax.evaluation.quantization import ALWAYS_FLOAT
from oasis_jax.evaluation.report.comparison import ABSENT, MeasuredRun, change_text, interval_text, nats_text, show
from oasis_jax.evaluation.report.figures import HEAT
from oasis_jax.evaluation.report.markup import chip, escaped, html_table
from oasis_jax.evaluation.report.pictures import TOKEN_VIEWS, schemes, token_scale
from oasis_jax.evaluation.report.task_scores import task_tables

Runs = Sequence[MeasuredRun]
_LEVELS = 64  # colours of the token view
_DARK = 0.56  # share of the scale from which on text is white


def _heading(runs: Runs, run: MeasuredRun) -> str:
    return f"<h3>{chip(runs.index(run))}{escaped(run.label)}</h3>"


def _with_interval(value: str, interval: str) -> str:
    return value + (f"<small>{interval}</small>" if interval else "")


# The text


def token_views(runs: Runs) -> str:
    """The first held-out sequence of each run, every token on the colour of what it receives and of what it sends to
    the null.
    """
    shown = [run for run in runs if run.view and run.view["tokens"]]
    if not shown:
        return ""
    parts = []
    for name, (title, average) in TOKEN_VIEWS.items():
        top = token_scale(runs, name)
        key = (
            f'<div class="key"><span>0</span><span class="bar"></span><span>{100 * top:.0f} % of '
            "attention, or more</span></div>"
        )
        texts = ""
        for run in shown:
            values = run.view["tokens"][name]
            body = f'<p class="text">{_tokens(run.view["tokens"]["text"], values, top)}</p>' if values else _NO_NULL
            texts += _heading(runs, run) + body
        parts.append(
            f'<h2>{title}</h2><p class="note">The start of the first held-out sequence; {average}. ▯ is a token '
            f"without text, such as the begin token.</p>{key}{texts}"
        )
    return f"<section>{''.join(parts)}</section>\n"


_NO_NULL = '<p class="note">Not applicable: this normalizer leaves nothing to a null.</p>'


def _tokens(text: Sequence[str], values: Sequence[float | None], top: float) -> str:
    """One element a token; a line break is shown and made, a token without text is a box."""
    spans = []
    for place, (token, value) in enumerate(zip(text, values)):
        word = escaped(token).replace("\n", "↵\n") if token else "▯"
        if value is None:
            spans.append(f'<i title="token {place}: not finite">{word}</i>')
            continue
        level = min(value / top, 1.0)
        shade = to_hex(HEAT(round(level * _LEVELS) / _LEVELS))
        dark = ' class="d"' if level > _DARK else ""
        spans.append(f'<i{dark} style="background:{shade}" title="token {place}: {100 * value:.2f} %">{word}</i>')
    return "".join(spans)


# Quantization


def quantized(runs: Runs) -> str:
    """Per run every scheme beside float, and per scheme what it rounds, tensor by tensor."""
    names = schemes(runs)
    if not names:
        return ""
    having = [run for run in runs if run.quantization]
    tables = ""
    for run in having:
        kind = "squared error" if run.tokenizer is None else "perplexity"
        sinks = any("d_sink" in q for q in run.quantization.values())
        lines = [
            (
                escaped(name),
                show(q["value"]),
                _with_interval(change_text(q["relative_change"]), interval_text(q["interval"], change_text)),
                _nats(q),
                *[_d_sink(q)] * sinks,
            )
            for name, q in run.quantization.items()
        ]
        tables += _heading(runs, run) + html_table(
            (
                "scheme",
                f"{kind}, {show(next(iter(run.quantization.values()))['float'])} in float",
                "change",
                "nats over float",
                *["D_sink, nats"] * sinks,
            ),
            lines,
            left=1,
        )
    lists = "".join(_rounded(name, having) for name in names)
    floats = f"<p class='note'>Always in float: {escaped('; '.join(ALWAYS_FLOAT))}.</p>"
    return (
        "<section><h2>Quantization schemes</h2><p class='note'>The change is relative to float on the same "
        "held-out sequences; below it its 95 % interval, "
        "paired by sequence. Schemes with static ranges were calibrated on other sequences. D_sink is what a scheme "
        "adds to the loss beyond what it adds with the first token of every row in float.</p>"
        f"{tables}<details><summary>What each scheme rounds, tensor by "
        f"tensor</summary>{floats}<dl>{lists}</dl></details></section>\n"
    )


def _nats(quantized: Mapping) -> str:
    """What a scheme adds to the loss; a model that it destroyed says so."""
    if quantized.get("nats") is None:
        return ABSENT
    text = _with_interval(nats_text(quantized["nats"]), interval_text(quantized["nats_interval"], nats_text))
    return f"{text} DESTROYED" if quantized["destroyed"] else text


def _d_sink(quantized: Mapping) -> str:
    if quantized.get("d_sink") is None:
        return ABSENT
    return _with_interval(nats_text(quantized["d_sink"]), interval_text(quantized["d_sink_interval"], nats_text))


def _rounded(name: str, runs: Runs) -> str:
    """One scheme: how, and then every tensor that is treated so, by run where they differ."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for tensor, how in by_role(run.quantization[name]["tensors"]).items():
            names = found.setdefault(how, [])
            names += [tensor] if tensor not in names else []
    parts = "".join(f"<dd>{escaped(how)}: {escaped(', '.join(tensors))}.</dd>" for how, tensors in found.items())
    return f"<dt>{escaped(name)}</dt>{parts}"


def by_role(tensors: dict[str, str]) -> dict[str, str]:
    """Names with "layer*" in place of the layers' numbers, for tensors that are treated alike in every layer."""
    groups: dict[str, set[str]] = {}
    for name, how in tensors.items():
        groups.setdefault(re.sub(r"^layer\d+", "layer*", name), set()).add(how)
    alike = {role for role, ways in groups.items() if len(ways) == 1}
    roles = {name: re.sub(r"^layer\d+", "layer*", name) for name in tensors}
    return {roles[name] if roles[name] in alike else name: how for name, how in tensors.items()}


# Tasks


def task_scores(runs: Runs) -> str:
    """What tasks say of every model, in float and quantized."""
    parts = ""
    for table in task_tables(runs):
        heads = ("model", "numerics", "questions", *map(escaped, table.extractions))
        lines = [
            (
                escaped(row.model),
                escaped(row.numerics),
                str(row.questions),
                *(_with_interval(*map(escaped, row.scores[name])) for name in table.extractions),
            )
            for row in table.rows
        ]
        parts += (
            f"<h2>{escaped(table.title)}</h2><p class='note'>Below a score its interval: {escaped(table.note)}.</p>"
        )
        parts += html_table(heads, lines, left=2)
    return f"<section>{parts}</section>\n" if parts else ""


# Interventions


def interventions(runs: Runs) -> str:
    """Per run what taking something away did to the loss, beside the mean weight that was taken."""
    having = [run for run in runs if run.interventions]
    if not having:
        return ""
    used = {effect.intervention for run in having for effect in run.interventions}
    meanings = "".join(
        f"<dt>{escaped(name)}</dt><dd>{escaped(what)}.</dd>" for name, what in INTERVENTIONS.items() if name in used
    )
    heads = ("taken away", "sublayers", "depth", "mean weight", "change in loss")
    tables = "".join(
        f"{_heading(runs, run)}{html_table(heads, [_effect(effect) for effect in run.interventions], left=3)}"
        for run in having
    )
    return (
        "<section><h2>Interventions</h2><p class='note'>The change in loss, in nats per token or squared error, "
        "when something is taken from the "
        "trained model: mass is not causal importance, so it stands beside the mean weight. Below a change its 95 "
        "% interval over sequences.</p>"
        f"<details><summary>Every intervention, run by run</summary>{tables}<dl>{meanings}</dl></details></section>\n"
    )


def _effect(effect: Effect) -> tuple[str, ...]:
    name = (
        effect.intervention
        if effect.family is None
        else f"{effect.family}{', renormalized' if effect.renormalized else ''}"
    )
    change = escaped(effect.reason) if effect.reason else ABSENT if effect.change is None else f"{effect.change:+.4f}"
    change = _with_interval(change, interval_text(effect.interval, lambda x: f"{x:+.4f}"))
    return escaped(name), escaped(effect.sublayers or ""), escaped(effect.band or ""), show(effect.mean_weight), change
