"""The variants of our Mosaic GPU kernels that benchmarks/first_light.py times, compiled for an H100 that is not
there. Each compile is this file run as a script.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from _first_light.variants import CASES, VARIANTS, as_variant, replaced  # noqa: E402


@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=[variant.name for variant in VARIANTS])
def test_compiles(number):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    command = [sys.executable, __file__, str(number)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    if missing := re.search(r"^missing: (.*)$", run.stdout, re.MULTILINE):
        pytest.skip(missing.group(1))
    assert run.stdout.splitlines()[-1].startswith("compiled to "), run.stdout[-3000:]


def main(number: int):
    import jax
    from gpu_compiler import compile_for, missing

    if reason := missing() or ("jax is older than 0.11.2" if jax.__version_info__ < (0, 11, 2) else ""):
        print(f"missing: {reason}")
        return
    variant = VARIANTS[number]
    with replaced(variant):
        pass  # there is such a constant
    text = compile_for("H100", as_variant(variant), *CASES[variant.case].arrays)
    kernels = re.findall(r'custom_call_target="mosaic_gpu.*?op_name="[^"]*/((?:null_attention|depth_route)_\w+)/', text)
    assert kernels, text[:3000]
    print(f"compiled to {', '.join(kernels)}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
