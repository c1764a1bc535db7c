"""SIGTERM, a scheduler's notice that the machine is about to be taken: the run saves and leaves."""

import concurrent.futures
import signal
import threading
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from oasis_jax.errors import Preempted

_SECONDS_BETWEEN_LOOKS = 0.2


class Preemption:
    """Listens for SIGTERM; a context manager.

    With several processes JAX's distributed runtime listens instead, and lets all of them agree on the step after which
    they save: one notice to one of them is enough.
    """

    def __init__(self):
        self._noticed = False
        self._listens = False
        self._at_once = self._compiling = False  # whether a notice ends the run where it comes, and what then goes on
        self._previous = None

    def __enter__(self) -> "Preemption":
        # Python runs signal handlers in the main thread only; fit() called in another one leaves signals to its caller.
        self._listens = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self._listens:
            self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *exception) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            if self._noticed and exception[0] is None and callable(self._previous):
                self._previous(signal.SIGTERM, None)  # it came with the last step; whoever called may have more to do

    def _notice(self, number: int, frame: object) -> None:
        self._noticed = True
        if self._at_once:
            self._leave_if_noticed()

    def due(self, step: int) -> bool:
        """Whether to save after this step and leave; asked once a step, by every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noticed

    def compiled(self, lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
        """The program of what comes before the end of the first step: to trace and compile it may take minutes.
        A single process compiles in another thread, so that Python hears of a notice.

        Raises:
          Preempted: a notice came before it was there. Nothing is lost that was not on disk.
        """
        if not self._listens:
            return lower().compile()
        outcome = concurrent.futures.Future()
        try:
            self._at_once = True
            self._leave_if_noticed()
            lowered = lower()
            threading.Thread(target=_settle, args=(outcome, lowered), daemon=True).start()
            self._compiling = True
            while not outcome.done():
                self._leave_if_noticed()
                concurrent.futures.wait([outcome], timeout=_SECONDS_BETWEEN_LOOKS)
        finally:
            self._at_once = self._compiling = False
        return outcome.result()

    def _leave_if_noticed(self) -> None:
        if self._noticed:
            raise Preempted(
                "told to end (SIGTERM) before the first step was taken: there is nothing to save; the same command "
                "starts there again",
                compiling=self._compiling,
            )


def _settle(outcome: concurrent.futures.Future, lowered: jax.stages.Lowered) -> None:
    try:
        outcome.set_result(lowered.compile())
    except BaseException as error:
        outcome.set_exception(error)
