"""Both operators under jit with sharded inputs give what they give on one device; eight virtual CPU devices, in a
process of their own.
"""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from programs import UNOPTIMIZED, on_devices

import pallas_kernels
from pallas_kernels import OperatorSharding, depth_route, null_attention, unzigzag, zigzag

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels import depth_route, null_attention

assert jax.device_count() == 8
mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 3)
random = np.random.default_rng(0)
normal = lambda *shape: random.normal(size=shape).astype(np.float32)
put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))

def check(loss, arguments, specs):
    step = jax.jit(jax.value_and_grad(loss, tuple(range(len(arguments)))))
    sharded = [jax.tree.map(lambda x: put(x, *spec), argument) for argument, spec in zip(arguments, specs)]
    for one, many in zip(jax.tree.leaves(step(*arguments)), jax.tree.leaves(step(*sharded))):
        np.testing.assert_allclose(many, one, rtol=0, atol=3e-6 * np.abs(one).max())
    return jax.tree.leaves(step(*sharded))

def attend(query, key, value, b):
    output, null_mass, lse = null_attention(query, key, value, null_logit=b, window=50)
    return (output ** 2).sum() + (null_mass * lse).sum()

arguments = normal(4, 70, 6, 10), normal(4, 70, 2, 10), normal(4, 70, 2, 10), normal(6)
heads = ("data", None, "tensor")
gradients = check(attend, arguments, [heads, heads, heads, ("tensor",)])
assert gradients[1].sharding.is_equivalent_to(NamedSharding(mesh, P(*heads)), 4), gradients[1].sharding
check(attend, arguments, [("data", "sequence", "tensor")] + [heads] * 2 + [()])

def route(sources, query, evidence):
    options = dict(key_norm_scale=jnp.ones(10), null_evidence=evidence, coupling=0.7)
    output, weights, null_mass = depth_route(sources, query, **options)
    return (output ** 2).sum() + (weights ** 2).sum() + null_mass.sum()

tokens = ("data", "sequence")
for query, spec in ((normal(10), ()), (normal(4, 6, 10), tokens)):
    arguments = [normal(4, 6, 10) for _ in range(5)], query, [abs(normal(4, 6)) for _ in range(5)]
    check(route, arguments, [tokens, spec, tokens])
    check(route, arguments, [(*tokens, "tensor"), (*spec, "tensor"), tokens])

    def route_in_shards(*arguments):
        axes = [P(*tokens), P(*spec), P(*tokens)]
        each = lambda s, q, e: depth_route(s, q, key_norm_scale=jnp.ones(10), null_evidence=e, coupling=0.7)
        mapped = jax.shard_map(each, mesh=mesh, in_specs=tuple(axes), out_specs=P(*tokens))
        output, weights, null_mass = mapped(*arguments)
        return (output ** 2).sum() + (weights ** 2).sum() + null_mass.sum()

    whole, shards = (jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*arguments) for loss in (route, route_in_shards))
    for one, many in zip(jax.tree.leaves(whole), jax.tree.leaves(shards)):
        np.testing.assert_allclose(many, one, rtol=0, atol=3e-6 * np.abs(one).max())
print("equal")
"""


def on_eight_devices(*arguments, flags="") -> str:
    """What a program prints that compares in itself: "equal" at its end, where nothing it asserts was wrong."""
    environment = on_devices(8, flags)
    run = subprocess.run(
        [sys.executable, "-W", "error", *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_sharded_inputs_give_the_results_of_one_device():
    assert on_eight_devices("-c", PROGRAM) == "equal"


@pytest.mark.parametrize("part", [pytest.param("attention", marks=pytest.mark.slow), "routing", "shard_map"])
def test_a_sharding_gives_the_results_of_one_device(part):
    assert on_eight_devices(pathlib.Path(__file__).parent / "ring_program.py", part, flags=UNOPTIMIZED) == "equal"


def test_zigzag_gives_every_device_an_early_and_a_late_part_and_is_undone():
    x = np.arange(24).reshape(1, 12, 2)
    assert zigzag(x, 3)[0, :, 0].tolist() == [0, 2, 20, 22, 4, 6, 16, 18, 8, 10, 12, 14]
    assert unzigzag(zigzag(x, 3), 3).tolist() == x.tolist() and zigzag(x.T, 2, axis=-2).shape == (2, 12, 1)
    with pytest.raises(
        ValueError, match="x: its length along axis 1 must be a multiple of 10 for 5 shards, got \\(1, 12, 2\\)"
    ):
        zigzag(x, 5)


MESH = AbstractMesh((2, 3, 4), ("data", "tensor", "sequence"))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batch="dat"), "the mesh has no axis 'dat'; there are: data, tensor, sequence"),
        (dict(batch=("data", "tensor"), heads="tensor"), "mesh axis 'tensor' is named more than once"),
        (dict(batch="data", sequence=("data", "sequence")), "mesh axis 'data' is named more than once"),
        (
            dict(sequence=("data", "sequence"), layout="zigzag"),
            "layout='zigzag' .* over one axis .*, got \\('data', 'sequence'\\)",
        ),
        (dict(sequence="sequence", layout="zig"), "layout must be one of contiguous, zigzag, got 'zig'"),
        (dict(layout="zigzag"), "layout='zigzag' .* needs sequence=, got None"),
    ],
)
def test_a_sharding_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=f"^sharding: {message}"):
        OperatorSharding(MESH, **options)


@pytest.mark.parametrize(
    "message, shapes, sharding, options",
    [
        (
            "query: sharding splits batch over data=2: must be a multiple of 2, got 3",
            (3, 8, 8, 3, 3),
            dict(batch="data"),
            {},
        ),
        (
            "query: sharding splits heads over tensor=3: must be a multiple of 3, got 4",
            (2, 8, 8, 4, 2),
            dict(heads="tensor"),
            {},
        ),
        ("key: sharding splits heads 3 ways: .*got shape", (2, 8, 8, 6, 2), dict(heads="tensor"), {}),
        (
            "query: sharding splits sequence over sequence=4: must be a multiple of 4, got 6",
            (2, 6, 6, 3, 3),
            dict(sequence="sequence"),
            {},
        ),
        (
            "query: .*in two parts each .layout zigzag.: must be a multiple of 8, got 12",
            (2, 12, 12, 3, 3),
            dict(sequence="sequence", layout="zigzag"),
            {},
        ),
        (
            "key: over a sequence axis causal attention needs as many keys as queries .8., got",
            (2, 8, 16, 3, 3),
            dict(sequence="sequence"),
            {},
        ),
        (
            "window: needs layout='contiguous'",
            (2, 8, 8, 3, 3),
            dict(sequence="sequence", layout="zigzag"),
            dict(window=3),
        ),
    ],
)
def test_attention_that_cannot_be_split(message, shapes, sharding, options):
    batch, length, keys, heads, key_heads = shapes
    query, key = jnp.ones((batch, length, heads, 4)), jnp.ones((batch, keys, key_heads, 4))
    with pytest.raises(ValueError, match=f"^{message}"):
        null_attention(query, key, key, sharding=OperatorSharding(MESH, **sharding), **options)
    with pytest.raises(
        ValueError, match=r"^sharding: attention passes keys around one mesh axis, got sequence=\('data', 'sequence'\)"
    ):
        null_attention(query, key, key, sharding=OperatorSharding(MESH, sequence=("data", "sequence")))
    with pytest.raises(ValueError, match=r"^sharding: must be None or a pallas_kernels.OperatorSharding, got str"):
        null_attention(query, key, key, sharding="data")


def test_routing_that_cannot_be_split():
    with pytest.raises(
        ValueError, match=r"^sources: sharding splits sequence over sequence=4: must be a multiple of 4, got 6 in shape"
    ):
        depth_route(jnp.ones((3, 2, 6, 5)), jnp.ones(5), sharding=OperatorSharding(MESH, sequence="sequence"))


def test_explain_takes_a_sharding_and_looks_at_its_devices():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((2,), ("data",), abstract_device=device, axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.ShapeDtypeStruct((2, 8, 3, 4), jnp.float32)
    explanation = pallas_kernels.explain("null_attention", x, x, x, sharding=OperatorSharding(mesh, batch="data"))
    assert explanation.device == ("gpu", "NVIDIA H100 80GB HBM3") and explanation.reasons["xla"] == ""


def test_a_mesh_in_the_context_leaves_the_routers_kernels_to_a_call_with_a_sharding():
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((2,), ("data",), abstract_device=device, axis_types=(jax.sharding.AxisType.Auto,))
    sources, query = [jax.ShapeDtypeStruct((2, 128, 256), jnp.bfloat16)] * 3, jax.ShapeDtypeStruct((256,), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        alone = pallas_kernels.explain("depth_route", sources, query)
        split = pallas_kernels.explain("depth_route", sources, query, sharding=OperatorSharding(mesh, batch="data"))
    assert "XLA cannot partition it over the mesh axes data" in alone.reasons["mosaic_tpu"]
    assert split.reasons["mosaic_tpu"] == ""
