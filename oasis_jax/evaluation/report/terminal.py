"""The comparison as a table on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from oasis_jax.errors import printable
from oasis_jax.evaluation.report.comparison import (
    ABSENT,
    MeasuredRun,
    best,
    cell,
    change_text,
    describe_data,
    groups,
    interval_text,
    method,
    nats_text,
    not_comparable,
    rows,
    show,
)
from oasis_jax.evaluation.report.task_scores import TaskTable, task_tables
from oasis_jax.evaluation.report.words import findings, summary


def _plain(text: str | None) -> str | None:
    """A text from outside: neither markup nor escapes of the terminal."""
    return text and escape(printable(text))


def table(runs: Sequence[MeasuredRun]) -> Table:
    """Runs that read the same examples, side by side; the best value bold where lower is better."""
    found = Table(
        title=_plain(describe_data(runs)),
        title_justify="left",
        title_style="bold",
        caption="↓ lower is better, the best in bold",
        caption_justify="left",
    )
    found.add_column("  measure", no_wrap=True)
    for run in runs:
        how = method(run.config)
        heading = _plain(run.label if how == run.label else f"{run.label}\n{how}")
        found.add_column(heading, justify="right", overflow="fold", min_width=9)
    for row in rows(runs):
        winners = best(row, runs)
        cells = [f"[bold]{cell(row, run)}[/bold]" if run.label in winners else cell(row, run) for run in runs]
        found.add_row(("↓ " if row.direction == "lower" else "  ") + row.title, *cells)
    return found


def interventions_table(run: MeasuredRun) -> Table:
    """What taking something away did to one run's loss."""
    found = Table(title=_plain(f"interventions on {run.label}"), title_justify="left", title_style="bold")
    for heading in ("intervention", "sublayers", "depth"):
        found.add_column(heading)
    for heading in ("mean weight", "change in loss", "95 % interval"):
        found.add_column(heading, justify="right")
    for effect in run.interventions:
        name = (
            effect.intervention
            if effect.family is None
            else f"{effect.family}{', renormalized' if effect.renormalized else ''}"
        )
        interval = f"{effect.interval[0]:+.4f} to {effect.interval[1]:+.4f}" if effect.interval else ABSENT
        change = effect.reason or f"{effect.change:+.4f}"
        found.add_row(
            name, effect.sublayers or "", effect.band or "", show(effect.mean_weight), _plain(change), interval
        )
    return found


def quantization_table(run: MeasuredRun) -> Table:
    """Every scheme of one run beside float."""
    name = "squared error" if run.tokenizer is None else "perplexity"
    plain = show(next(iter(run.quantization.values()))["float"])
    title = f"quantization of {run.label}, {name} {plain} in float"
    found = Table(title=_plain(title), title_justify="left", title_style="bold")
    found.add_column("scheme", min_width=max(map(len, run.quantization)))
    sinks = any("d_sink" in value for value in run.quantization.values())
    for heading in (name, "change", "nats over float", "95 % interval", *["D_sink"] * sinks):
        found.add_column(heading, justify="right")
    for scheme, value in run.quantization.items():
        change, interval = change_text(value["relative_change"]), interval_text(value["interval"], change_text)
        nats = ABSENT
        if value.get("nats") is not None:
            nats, interval = nats_text(value["nats"]), interval_text(value["nats_interval"], nats_text)
        if value.get("destroyed"):
            change = "DESTROYED"
        of_sink = [nats_text(value["d_sink"]) if "d_sink" in value else ABSENT] * sinks
        found.add_row(scheme, show(value["value"]), change, nats, interval, *of_sink)
    return found


def task_table(scores: TaskTable) -> Table:
    """Every model on one task, in float and quantized."""
    found = Table(title=_plain(scores.title), title_justify="left", title_style="bold", caption=_plain(scores.note))
    found.add_column("model")
    found.add_column("numerics")
    for heading in ("questions", *(x for name in scores.extractions for x in (name, "95 % interval"))):
        found.add_column(heading, justify="right")
    for row in scores.rows:
        cells = [text for name in scores.extractions for text in row.scores[name]]
        found.add_row(_plain(row.model), row.numerics, str(row.questions), *cells)
    return found


def print_comparison(runs: Sequence[MeasuredRun]) -> None:
    """One table per group of comparable runs, and below it what its numbers say."""
    console = Console(highlight=False)
    for group in groups(runs):
        console.print(table(group))
        texts = [summary(group), *(f"{topic}: {text}" for topic, text in findings(group).items())]
        console.print(printable("\n".join(texts)) + "\n", markup=False)
    for run in runs:
        if run.interventions:
            console.print(interventions_table(run))
        if run.quantization:
            console.print(quantization_table(run))
    for scores in task_tables(runs):
        console.print(task_table(scores))
    if not_comparable(runs):
        console.print(printable(not_comparable(runs)) + "\n", markup=False)
