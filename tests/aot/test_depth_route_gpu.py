"""The depth router's Mosaic GPU kernels through XLA, LLVM and ptxas for real GPUs. Each compile is this file
run as a script.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot

# device; sources, batch, length, width; dtype; one query a token or one for all; sources in a list or in an array
STATIC, PER_TOKEN, LIST, ARRAY = False, True, True, False
CASES = [
    ("H100", (28, 2, 2048, 2048), "bfloat16", STATIC, LIST),
    ("H100", (28, 2, 2048, 2048), "bfloat16", PER_TOKEN, ARRAY),
    ("H100", (64, 2, 2048, 4096), "bfloat16", STATIC, ARRAY),
    ("H100", (64, 2, 2048, 4096), "bfloat16", PER_TOKEN, LIST),
    ("H100", (8, 2, 2048, 1024), "bfloat16", STATIC, LIST),
    ("H100", (8, 2, 2048, 1024), "bfloat16", PER_TOKEN, ARRAY),
    ("H100", (5, 2, 128, 8192), "float32", PER_TOKEN, ARRAY),
    ("H100", (5, 2, 128, 768), "float32", STATIC, LIST),
    ("H100", (5, 3, 7, 640), "float16", STATIC, ARRAY),
    ("H100", (9, 2, 2048, 576), "bfloat16", STATIC, LIST),
    ("H100", (9, 2, 2048, 960), "bfloat16", PER_TOKEN, ARRAY),
    ("H100", (9, 2, 2048, 2560), "bfloat16", PER_TOKEN, LIST),
    ("H100", (9, 2, 2048, 2880), "bfloat16", STATIC, ARRAY),
    ("H100", (5, 3, 7, 2016), "bfloat16", STATIC, LIST),
    ("H100", (9, 2, 2048, 2080), "bfloat16", PER_TOKEN, LIST),
    ("H100", (9, 2, 2048, 2976), "bfloat16", STATIC, ARRAY),
    ("H100", (5, 3, 7, 4064), "float32", PER_TOKEN, LIST),
    ("H100", (5, 3, 7, 8128), "bfloat16", STATIC, LIST),
    ("H200", (28, 2, 2048, 2048), "bfloat16", STATIC, ARRAY),
    ("H200", (64, 2, 2048, 4096), "bfloat16", PER_TOKEN, ARRAY),
    ("H200", (5, 1, 1, 8192), "bfloat16", STATIC, LIST),
]


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=lambda case: f"{case[0]}-{'x'.join(map(str, case[1]))}-{case[2]}-{'token' if case[3] else 'static'}",
)
def test_compiles_to_our_kernels_without_spilling_registers(case):
    printed = compile_apart(*case)
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", printed)]
    assert len(spilled) == 4 and not any(spilled), printed[-3000:]  # stores and loads of two kernels
    assert sorted(name for _, name in kernels(printed)) == ["depth_route_backward", "depth_route_forward"], printed[
        :3000
    ]
    count, batch, length, width = case[1]
    rows, stacked = f"[{batch * length},{width}]", f"[{count},{batch * length},{width}]"
    gradients = next(shapes for shapes, name in kernels(printed) if name == "depth_route_backward")
    as_list = case[4]
    assert (gradients.count(rows) >= count and stacked not in printed) if as_list else stacked in gradients


def test_compiles_under_vmap_and_remat():  # which the interpreter cannot: its side effects are in the way of remat
    printed = compile_apart("H100", (3, 2, 6, 1024), "bfloat16", STATIC, LIST, True)
    assert sorted(name for _, name in kernels(printed)) == ["depth_route_backward"] + ["depth_route_forward"] * 2, (
        printed[:3000]
    )


def kernels(text):
    """(the result's types, the kernel's name) of every call of a Mosaic GPU kernel in a compiled program."""
    return re.findall(
        r'= \((.*?)\) custom-call\(.*custom_call_target="mosaic_gpu.*?op_name="[^"]*/(depth_route_\w+)/', text
    )


def compile_apart(*case):
    """What `main` and ptxas print in a process of their own, the compiled program above all."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    command = [sys.executable, __file__, json.dumps(case)]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    if missing := re.search(r"^missing: (.*)$", run.stdout, re.MULTILINE):
        pytest.skip(missing.group(1))
    return run.stdout + run.stderr


def main(device, shape, dtype, per_token, as_list, vmap_and_remat=False):
    import jax
    import jax.numpy as jnp
    from gpu_compiler import compile_for, missing

    from pallas_kernels import depth_route

    if reason := missing() or ("jax is older than 0.11.2" if jax.__version_info__ < (0, 11, 2) else ""):
        print(f"missing: {reason}")
        return
    count, *rows = shape
    sources = [jax.ShapeDtypeStruct(rows, dtype)] * count if as_list else jax.ShapeDtypeStruct(shape, dtype)
    query = jax.ShapeDtypeStruct(rows if per_token else rows[-1:], jnp.float32)
    gain, live = jax.ShapeDtypeStruct(rows[-1:], jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)

    def route(sources, query, gain, live):
        # static queries with normalized keys, one query a token with plain ones: the two routers of the papers
        return depth_route(sources, query, key_norm_scale=None if per_token else gain, num_sources=live)

    def loss(*arguments):
        each = jax.vmap(jax.checkpoint(route), (0, None, None, None)) if vmap_and_remat else route
        return sum((x.astype(jnp.float32) ** 2).sum() for x in each(*arguments))

    if vmap_and_remat:
        sources = jax.tree.map(lambda x: jax.ShapeDtypeStruct((5, *x.shape), x.dtype), sources)
    print(compile_for(device, jax.grad(loss, (0, 1)), sources, query, gain, live))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
