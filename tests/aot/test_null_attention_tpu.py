"""null_attention's TPU kernels through the real compiler, for chips that are not there."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import OperatorSharding, explain, null_attention

pytestmark = pytest.mark.aot

_spec = importlib.util.spec_from_file_location("tpu_compiler", pathlib.Path(__file__).with_name("tpu_compiler.py"))
tpu_compiler = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tpu_compiler)

KERNELS = ("null_attention_forward", "null_attention_query_gradient", "null_attention_key_gradient")
# batch, queries, keys, query heads, key heads, head size
CALLS = {
    "64": dict(shape=(1, 2048, 2048, 8, 2, 64)),
    "128": dict(shape=(2, 4096, 4096, 8, 8, 128)),
    "256": dict(shape=(1, 1024, 2048, 2, 1, 256), logit_softcap=30.0),
    "80_both_directions": dict(shape=(1, 700, 900, 4, 2, 80), is_causal=False),
    "window_and_segments": dict(shape=(1, 2000, 2000, 4, 2, 128), window=700, segments=True),
    "float32": dict(shape=(1, 1000, 1000, 4, 2, 128), dtype="float32"),
    "float16": dict(shape=(1, 1024, 1024, 2, 1, 64), dtype="float16"),
    "decoding": dict(shape=(4, 1, 4096, 32, 8, 128)),
}


def arguments(mesh, shape, dtype="bfloat16", segments=False, spec=None):
    batch, length, keys, heads, key_heads, size = shape
    place = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec or P()))
    arrays = [
        place((batch, n, h, size), dtype, spec) for n, h in ((length, heads), (keys, key_heads), (keys, key_heads))
    ]
    ids = [place((batch, n), "int32", P()) for n in (length, keys)] if segments else []
    return [*arrays, place((heads,), "float32", P()), *ids]


def gradients(**options):
    def loss(query, key, value, b, *segments):
        result = null_attention(
            query, key, value, null_logit=b, segment_ids=segments or None, implementation="mosaic_tpu", **options
        )
        return (result.output.astype(jnp.float32) ** 2).sum() + (result.null_mass * result.lse).sum()

    return jax.grad(loss, (0, 1, 2, 3))


def compiled(mesh, function, arrays) -> str:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*arrays).compile().as_text()


@pytest.mark.parametrize("topology", tpu_compiler.TOPOLOGIES)
@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_compile(topology, name):
    options = dict(CALLS[name])
    mesh = tpu_compiler.tpu_mesh(topology, data=1)
    made = {key: options.pop(key) for key in ("shape", "dtype", "segments") if key in options}
    text = compiled(mesh, gradients(**options), arguments(mesh, **made))
    assert [kernel in text for kernel in KERNELS] == [True] * 3


def test_they_are_chosen_on_tpus():
    mesh = tpu_compiler.tpu_mesh("v5e:2x2", data=1)
    query, key, value, _ = arguments(mesh, (1, 256, 256, 2, 1, 64))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        explanation = explain("null_attention", query, key, value)
    assert explanation.implementation == "mosaic_tpu" and "TPU" in explanation.device.kind


def test_vmap_and_remat():
    mesh = tpu_compiler.tpu_mesh("v5e:2x2", data=1)
    arrays = [
        jax.ShapeDtypeStruct((3, *x.shape), x.dtype, sharding=x.sharding)
        for x in arguments(mesh, (1, 300, 300, 4, 2, 64))
    ]
    loss = jax.checkpoint(
        lambda *x: (null_attention(*x[:3], null_logit=x[3], implementation="mosaic_tpu").output ** 2).sum()
    )
    text = compiled(mesh, jax.vmap(jax.grad(loss, (0, 1, 2, 3))), arrays)
    assert all(kernel in text for kernel in KERNELS)


@pytest.mark.parametrize("topology", tpu_compiler.TOPOLOGIES)
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map_over_examples_and_heads(topology, check_vma):
    """The gradients of each device's part, and with JAX's check of what varies over devices also their sum outside."""
    mesh = tpu_compiler.tpu_mesh(topology, data=2, tensor=2)
    spec, statistics = P("data", None, "tensor"), P("data", "tensor")
    specs = dict(mesh=mesh, in_specs=(spec, spec, spec, P("tensor")), check_vma=check_vma)
    arrays = arguments(mesh, (4, 1024, 1024, 8, 2, 128), spec=spec)
    texts = [compiled(mesh, jax.shard_map(gradients(), out_specs=(spec, spec, spec, P("tensor")), **specs), arrays)]
    if check_vma:
        attend = lambda q, k, v, b: tuple(null_attention(q, k, v, null_logit=b, implementation="mosaic_tpu"))
        attend = jax.shard_map(attend, out_specs=(spec, statistics, statistics), **specs)
        loss = lambda *x: sum((y.astype(jnp.float32) ** 2).sum() for y in attend(*x))
        texts.append(compiled(mesh, jax.grad(loss, (0, 1, 2, 3)), arrays))
    for text in texts:
        assert all(kernel in text for kernel in KERNELS)
        assert "all-gather" not in text


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_with_a_sharding_over_heads_and_a_ring_over_the_sequence(layout):
    mesh = tpu_compiler.tpu_mesh("v5e:2x2", tensor=2, sequence=2)
    sharding = OperatorSharding(mesh, heads="tensor", sequence="sequence", layout=layout)
    arrays = arguments(mesh, (2, 2048, 2048, 8, 2, 128), spec=P(None, "sequence", "tensor"))
    text = compiled(mesh, gradients(sharding=sharding), arrays)
    assert all(kernel in text for kernel in KERNELS)
    assert "collective-permute" in text and "all-gather" not in text
