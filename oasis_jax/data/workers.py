"""Processes that share a job and do parts of it."""

import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from oasis_jax.errors import UserError

_JOB: Any = None  # of this process, where it is a worker


class Workers:
    """Calls function(job, *arguments) for many arguments, in processes of their own or, where one is asked for, here.

    Args:
      count: of processes.
      job: what all calls share; pickled once for every process.
    """

    def __init__(self, count: int, job: Any):
        self._count, self._job = count, job
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable, arguments: Sequence[tuple]) -> Iterator[tuple[int, Any]]:
        """(number of the arguments, result) in the order in which they are done.

        Raises:
          UserError: that of a call, or that a process was ended from outside.
        """
        if self._count == 1 or len(arguments) < 2:
            for number, given in enumerate(arguments):
                yield number, function(self._job, *given)
            return
        self._pool = self._pool or self._start(min(self._count, len(arguments)))
        futures = {self._pool.submit(_call, function, given): number for number, given in enumerate(arguments)}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures.pop(future), future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "a worker was ended from outside, as when memory runs out; what is finished stays, and the same "
                "command goes on, with --workers=1 in less memory"
            ) from None

    def _start(self, count: int) -> concurrent.futures.ProcessPoolExecutor:
        # Spawned: a process with threads, which JAX and tokenizers start, must not be forked.
        context = multiprocessing.get_context("spawn")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Twice as many threads as cores: at the end, those of a process that still works use the cores of the others.
        threads = min(cores, max(1, 2 * cores // count))
        return concurrent.futures.ProcessPoolExecutor(count, context, _begin, (self._job, threads))


def _begin(job: Any, threads: int) -> None:
    """In a worker, before all else."""
    global _JOB
    _JOB = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the tokenizers, before they start any
    parent = multiprocessing.parent_process()

    def leave():
        parent.join()
        os._exit(1)  # the parent was killed, and who starts it again must be the only one to write

    threading.Thread(target=leave, daemon=True).start()


def _call(function: Callable, arguments: tuple) -> Any:
    return function(_JOB, *arguments)
