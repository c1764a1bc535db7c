"""train.py --plan with the real compilers: for TPUs and for a box of GPUs that are not there."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

from oasis_jax.training.gpu_targets import has_compiler

pytestmark = pytest.mark.aot

ROOT = pathlib.Path(__file__).parents[2]
SMALL = ("model.dtype=bfloat16", "model.num_layers=2", "model.preset=oasis_blocks", "model.blocks=2", "mesh.fsdp=4")


def plan(hardware: str, *fields: str) -> tuple[int, str]:
    """Exit code and output. A process of its own: a topology that a compiler takes badly ends the whole process."""
    command = [
        sys.executable,
        "train.py",
        "--config=configs/demo.py",
        f"--plan={hardware}",
        *(f"--set={field}" for field in fields),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, cwd=ROOT, env=environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + (done.stderr if done.returncode == 2 else "")


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; make test-aot installs it")


def test_a_small_model_fits_a_slice_of_tpus():
    needs("libtpu")
    code, text = plan("v5e:2x2", *SMALL)
    assert code == 0 and "4 devices (data=1 x fsdp=4 x sequence=1 x tensor=1)" in text and "fits in 16.00 GiB" in text
    assert re.search(r"all-gather +[\d.]+ [GM]iB   a step, \d+ times", text)
    assert re.search(r"evaluation +[\d.]+ [GM]iB   together, fits in 16.00 GiB", text)
    assert "evaluation in training" in text  # as configs/demo.py evaluates while it trains


def test_what_does_not_fit_says_by_how_much_and_what_to_change():
    needs("libtpu")
    huge = (
        "model.preset=residual",
        "model.num_layers=2",
        "model.width=4096",
        "model.num_heads=32",
        "model.dtype=bfloat16",
        "model.stack=scan",
    )
    code, text = plan("v5e:2x2", *huge, "data.sequence_length=8192", "data.batch_size=64", "mesh.fsdp=4")
    assert code == 1 and "DOES NOT FIT in 16.00 GiB" in text and "model.remat=layer" in text


def test_mistakes_are_one_line():
    needs("libtpu")
    for hardware, fields, expected in (
        ("v5e:3x7", (), "the compiler refuses this topology"),
        ("v5e:2x2", ("mesh.fsdp=3",), "4 devices are not divisible by fsdp=3"),
        ("v5e:2x2", ("model.inputs=vectors", "data.corpus=trigger"), "--plan: plans models of tokens"),
    ):
        code, text = plan(hardware, *fields)
        assert code == 2 and expected in text and text.count("\n") == 1, text


@pytest.mark.parametrize("hardware", ["h100:8", "h200:8", "b200:8"])
def test_a_box_of_gpus(hardware):
    if not has_compiler():
        pytest.skip("jax's CUDA plugin is not installed; make test-aot installs it")
    code, text = plan(hardware, *SMALL)
    assert code == 0 and "8 devices (data=2 x fsdp=4" in text and "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" in text
    assert re.search(r"(all-gather|all-reduce) +[\d.]+ [GM]iB   a step, \d+ times", text)
