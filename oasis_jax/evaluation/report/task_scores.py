"""Scores of tasks as rows of a table, for the terminal and for the page."""

from collections.abc import Sequence
from typing import NamedTuple

from oasis_jax.evaluation.report.comparison import ABSENT, MeasuredRun

Runs = Sequence[MeasuredRun]


class Score(NamedTuple):
    """One model under one kind of numerics: the score by how an answer is read."""

    model: str
    numerics: str
    questions: int
    scores: dict[str, tuple[str, str]]  # extraction -> value, interval


class TaskTable(NamedTuple):
    """One task on all models that were asked alike."""

    title: str
    extractions: list[str]
    rows: list[Score]
    note: str


def _per_cent(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(interval: Sequence[float] | None) -> str:
    return ABSENT if interval is None else f"{_per_cent(interval[0])} to {_per_cent(interval[1])}"


def task_tables(runs: Runs) -> list[TaskTable]:
    """One table a task."""
    tables = []
    for name in {name: None for run in runs for name in run.tasks}:
        rows, found = [], {}
        for run in runs:
            for numerics, found in run.tasks.get(name, {}).items():
                cells = {x: (_per_cent(y["value"]), _interval(y["interval"])) for x, y in found["scores"].items()}
                rows.append(Score(run.label, numerics, found["questions"], cells))
        first = next(iter(found["scores"].values()))
        title = f"{name}, Pass@{found['k']} in per cent ({found['prompt']}; {found['samples']} a question)"
        tables.append(TaskTable(title, list(found["scores"]), rows, first["method"]))
    return tables
