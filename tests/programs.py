"""Where programs run that tests start."""

import os
import pathlib
import subprocess
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).parents[1]
# Half of a program's time is LLVM's; what is split over devices, and how, is decided before it.
UNOPTIMIZED = "--xla_backend_optimization_level=0"


def on_devices(count: int, flags: str = "") -> dict[str, str]:
    """An environment with so many virtual CPU devices, this copy of the project, and the flags of XLA that the tests
    have themselves.
    """
    own = os.environ.get("XLA_FLAGS", "")
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{own} --xla_force_host_platform_device_count={count} {flags}".strip(),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }


def end(processes: Iterable[subprocess.Popen]) -> None:
    """Kills what a test has started and closes what it wrote to."""
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()
