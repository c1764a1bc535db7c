"""How far a task is: a bar with the time left on a terminal, now and then a plain line elsewhere."""

import datetime
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from oasis_jax.errors import printable

_SECONDS_BETWEEN_PLAIN_LINES = 30.0


class TaskProgress:
    """A context manager; `done(n)` after every n pieces of work."""

    def __init__(self, title: str, total: int, *, silent: bool = False):
        self._title, self._total, self._done, self._silent = title, total, 0, silent
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = TextColumn("{task.description}", markup=False), BarColumn(20), MofNCompleteColumn()
        self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
        self._bar.disable = silent or not self._console.is_terminal
        self._task = self._bar.add_task(title, total=total)
        self._start = self._said = time.monotonic()

    def __enter__(self) -> "TaskProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def done(self, count: int) -> None:
        """So many pieces more are done."""
        self._done += count
        self._bar.update(self._task, completed=self._done)
        now, plain = time.monotonic(), self._bar.disable and not self._silent
        if plain and (self._done == self._total or now - self._said > _SECONDS_BETWEEN_PLAIN_LINES):
            self._said = now
            seconds = (now - self._start) / self._done * (self._total - self._done)
            left = datetime.timedelta(seconds=round(seconds))
            text = f"{self._title}: {self._done}/{self._total}, {left} left"
            self._console.print(printable(text), markup=False)
