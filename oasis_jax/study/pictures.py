"""Pictures of a study: every seed of every method, arm beside arm."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from oasis_jax.evaluation.report.figures import Ink, Panel, Picture, color, plain
from oasis_jax.study.design import Outcome, Study
from oasis_jax.study.records import Record
from oasis_jax.study.results import Results, Row

_INCHES_A_METHOD = 0.24


def pictures(study: Study, found: Results, records: Sequence[Record]) -> list[Picture]:
    """One picture an outcome, one panel an arm."""
    drawn = []
    for outcome in study.outcomes:
        panels = []
        for arm in study.arms:
            rows = [row for row in found.rows if row.arm == arm and outcome.value in row.means]
            if rows:
                panels.append(_panel(study, arm, outcome, rows, records))
        caption = "Small: seeds. Large: their mean with its 95 % interval. Band: the baseline's noise floor."
        name = "outcome_" + outcome.value.replace(".", "_").replace("+", "_")
        drawn.append(Picture(name, outcome.title, caption, panels))
    return [picture for picture in drawn if picture.panels]


def _panel(study: Study, arm: str, outcome: Outcome, rows: Sequence[Row], records: Sequence[Record]) -> Panel:
    seeds = {
        row.method: [
            record["values"][outcome.value]
            for record in records
            if (record["arm"], record["method"]) == (arm, row.method) and outcome.value in record["values"]
        ]
        for row in rows
    }

    def draw(axes: Axes, ink: Ink) -> None:
        everything = [value for values in seeds.values() for value in values]
        if outcome.relative and min(everything) > 0 and max(everything) > 30 * min(everything):
            axes.set_xscale("log")
        base = seeds.get(study.baseline, [])
        if len(base) > 1:
            middle = sum(base) / len(base)
            spread = (sum((x - middle) ** 2 for x in base) / (len(base) - 1)) ** 0.5
            axes.axvspan(middle - spread, middle + spread, color=ink.grid, alpha=0.6, linewidth=0)
        for place, row in enumerate(rows):
            shade = color(0 if row.method == study.baseline else 1)
            value = row.means[outcome.value]
            axes.plot(seeds[row.method], [place] * len(seeds[row.method]), ".", color=shade, alpha=0.45, markersize=4)
            if value.interval:
                axes.plot(value.interval, [place, place], color=shade, linewidth=1.4)
            axes.plot([value.value], [place], "o", color=shade, markersize=5)
        axes.set_yticks(range(len(rows)), [row.method for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        plain(axes, ink, grid=False)
        axes.grid(axis="x", color=ink.grid, linewidth=0.7)

    return Panel(arm, 0.6 + _INCHES_A_METHOD * len(rows), draw)
