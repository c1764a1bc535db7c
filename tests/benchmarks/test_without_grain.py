"""The benchmarks on a machine without grain."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import pathlib, runpy, sys
sys.modules["grain"] = None
sys.path.insert(0, "benchmarks")
for path in sorted(pathlib.Path("benchmarks").glob("[a-z]*.py")):
    sys.argv = [str(path), "--help"]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        assert not end.code, path
    print("started", path.stem)
from oasis_jax.data import train_batches
try:
    train_batches([], __import__("oasis_jax.config").config.DataConfig(), seed=0)
except ImportError as error:
    print("the pipeline says:", error)
"""


def test_all_start_and_only_the_pipeline_needs_it():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stderr[-3000:]
    started = [line.split()[1] for line in process.stdout.splitlines() if line.startswith("started ")]
    assert started == sorted(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py"))
    assert "the pipeline says: import of grain" in process.stdout
