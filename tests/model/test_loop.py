"""Layers as a loop against the executor that runs them one by one, in float64; and what the loop stores, as
the CPU's compiler says.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.exact import POSITIONS, SEGMENTS, SMALL, B, T, documents, in_float64, moved_parameters

from oasis_jax import Context, ModelConfig
from oasis_jax.config import PRESETS, LayerPattern
from oasis_jax.model.decoder import parameter_shapes
from oasis_jax.model.head import embed
from oasis_jax.model.layout import unstack_layers
from oasis_jax.model.loop import run_loop, uses_loop
from oasis_jax.model.statistics import layer_telemetry
from oasis_jax.model.unrolled import run_unrolled
from oasis_jax.placement import UNSHARDED
from oasis_jax.training.step import training_loss

# Half of the time is LLVM's, and what it leaves out changes no number.
QUICK = {"xla_backend_optimization_level": "0"}
NO_POSITIONS, SHORT, FAR = (
    LayerPattern(window=0, rope_theta=0.0),
    LayerPattern(window=2, rope_theta=50.0),
    LayerPattern(window=3, rope_theta=1e4),
)


def slow(**options):
    return pytest.param(options, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "options",
    [
        dict(preset="residual", remat="layer", residual_clip=0.9),
        dict(preset="residual", num_layers=4, layer_pattern=(SHORT, NO_POSITIONS)),
        dict(preset="attnres", norm="none", residual_clip=0.9),
        dict(preset="oasis", residual_clip=0.9, qkv_bias=True, alpha_gate=True),
        slow(preset="oasis", layer_pattern=(SHORT, NO_POSITIONS, FAR)),
        dict(preset="oasis_blocks", blocks=2, normalizer="null_key_value"),  # blocks of one layer and a half
        slow(preset="oasis_blocks", blocks=3, num_layers=2, depth_normalizer="sigmoid"),
        slow(preset="oasis", depth_normalizer="sigmoid", alpha_gate=True),
        slow(preset="oasis", fixed_beta=2.5, num_layers=2),
        dict(preset="attnres_qkv", blocks=3, num_layers=2),
        slow(preset="attnres_qkv", blocks=0, coupling=True, normalizer="softmax1", depth_normalizer="softmax1"),
        slow(preset="attnres_qkv", blocks=1, num_layers=1, depth_normalizer="sigmoid"),
        slow(preset="attnres_rms", blocks=3, num_layers=2, residual_clip=0.9),
        dict(preset="attnres_cumulative", num_layers=2, depth_normalizer="uniform"),
        slow(preset="attnres", depth_normalizer="uniform", blocks=2),
        slow(preset="oasis_blocks", blocks=4, tied_head=False),  # 2, 2, 1, 1
        dict(preset="oasis_blocks", blocks=3, num_layers=4, layer_pattern=(SHORT, NO_POSITIONS), sum_preserving=True),
        slow(preset="oasis_blocks", blocks=4, router="projected", residual_clip=0.9, window=3),
        slow(preset="residual", remat="dots", norm="layernorm", mlp_bias=True, output_bias=True),
        slow(preset="oasis", residual_multiplier=0.7, embedding_multiplier=1.5, normalizer="token_null"),
        slow(preset="attnres_cumulative", remat="layer", norm="none"),
        slow(preset="oasis", router="static", window=2),
        slow(preset="oasis", depth_implementation="reference"),
        slow(preset="oasis", num_layers=6, layer_pattern=(SHORT, NO_POSITIONS, FAR), learned_positions=6),
        slow(preset="oasis", wiring="delta", residual_clip=0.9),
        slow(preset="attnres", router="projected", depth_normalizer="softmax1"),
        slow(preset="attnres", num_layers=4, layer_pattern=(NO_POSITIONS, SHORT)),
        slow(preset="oasis_blocks", blocks=0, norm="gatednorm"),
        slow(preset="oasis_blocks", blocks=2, router="projected"),
        slow(preset="oasis_blocks", blocks=4, remat="layer"),
        slow(preset="oasis_blocks", blocks=1),
        slow(preset="oasis_blocks", blocks=5, num_layers=6, layer_pattern=(SHORT, NO_POSITIONS, FAR)),
    ],
    ids=lambda o: "-".join(f"period {len(v)}" if isinstance(v, tuple) else str(v) for v in o.values()),
)
def test_loss_and_gradients_equal_those_of_the_layers_one_by_one(options):
    config = in_float64(ModelConfig(**dict(num_layers=3) | SMALL | options))
    with jax.enable_x64(True):
        params, batch = moved_parameters(config), documents()

        @partial(jax.jit, compiler_options=QUICK)
        def both(params):
            loss = lambda params, loop: training_loss(params, batch, config, UNSHARDED, loop=loop)
            return [jax.value_and_grad(loss)(params, loop) for loop in (True, False)]

        (value, gradients), (wanted, wanted_gradients) = both(params)
        np.testing.assert_allclose(value, wanted, rtol=1e-12)
        largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted_gradients))

        def equal(gradient, wanted):
            np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max() + 1e-16 * largest)

        jax.tree.map(equal, gradients, wanted_gradients)


@pytest.mark.parametrize(
    "options",
    [
        dict(preset="residual"),
        dict(preset="oasis", num_layers=4, layer_pattern=(SHORT, NO_POSITIONS)),
        dict(preset="oasis_blocks", blocks=4),
        dict(preset="clipped"),
    ],
    ids=lambda o: o["preset"],
)
def test_stream_and_telemetry_equal_those_of_the_layers_one_by_one(options):
    config = in_float64(ModelConfig(**dict(num_layers=3) | SMALL | options))
    with jax.enable_x64(True):
        params, batch = moved_parameters(config), documents()
        context = Context(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))

        @partial(jax.jit, compiler_options=QUICK)
        def both(params):
            embedding = embed(params, config, batch["inputs"], context)
            keep = lambda _, layer: layer_telemetry(layer.attention)
            looped = run_loop(params, config, embedding, context, telemetry=True)
            quiet = run_loop(params, config, embedding, context)
            return looped, quiet, run_unrolled(params, config, embedding, context, on_layer=keep)

        looped, quiet, wanted = both(params)
        np.testing.assert_allclose(looped.stream, wanted.stream, rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(quiet.stream, looped.stream)
        assert quiet.layers == {} and set(looped.layers) == {"null_mass", "first_token_mass"}
        for name, values in looped.layers.items():
            assert values.shape == (config.num_layers,)
            np.testing.assert_allclose(values, [layer[name] for layer in wanted.layers], rtol=1e-10)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_as_a_loop(preset):
    config = ModelConfig(preset=preset, num_layers=4, stack="scan", dtype="bfloat16", **SMALL)
    shapes = parameter_shapes(config)
    loss = lambda params, batch: training_loss(params, batch, config, UNSHARDED, loop=True)
    gradients = jax.eval_shape(jax.grad(loss), shapes, abstract_batch(B, T))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), gradients) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def abstract_batch(batch, length):
    kinds = {"inputs": "int32", "targets": "int32", "weights": "float32"}
    return {name: jax.ShapeDtypeStruct((batch, length), kind) for name, kind in kinds.items()}


UNIT = 4 * 4 * 128 * 16  # bytes of an activation [B, T, D] in float32


@cache
def temporary_bytes(layers, loop=True, **options):
    config = ModelConfig(num_layers=layers, width=16, num_heads=2, mlp_dim=16, vocab_size=8, remat="layer", **options)
    shapes = parameter_shapes(config)
    if not loop:
        shapes = jax.eval_shape(unstack_layers, shapes)
    function = lambda params, batch: training_loss(params, batch, config, UNSHARDED, loop=loop)
    lowered = jax.jit(jax.grad(function)).lower(shapes, abstract_batch(4, 128))
    return lowered.compile(compiler_options=QUICK).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "options",
    [dict(preset="residual"), slow(preset="attnres"), dict(preset="oasis_blocks", blocks=2), slow(preset="oasis")],
    ids=lambda o: o["preset"],
)
def test_temporary_memory_is_linear_in_depth(options):
    """Equal steps of depth cost equal memory; a stored history would make the second step cost more than twice the
    first.
    """
    few, more, many = (temporary_bytes(layers, **options) for layers in (4, 8, 16))
    assert few < more < many
    assert many - more < 1.25 * 2 * (more - few)


@pytest.mark.parametrize("options, units", [(dict(preset="oasis"), 3), (dict(preset="oasis_blocks", blocks=2), 3)])
def test_a_history_and_its_gradients_are_stored_once(options, units):
    """A layer costs its source, its gradient and statistics, in which D = 16 numbers count; one copy of
    either would be seen. In blocks it costs what its block held before it.
    """
    assert (temporary_bytes(8, **options) - temporary_bytes(4, **options)) / 4 < units * UNIT


@pytest.mark.slow
def test_one_by_one_a_history_costs_more():
    assert (
        temporary_bytes(4, loop=False, preset="oasis") - temporary_bytes(2, loop=False, preset="oasis")
    ) / 2 > 6 * UNIT


def test_where_loops_are_used():
    assert uses_loop(ModelConfig(preset="oasis"), "tpu") and not uses_loop(ModelConfig(preset="oasis"), "cpu")
    assert uses_loop(ModelConfig(stack="scan"), "cpu") and not uses_loop(ModelConfig(stack="unroll"), "gpu")
