"""What the benchmarks share: interleaved timing, facts of the machine, a table on the screen and a JSON file
beside it.
"""

import datetime
import functools
import json
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"


def measure(functions: Mapping[str, Callable], arguments: tuple, *, repetitions: int) -> dict[str, dict[str, float]]:
    """Median and least time in ms and temporary memory in MiB of each function, jitted, on equal arguments.

    The functions take turns in every repetition, so that a slow moment of the machine meets them all; compare them as
    ratios.
    """
    compiled = {name: jax.jit(function).lower(*arguments).compile() for name, function in functions.items()}
    results = interleave(
        {name: functools.partial(run, *arguments) for name, run in compiled.items()}, repetitions=repetitions
    )
    for name, run in compiled.items():
        results[name]["temporary_mib"] = run.memory_analysis().temp_size_in_bytes / 2**20
    return results


def interleave(runs: Mapping[str, Callable[[], object]], *, repetitions: int) -> dict[str, dict[str, float]]:
    """Median and least time in ms of each run, after one that is not counted; they take turns. Beside them the median
    time of this process on all cores of the host, which a busy machine disturbs less.
    """
    times, cpu = {name: [] for name in runs}, {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repetitions):
        for name, run in runs.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            times[name].append(1e3 * (time.perf_counter() - start))
            cpu[name].append(1e3 * (time.process_time() - cpu_start))
    median = lambda taken: float(np.median(taken))
    return {
        name: {"median_ms": median(taken), "least_ms": min(taken), "cpu_ms": median(cpu[name])}
        for name, taken in times.items()
    }


def peaks(*, repetitions: int) -> dict[str, float]:
    """What this machine reaches on the two plainest programs: GB/s of a copy (read and written) and TFLOP/s
    of a bf16 matmul.
    """
    cpu = jax.default_backend() == "cpu"
    elements, size = (2**24, 1024) if cpu else (2**29, 8192)
    x, a = jnp.ones(elements, jnp.bfloat16), jnp.ones((size, size), jnp.bfloat16)
    copy = measure({"": lambda x: -x}, (x,), repetitions=repetitions)[""]["median_ms"]
    matmul = measure({"": jnp.matmul}, (a, a), repetitions=repetitions)[""]["median_ms"]
    found = {"copy_gb_per_s": 4e-6 * elements / copy, "bf16_matmul_tflop_per_s": 2e-9 * size**3 / matmul}
    print(
        f"copy {found['copy_gb_per_s']:.1f} GB/s, bf16 matmul {found['bf16_matmul_tflop_per_s']:.2f} TFLOP/s",
        flush=True,
    )
    return found


def add_shares(
    results: Mapping[str, dict[str, float]], peak: Mapping[str, float], *, flop: float = 0.0, bytes_moved: float = 0.0
) -> None:
    """Adds to every row what the work at hand, done in its median time, is as a rate and as a share of the measured
    peak.
    """
    for row in results.values():
        if flop:
            row["tflop_per_s"] = 1e-9 * flop / row["median_ms"]
            row["share_of_peak"] = row["tflop_per_s"] / peak["bf16_matmul_tflop_per_s"]
        else:
            row["gb_per_s"] = 1e-6 * bytes_moved / row["median_ms"]
            row["share_of_peak"] = row["gb_per_s"] / peak["copy_gb_per_s"]


def runnable(functions: Mapping[str, Callable], arguments: tuple) -> tuple[dict[str, Callable], dict[str, str]]:
    """Those that compile here, and why the others do not: a peer may lack a shape, a memory or a device."""
    good, reasons = {}, {}
    for name, function in functions.items():
        try:
            jax.jit(function).lower(*arguments).compile()
            good[name] = function
        except Exception as error:  # whatever a peer raises is what the table says about it
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"{name}: left out, {reasons[name]}")
    return good, reasons


def show(title: str, results: Mapping[str, Mapping[str, float]], baseline: str) -> None:
    """Prints one comparison as a table; `speed` is the baseline's median time over this one's."""
    print(f"\n{title}\n{'':34s}{'median':>12s}{'speed':>9s}{'least':>12s}{'temporary':>15s}{'of peak':>9s}")
    for name, row in results.items():
        speed = results[baseline]["median_ms"] / row["median_ms"]
        text = (
            f"{name:34s}{row['median_ms']:9.2f} ms{speed:8.2f}x{row['least_ms']:9.2f} "
            f"ms{row['temporary_mib']:11.1f} MiB"
        )
        print(text + (f"{100 * row['share_of_peak']:8.1f}%" if "share_of_peak" in row else ""), flush=True)


def save(name: str, comparisons: Mapping[str, Mapping], **facts) -> None:
    """Writes results/<name>-<device>.json: the comparisons and where, when and with what they were made."""
    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = RESULTS / f"{name}-{device}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": _machine(), **facts, "comparisons": comparisons}, indent=2) + "\n")
    print(f"\nsaved {path}")


def _machine() -> dict[str, object]:
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    describe = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_at_end": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None,
    }
