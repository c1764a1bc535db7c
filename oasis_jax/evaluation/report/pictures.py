"""Which pictures a report has, made from measured runs. Colour scales are shared by all runs, colours by all
pictures.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from oasis_jax.evaluation.report.comparison import MeasuredRun, change_text, nats_text
from oasis_jax.evaluation.report.figures import (
    Panel,
    Picture,
    bars,
    curves,
    heat_map,
    histograms,
    strip_map,
)
from oasis_jax.evaluation.report.token_figures import token_grid, token_map

Runs = Sequence[MeasuredRun]

_MOST_POINTS = 150  # of a training curve; more are averaged in windows
_TAPS = {"attention_output": "attention outputs", "mlp_output": "MLP outputs", "layer_output": "layer outputs"}


def pictures(runs: Runs, failed: Callable[[str, Exception], None]) -> list[Picture]:
    """All pictures that apply to at least one of the runs; `failed` hears of those that cannot be made: numbers of a
    broken model can be anything.
    """
    found: list[Picture] = []
    for name, make in _MAKERS.items():
        try:
            made = make(runs)
        except Exception as error:
            failed(name, error)
            continue
        found += [made] if isinstance(made, Picture) else made
    return [picture for picture in found if picture.panels]


_SINK_CAPTION = (
    "Mean over queries and held-out sequences, in percent of a query's attention. Above 30 a head counts as a sink."
)
_NULL_CAPTION = (
    "Mean over queries and held-out sequences, in percent of a query's attention: what a head sends to no token at all."
)
_NORM_CAPTION = "max |x| of a sequence, mean over held-out sequences."
_KURTOSIS_CAPTION = "Mean over held-out sequences; 3 is a normal distribution, more means heavier tails."


def _having(runs: Runs, name: str) -> list[tuple[int, MeasuredRun]]:
    return [(index, run) for index, run in enumerate(runs) if run.metrics[name] is not None]


def _top(tables: Sequence[Sequence[Sequence[float | None]]]) -> float:
    """The end of a shared scale: the largest share, rounded up to a twentieth."""
    largest = max((value for table in tables for row in table for value in row if value is not None), default=0.0)
    return min(1.0, max(math.ceil(20 * largest - 1e-9), 1) / 20)


def _one_head(runs: Runs) -> Picture:
    """Token by token, with the null as a column of its own."""
    shown = [run for run in runs if run.view and run.view.get("head")]
    panels = []
    for run in shown:
        head, tokens = run.view["head"], run.view["tokens"]
        table = np.array(head["rows"], float)
        table = np.insert(table, table.shape[1] - 1, np.nan, axis=1)  # a gap before the null
        text = tokens["text"][: len(table)] if tokens else None
        title = f"{run.label}: layer {head['layer']}, head {head['head']}"
        panels.append(token_map(title, table, text))
    caption = (
        "The start of the first held-out sequence: rows are queries, columns keys, in percent of a query's attention. "
        "Of each model the head that rests most on the first token. The column apart on the right is the null."
    )
    return Picture("one_head", "One head, token by token", caption, panels, scale=(0.0, 1.0, "% of attention"))


def _nearly_largest(values: Iterable[float | None]) -> float | None:
    """The largest but for the two largest per cent; None where nothing is finite."""
    numbers = [value for value in values if value is not None]
    return float(np.quantile(numbers, 0.98)) if numbers else None


def _numbers(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def _by_head(runs: Runs, name: str, file: str, title: str, caption: str) -> Picture:
    having = _having(runs, name)
    top = _top([run.metrics[name] for _, run in having]) if having else 1.0
    panels = []
    for _, run in having:
        table = run.metrics[name]
        rows, columns = _numbers(len(table)), _numbers(len(table[0]))
        panels.append(heat_map(run.label, table, top, rows=rows, columns=columns, across="head", down="layer"))
    return Picture(file, title, caption, panels, scale=(0.0, top, "% of attention"))


def _by_position(runs: Runs) -> Picture:
    name = "null_mass_by_position"
    having = _having(runs, name)
    # The first queries have few keys and the null takes much of them; a scale up to their values would hide all others.
    top = _top([[[_nearly_largest(itertools.chain(*run.metrics[name]))]] for _, run in having]) if having else 1.0
    panels = []
    for _, run in having:
        table = run.metrics[name]
        rows = _numbers(len(table))
        panels.append(
            strip_map(run.label, table, top, rows=rows, across="position of the query in the sequence", down="layer")
        )
    caption = "Mean over heads and held-out sequences, in percent of a query's attention, for every position."
    return Picture(
        name, "Attention on the null, by layer and position", caption, panels, (0.0, top, "% of attention, or more")
    )


def _short(name: str) -> str:
    """ "layer0.attention" -> "0 attn", "own mlp" -> "own mlp"."""
    return (
        name.removeprefix("layer").replace(".attention", " attn").replace(".mlp", " mlp").replace("attention", "attn")
    )


def _depth(runs: Runs) -> Picture:
    having = _having(runs, "depth_weights")
    panels = []
    for _, run in having:
        routers = [_short(name) for name in run.metrics["depth_routers"]]
        columns = [
            "layer " + name.removeprefix("layer") if name.removeprefix("layer").isdigit() else _short(name)
            for name in run.metrics["depth_sources"]
        ]
        panels.append(
            heat_map(
                run.label,
                run.metrics["depth_weights"],
                1.0,
                rows=routers,
                columns=columns,
                across="source",
                down="router",
            )
        )
    caption = (
        "Mean weight over tokens, in percent. A row is the router after (delta wiring: before) a sublayer; empty "
        "cells are sources it does not "
        "read. A row adds up to 100 less what goes to the depth null."
    )
    return Picture("depth_weights", "Depth weights, router by source", caption, panels, scale=(0.0, 1.0, "% of weight"))


def _legend(runs: Runs) -> dict[str, int]:
    return {run.label: index for index, run in enumerate(runs)}


def _per_layer(runs: Runs, name: str, file: str, title: str, unit: str, caption: str) -> Picture:
    panels = []
    for kind, words in _TAPS.items():
        values = {
            i: np.array(run.metrics[name][kind], float) for i, run in _having(runs, name)
        }  # None, not finite, becomes NaN
        lines = {i: (range(len(y)), y) for i, y in values.items() if np.isfinite(y).any()}
        if lines:
            panels.append(curves(words, lines, across="layer", along=unit, marks=True, linear=False))
    return Picture(file, title, caption, panels, legend=_legend(runs))


def _histograms(runs: Runs) -> Picture:
    panels = []
    viewed = {index: run.view for index, run in enumerate(runs) if run.view}
    for kind, words in _TAPS.items() if viewed else ():
        shares = {index: view["histograms"][kind] for index, view in viewed.items()}
        panels.append(
            histograms(words, shares, next(iter(viewed.values()))["edges"], across="|x| / root mean square (log scale)")
        )
    caption = (
        "Share of the values of one held-out batch by size, over layers; each tensor in units of its own "
        "root mean square. Outliers are the tail on the right."
    )
    return Picture("histograms", "How large activations are", caption, panels, legend=_legend(runs))


def token_scale(runs: Runs, name: str) -> float:
    """The end of the colour scale of a token view, shared by all runs: the largest value but for the two largest per
    cent.
    """
    values = [run.view["tokens"][name] for run in runs if run.view and run.view["tokens"] and run.view["tokens"][name]]
    return _top([[[_nearly_largest(row)]] for row in values]) if values else 1.0


TOKEN_VIEWS = {
    "received": ("Attention each token receives", "mean over the queries that see it, layers and heads"),
    "null": ("Attention each token sends to the null", "mean over layers and heads"),
}
_GRID_COLUMNS = 32


def _tokens(runs: Runs) -> list[Picture]:
    """The token views as files; the page shows the same over running text."""
    found = []
    for name, (title, average) in TOKEN_VIEWS.items():
        top, panels = token_scale(runs, name), []
        for run in runs:
            tokens = run.view and run.view["tokens"]
            if tokens and tokens[name]:
                text = [token.replace("\n", "\u21b5") for token in tokens["text"]]
                panels.append(token_grid(run.label, text, tokens[name], top, columns=_GRID_COLUMNS))
        caption = f"The first held-out sequence; {average}."
        found.append(
            Picture(f"tokens_{name}", title, caption, panels, (0.0, top, "% of attention, or more"), on_page=False)
        )
    return found


def schemes(runs: Runs) -> list[str]:
    """The quantization schemes of the runs, in the order asked for."""
    return list(dict.fromkeys(name for run in runs for name in run.quantization))


def _quantization(runs: Runs) -> Picture:
    names, values = schemes(runs), {}
    for index, run in enumerate(runs):
        if run.quantization:
            values[index] = [_bar(run.quantization[name]) for name in names]
    panels = (
        [bars("change from float", values, names, across="%", form=lambda value: change_text(value / 100))]
        if values
        else []
    )
    units = {"squared error" if run.tokenizer is None else "perplexity" for run in runs}
    caption = (
        f"Change in {' or '.join(sorted(units))} from float, in per cent; lines are 95 % intervals of the change, "
        "over held-out sequences. "
        "What is rounded is listed below."
    )
    return Picture("quantization", "What quantization costs", caption, panels, legend=_legend(runs))


def _sink_damage(runs: Runs) -> Picture:
    """D_sink: what of a scheme's damage the sink's own position carries."""
    names = [name for name in schemes(runs) if any("d_sink" in run.quantization.get(name, {}) for run in runs)]
    values = {}
    for index, run in enumerate(runs if names else ()):
        found = [run.quantization.get(name, {}) for name in names]
        if any(one.get("d_sink") is not None for one in found):
            values[index] = [
                None if one.get("d_sink") is None else (one["d_sink"], *(one["d_sink_interval"] or (None, None)))
                for one in found
            ]
    panels = [bars("D_sink", values, names, across="nats", form=nats_text)] if values else []
    caption = (
        "What a scheme adds to the loss beyond what it adds with the first token of every row kept in float, in nats; "
        "lines are 95 % intervals over held-out sequences."
    )
    return Picture("d_sink", "What the sink's position costs under quantization", caption, panels, legend=_legend(runs))


def _bar(found: dict) -> tuple[float, float | None, float | None] | None:
    if found["relative_change"] is None:
        return None
    low, high = found["interval"] or (None, None)
    return tuple(None if x is None else 100 * x for x in (found["relative_change"], low, high))


def _windows(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and values, averaged in windows where there are many."""
    width = -(-len(points) // _MOST_POINTS)
    parts = [np.array(points[start : start + width], float) for start in range(0, len(points), width)]
    return [part[:, 0].mean() for part in parts], [part[:, 1].mean() for part in parts]


def _series(runs: Runs, key: str, *, needs: str | None, scale: float) -> dict[int, tuple[list[float], list[float]]]:
    """One logged quantity of every run that has it and to which the metric `needs` applies."""
    lines = {}
    for index, run in enumerate(runs):
        points = [
            (line["step"], scale * line[key])
            for line in run.history
            if isinstance(line.get(key), int | float) and math.isfinite(line[key])
        ]
        if points and (needs is None or run.metrics[needs] is not None):
            lines[index] = _windows(points)
    return lines


def _training(runs: Runs) -> Picture:
    units = {"squared error" if run.tokenizer is None else "nats per token" for run in runs}
    wanted = (
        ("loss", "loss", " or ".join(sorted(units)), None),
        ("held-out loss", "eval/loss", " or ".join(sorted(units)), None),
        ("attention on the first token", "first_token_mass", "% of attention", None),
        ("attention on the null", "null_mass", "% of attention", "null_mass"),
        ("coupling beta", "beta", "beta, mean over routers", "beta"),
    )
    panels: list[Panel] = []
    for title, key, unit, needs in wanted:
        lines = _series(runs, key, needs=needs, scale=100 if "%" in unit else 1)
        if lines:
            panels.append(curves(title, lines, across="step", along=unit, marks=False, linear="loss" not in key))
    caption = (
        f"From each run's metrics.jsonl, on training batches but for the held-out loss; runs with more than "
        f"{_MOST_POINTS} logged steps are averaged in windows."
    )
    return Picture("training", "Training", caption, panels, legend=_legend(runs))


_MAKERS: Mapping[str, Callable[[Runs], Picture | list[Picture]]] = {
    "sink_mass": lambda runs: _by_head(
        runs,
        "first_token_mass_by_head",
        "sink_mass",
        "Attention on the first token, by layer and head",
        _SINK_CAPTION,
    ),
    "null_mass": lambda runs: _by_head(
        runs, "null_mass_by_head", "null_mass", "Attention on the null, by layer and head", _NULL_CAPTION
    ),
    "null_mass_by_position": _by_position,
    "one_head": _one_head,
    "tokens": _tokens,
    "depth_weights": _depth,
    "inf_norm": lambda runs: _per_layer(
        runs, "inf_norm_by_tap", "inf_norm", "Largest activation, by layer", "max |x|", _NORM_CAPTION
    ),
    "kurtosis": lambda runs: _per_layer(
        runs, "kurtosis_by_tap", "kurtosis", "Kurtosis of activations, by layer", "kurtosis", _KURTOSIS_CAPTION
    ),
    "histograms": _histograms,
    "quantization": _quantization,
    "d_sink": _sink_damage,
    "training": _training,
}
