"""Kernels for GPUs and TPUs lower under JAX's stricter modes: numpy_rank_promotion="raise" and JAX_ENABLE_X64."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import depth_route, null_attention

pytestmark = pytest.mark.aot

HOPPER = ("cuda", AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"))
TPU = ("tpu", AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu"))
DEVICES = dict(cudnn=HOPPER, mosaic_gpu=HOPPER, mosaic_tpu=TPU)
MODES = dict(rank_promotion=lambda: jax.numpy_rank_promotion("raise"), x64=lambda: jax.enable_x64(True))

shape = jax.ShapeDtypeStruct


def attention(backend: str, queries: int, segmented: bool):
    """Gradients of a loss and its arguments; with segments also a soft cap and nulls per query."""
    arrays = [shape((2, n, heads, 64), jnp.bfloat16) for n, heads in ((queries, 4), (512, 2), (512, 2))]
    null = dict(null_logit=shape((2, queries, 4) if segmented else (4,), jnp.float32))
    if segmented:
        null |= {name: shape((3, 2, 64), jnp.bfloat16) for name in ("null_key", "null_value")}
    ids = tuple(shape((2, n), jnp.int32) for n in (queries, 512)) if segmented else None

    def loss(query, key, value, null, ids):
        result = null_attention(
            query, key, value, **null, segment_ids=ids, implementation=backend, is_causal=backend != "cudnn",
            logit_softcap=3.0 if segmented else None,
        )  # fmt: skip
        return result.output.astype(jnp.float32).sum() + (result.null_mass * result.lse).sum()

    return jax.grad(loss, (0, 1, 2, 3)), (*arrays, null, ids)


def routing(backend: str, as_list: bool):
    sources = [shape((2, 128, 256), jnp.bfloat16)] * 3 if as_list else shape((3, 2, 128, 256), jnp.bfloat16)
    query = shape((256,) if as_list else (2, 128, 256), jnp.bfloat16)

    def loss(sources, query, gain, evidence, bias, live):
        result = depth_route(
            sources, query, key_norm_scale=gain, null_evidence=evidence, coupling=0.5, bias=bias, num_sources=live,
            implementation=backend,
        )  # fmt: skip
        return result.output.astype(jnp.float32).sum() + (result.weights**2).sum() + result.null_mass.sum()

    rest = shape((256,), jnp.float32), shape((3, 2, 128), jnp.float32), shape((3,), jnp.float32), shape((), jnp.int32)
    return jax.grad(loss, (0, 1)), (sources, query, *rest)


CALLS = {
    "attention": lambda backend: attention(backend, 256 if backend != "cudnn" else 512, False),
    "attention with segments and nulls": lambda backend: attention(backend, 256, True),
    "decoding": lambda backend: attention(backend, 3, True),
    "routing over a list": lambda backend: routing(backend, True),
    "routing over an array": lambda backend: routing(backend, False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "backend, call",
    [("cudnn", "attention"), *((name, call) for name in ("mosaic_gpu", "mosaic_tpu") for call in CALLS)],
)
def test_kernels_lower(backend, call, mode):
    if backend == "mosaic_gpu" and jax.__version_info__ < (0, 11, 2):
        pytest.skip(f"the kernels need jax 0.11.2 or newer, this is jax {jax.__version__}")
    platform, device = DEVICES[backend]
    function, arguments = CALLS[call](backend)
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), MODES[mode]():
        jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
