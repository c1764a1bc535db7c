"""null_attention's Hopper kernels through XLA, LLVM and ptxas for real GPUs. Each compile is this file run as
a script.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot

# device; queries, keys, query heads, key heads, head size; dtype; options
CASES = [
    ("H100", (4096, 4096, 16, 8, 64), "bfloat16", {}),
    ("H100", (4096, 4096, 16, 2, 64), "float16", dict(window=1000, logit_softcap=30.0, segments=True)),
    ("H100", (4096, 4096, 16, 8, 128), "bfloat16", {}),
    ("H200", (4096, 4096, 16, 16, 128), "bfloat16", dict(window=1000, logit_softcap=30.0, segments=True)),
    ("H100", (4096, 4096, 16, 8, 256), "bfloat16", {}),
    ("H200", (1000, 4001, 16, 1, 256), "float16", dict(is_causal=False, logit_softcap=30.0, segments=True)),
    ("H200", (1001, 4001, 6, 3, 64), "bfloat16", dict(is_causal=False)),
    ("H100", (1, 8001, 16, 8, 128), "bfloat16", dict(window=4000, segments=True)),
    ("H100", (1, 8001, 16, 2, 256), "bfloat16", dict(window=4000, logit_softcap=30.0, segments=True)),
    ("H100", (128, 96, 16, 2, 192), "float16", dict(is_causal=False, logit_softcap=30.0)),
    ("H100", (70, 70, 6, 3, 64), "bfloat16", dict(vmap_and_remat=True)),
    ("H100", (4096, 4096, 16, 8, 80), "bfloat16", {}),
    ("H100", (4096, 4096, 16, 8, 96), "bfloat16", {}),
    ("H100", (1000, 4001, 16, 8, 96), "float16", dict(window=1000, logit_softcap=30.0, segments=True)),
    ("H100", (4096, 4096, 16, 8, 112), "bfloat16", dict(window=1000)),
    ("H100", (4096, 4096, 16, 8, 192), "bfloat16", {}),
    ("H100", (4096, 4096, 16, 8, 192), "float16", dict(window=1000, logit_softcap=30.0, segments=True)),
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[0]}-{'x'.join(map(str, case[1]))}-{case[2]}-{'-'.join(case[3])}"
)
def test_compiles_to_our_kernels_without_spilling_registers(case):
    printed = compile_apart(*case)
    found = set(re.findall(r'custom_call_target="mosaic_gpu.*?op_name="[^"]*/(null_attention_\w+)/', printed))
    keys = (
        {"null_attention_backward_key", "null_attention_backward_value"}
        if case[1][4] > 128
        else {"null_attention_backward_key_value"}
    )
    assert found == {"null_attention_forward", "null_attention_backward_query"} | keys, printed[:3000]
    spills = re.findall(
        r"'(\w+)_mosaic_gpu_kernel' for.*?(\d+) bytes spill stores, (\d+) bytes spill loads", printed, re.DOTALL
    )
    assert {name for name, _, _ in spills} == found
    assert all(stores == loads == "0" for _, stores, loads in spills), spills


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


def main(device, shape, dtype, options):
    import jax
    import jax.numpy as jnp
    from gpu_compiler import compile_for, missing

    from pallas_kernels import null_attention

    if reason := missing():
        print("missing:", reason)
        return
    queries, keys, heads, key_heads, size = shape
    segments, mapped = options.pop("segments", False), options.pop("vmap_and_remat", False)
    array = jax.ShapeDtypeStruct
    arrays = [array((2, n, h, size), dtype) for n, h in ((queries, heads), (keys, key_heads), (keys, key_heads))]
    ids = tuple(array((2, n), jnp.int32) for n in (queries, keys))

    def loss(query, key, value, b, ids):
        ids = ids if segments else None
        output, null_mass, lse = null_attention(
            query, key, value, null_logit=b, segment_ids=ids, implementation="mosaic_gpu", **options
        )
        return output.astype(jnp.float32).sum() + (null_mass * lse).sum()

    gradient = jax.grad(loss, (0, 1, 2, 3))
    if mapped:
        arrays = [array((3, *x.shape), x.dtype) for x in arrays]
        gradient = jax.vmap(jax.grad(jax.checkpoint(loss), (0, 1, 2, 3)), in_axes=(0, 0, 0, None, None))
    print(compile_for(device, gradient, *arrays, array((heads,), jnp.float32), ids))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
