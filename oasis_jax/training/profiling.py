"""A trace of some steps, for xprof and Perfetto."""

import pathlib

import jax

from oasis_jax.errors import UserError


def parse_steps(text: str) -> tuple[int, int]:
    """ "10:15" -> (10, 15): the trace covers steps 10 to 14, so the end is left out as in a Python range.

    Raises:
      UserError: it is not two rising step numbers.
    """
    first, _, last = text.partition(":")
    if not (text.isascii() and len(text) < 30 and first.isdigit() and last.isdigit() and 1 <= int(first) < int(last)):
        raise UserError(f"--profile: expected FIRST:END with 1 <= FIRST < END, such as 10:15, got {text!r}")
    return int(first), int(last)


class Profile:
    """Traces steps first .. end - 1 into workdir/profile; a context manager that ends the trace however the
    run ends.
    """

    def __init__(self, workdir: pathlib.Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._running = workdir / "profile", steps, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def step(self, step: int, pending: object) -> None:
        """Called before every step; `pending` is waited for, so that the trace holds whole steps."""
        if self._steps and step in self._steps:
            jax.block_until_ready(pending)
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._running and step == self._steps[1]:
            jax.profiler.stop_trace()
            self._running = False
