"""Linen twins: same parameters, same outputs, same gradients as NNX; and flax's own bridge still works."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from sampling import sampled

from oasis_jax import (
    PRESETS,
    AttentionConfig,
    Context,
    Decoder,
    ModelConfig,
    NormConfig,
    Placement,
    RouterConfig,
    linen,
)
from oasis_jax.config import LayerPattern

SMALL = dict(width=24, num_heads=3, num_layers=2, vocab_size=29)
INPUTS = jax.random.randint(jax.random.key(0), (2, 9), 0, 29)


@pytest.mark.parametrize(
    "options",
    [
        dict(preset="residual", tied_head=False),
        dict(preset="oasis", qk_norm=True, num_kv_heads=1, remat="layer"),
        dict(preset="oasis_blocks", blocks=3, norm="gatednorm"),
        pytest.param(dict(preset="attnres_qkv", blocks=3), marks=pytest.mark.slow),
        pytest.param(dict(preset="attnres", depth_normalizer="uniform"), marks=pytest.mark.slow),
        pytest.param(dict(preset="learned_sink", norm="none", gate="per_head"), marks=pytest.mark.slow),
        pytest.param(dict(preset="clipped", norm="dyt"), marks=pytest.mark.slow),
        pytest.param(dict(preset="residual", gate="affine"), marks=pytest.mark.slow),
        dict(
            preset="null_key_value", norm="layernorm", qkv_bias=True, output_bias=True, mlp_bias=True, mlp_gated=False,
            mlp_activation="gelu", learned_positions=9, rope_fraction=0.5, layer_pattern=(LayerPattern(window=2),) * 2,
        ),
    ],
    ids=lambda o: o["preset"],
)  # fmt: skip
def test_decoder_outputs_and_gradients_agree(options):
    config = ModelConfig(**SMALL, **options)
    graphdef, state = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    module = linen.Decoder(config)
    params = linen.params_from_nnx(nnx.to_pure_dict(state))
    initial = jax.eval_shape(module.init, jax.random.key(1), INPUTS)["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(nn.unbox(initial), params)

    def nnx_loss(state):
        logits, statistics = nnx.merge(graphdef, state)(INPUTS)
        return (logits**2).mean() + statistics.attention[1].null_mass.sum()

    def linen_loss(params):
        logits, statistics = module.apply({"params": params}, INPUTS)
        return (logits**2).mean() + statistics.attention[1].null_mass.sum()

    expected, expected_gradient = jax.jit(jax.value_and_grad(nnx_loss))(state)
    value, gradient = jax.jit(jax.value_and_grad(linen_loss))(params)
    chex.assert_trees_all_close(value, expected, rtol=1e-6)
    chex.assert_trees_all_close(
        gradient, linen.params_from_nnx(nnx.to_pure_dict(expected_gradient)), rtol=1e-5, atol=1e-6
    )


def test_parameters_carry_their_logical_axes():
    """As Flax reads them; with a placement's rules they lie where the NNX parameters do."""
    config = ModelConfig(preset="oasis", qkv_bias=True, **SMALL)
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    initial = jax.eval_shape(linen.Decoder(config).init, jax.random.key(1), INPUTS)["params"]
    specs = nn.get_partition_spec(initial)
    for path, parameter in nnx.to_flat_state(nnx.state(decoder)):
        names = re.sub(r"\.(\d+)", r"_\1", ".".join(map(str, path))).split(".")
        spec = functools.reduce(lambda tree, name: tree[name], names, specs)
        assert tuple(spec) == parameter.get_metadata("axes"), path
    mesh = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    rules = (("heads", ("tensor",)), ("mlp", ("tensor",)), ("embed", ("fsdp",)))
    placed = nn.logical_to_mesh(specs, rules)
    kernel = placed["layers_1"]["attention"]["output"]
    assert kernel == PartitionSpec(("tensor",), None, ("fsdp",))
    assert NamedSharding(mesh, kernel).is_equivalent_to(
        NamedSharding(mesh, Placement(mesh, rules).spec(("heads", None, "embed"))), 3
    )


def test_parameters_survive_the_round_trip():
    pure = Decoder(ModelConfig(preset="oasis", **SMALL), rngs=nnx.Rngs(0)).parameters()
    chex.assert_trees_all_equal(linen.params_to_nnx(linen.params_from_nnx(pure)), pure)
    module = linen.Decoder(ModelConfig(preset="oasis", **SMALL))
    initial = jax.eval_shape(module.init, jax.random.key(1), INPUTS)["params"]  # with logical axes
    chex.assert_trees_all_equal_shapes_and_dtypes(linen.params_to_nnx(initial), pure)


@pytest.mark.parametrize(
    "preset",
    sampled(PRESETS, ("oasis", "null_key")),
)
def test_a_context_is_honoured_alike(preset):
    config = ModelConfig(preset=preset, **(SMALL | dict(num_layers=4)))
    decoder, module = Decoder(config, rngs=nnx.Rngs(0)), linen.Decoder(config)
    context = Context(
        positions=jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4], [5, 6, 7, 0, 1, 2, 3, 4, 9]]),
        segment_ids=jnp.asarray([[0] * 4 + [1] * 5, [2] * 3 + [4] * 6]),
    )
    params = linen.params_from_nnx(decoder.parameters())
    outputs, statistics = jax.jit(lambda params: module.apply({"params": params}, INPUTS, context))(params)
    expected, expected_statistics = nnx.jit(lambda decoder: decoder(INPUTS, context))(decoder)
    chex.assert_trees_all_close(outputs, expected, atol=1e-6)
    chex.assert_trees_all_close(statistics, expected_statistics, atol=1e-5)
    plain, _ = nnx.jit(lambda decoder: decoder(INPUTS))(decoder)
    assert float(jnp.abs(plain - expected).max()) > 1e-3


def test_parts_have_the_parameters_of_their_nnx_twins():
    x = jnp.ones((2, 5, 24))
    sources, evidence = [x, 2 * x, 3 * x], [jnp.zeros((2, 5))] * 3
    norm = linen.Norm(NormConfig(norm="gatednorm"), 24).init(jax.random.key(0), x)["params"]
    assert norm.keys() == {"scale", "gate_down", "gate_up"}
    router = linen.Router(RouterConfig(width=24)).init(jax.random.key(0), sources, evidence)["params"]
    assert router.keys() == {"query", "key", "recency_bias", "beta_raw"}


def test_the_bridge_of_flax_still_wraps_the_linen_attention():
    x = jnp.ones((2, 5, 24))
    module = linen.Attention(AttentionConfig(width=24, num_heads=3))
    with nnx.use_eager_sharding(False):  # parameters with logical axes, and no mesh
        wrapped = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(x)
    output, statistics = wrapped(x)
    chex.assert_shape(output, (2, 5, 24))
    chex.assert_tree_all_finite(statistics.null_mass)
