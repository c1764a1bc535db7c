"""Compiling side by side, and timing in turns."""

import concurrent.futures
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

ROUNDS = 5


def compile_all(
    functions: Mapping[str, Callable], arguments: tuple
) -> tuple[dict[str, Callable], dict[str, Exception]]:
    """Runs of functions(*arguments), compiled at the same time, and what those raise that do not compile.

    Lowering is Python and goes one by one; XLA and the assemblers work in parallel.
    """
    runs, errors, lowered = {}, {}, {}
    for name, function in functions.items():
        try:
            lowered[name] = jax.jit(function).lower(*arguments)
        except Exception as error:
            errors[name] = error
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = {name: pool.submit(program.compile) for name, program in lowered.items()}
        for name, future in futures.items():
            try:
                compiled = future.result()
                runs[name] = lambda compiled=compiled: compiled(*arguments)
            except Exception as error:
                errors[name] = error
    return runs, errors


def in_turns(runs: Mapping[str, Callable[[], object]], seconds: float) -> tuple[dict[str, float], dict[str, Exception]]:
    """The median time of a call in ms, over rounds in which the runs take turns, and what those raise that do not run.

    A round queues many calls of a run, so that the host's latency is hidden. `seconds` bounds a run's share.
    """
    counts, errors, times = {}, {}, {}
    for name, run in runs.items():
        try:
            jax.block_until_ready(run())
            counts[name] = max(1, min(200, int(seconds / ROUNDS / max(_once(run, 1), 1e-6))))
            times[name] = []
        except Exception as error:
            errors[name] = error
    for _ in range(ROUNDS):
        for name, count in counts.items():
            times[name].append(1e3 * _once(runs[name], count) / count)
    return {name: float(np.median(taken)) for name, taken in times.items()}, errors


def _once(run: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        result = run()
    jax.block_until_ready(result)
    return time.perf_counter() - start


def copy_rate(toy: bool) -> float:
    """Bytes a second that a copy reads and writes on this device."""
    elements = 2**20 if toy else 2**30
    x = jnp.ones(elements, jnp.bfloat16)
    runs, _ = compile_all({"copy": lambda x: -x}, (x,))
    return 4 * elements / (1e-3 * in_turns(runs, 0.25)[0]["copy"])
