"""SIGTERM, a scheduler's notice that the machine is about to be taken: the run saves and leaves."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Listens for SIGTERM; a context manager.

    With several processes JAX's distributed runtime listens instead, and lets all of them agree on the step after which
    they save: one notice to one of them is enough.
    """

    def __init__(self):
        self._noticed = False
        self._previous = None

    def __enter__(self) -> "Preemption":
        # Python runs signal handlers in the main thread only; fit() called in another one leaves signals to its caller.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *exception) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            if self._noticed and exception[0] is None and callable(self._previous):
                self._previous(signal.SIGTERM, None)  # it came with the last step; whoever called may have more to do

    def _notice(self, number: int, frame: object) -> None:
        self._noticed = True

    def due(self, step: int) -> bool:
        """Whether to save after this step and leave; asked once a step, by every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noticed
