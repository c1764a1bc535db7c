"""Layers as loops against the decoder that runs them one by one, in float64; and what they store, as the
CPU's compiler says.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oasis_jax import Decoder, ModelConfig
from oasis_jax.config import PRESETS
from oasis_jax.model.attention import unconstrained
from oasis_jax.model.layout import stack_layers, unstack_layers
from oasis_jax.model.scanned import uses_scan
from oasis_jax.training.loss import loss_chunks
from oasis_jax.training.sharding import parameter_shapes
from oasis_jax.training.step import training_loss

B, T, V = 2, 6, 83
SMALL = dict(width=12, num_heads=3, mlp_dim=20, vocab_size=V)


def arrays(config, seed=0):
    """Parameters away from their start, where static queries are zero, and a batch of two documents a row."""
    random = np.random.default_rng(seed)
    pure = nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(0))))
    for router in pure.get("routers", {}).values():
        if config.coupling:
            router["beta_raw"] += 5.5  # the coupling starts near 0
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.3 * random.normal(size=x.shape)), pure)
    tokens = random.integers(0, V, (B, T + 1))
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": random.random((B, T)),
        "segment_ids": np.array([[0] * 2 + [1] * 4] * B),
    }
    return params, jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize(
    "options",
    [
        dict(preset="residual", remat="layer", residual_clip=0.9),
        dict(preset="attnres", norm="none", residual_clip=0.9),
        dict(preset="oasis_blocks", blocks=0, norm="gatednorm"),
        dict(preset="oasis_blocks", blocks=2),  # in two phases; blocks of one layer and a half
        dict(preset="oasis_blocks", blocks=4, tied_head=False),  # halves of layers, and a remainder
        dict(preset="oasis_blocks", blocks=4, remat="layer"),  # over a history
        dict(preset="oasis", residual_clip=0.9),
        dict(preset="oasis", wiring="delta", residual_clip=0.9),
        dict(preset="oasis_blocks", blocks=4, router="projected", residual_clip=0.9),
        *(
            pytest.param(o, marks=pytest.mark.slow)
            for o in (
                dict(preset="attnres_cumulative", remat="layer", norm="none"),
                dict(preset="oasis", router="static"),
                dict(preset="oasis", depth_implementation="reference"),
                dict(preset="attnres", router="projected", depth_normalizer="softmax1"),
                dict(preset="oasis_blocks", blocks=2, router="projected"),
            )
        ),
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_loss_and_gradients_equal_those_of_the_decoder(options):
    config = ModelConfig(num_layers=3, **SMALL, **options)
    object.__setattr__(config, "dtype", "float64")  # no user's choice, but what a comparison needs
    with jax.enable_x64(True):
        params, batch = arrays(config)

        # Half of the time is LLVM's, and what it leaves out changes no number.
        @partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
        def both(params):
            loss = lambda params, scan: training_loss(
                stack_layers(params) if scan else params, batch, config, unconstrained, scan=scan
            )
            return [jax.value_and_grad(loss)(params, scan) for scan in (True, False)]

        (value, gradients), (wanted, wanted_gradients) = both(params)
        np.testing.assert_allclose(value, wanted, rtol=1e-12)
        largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted_gradients))

        def equal(gradient, wanted):
            np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max() + 1e-16 * largest)

        jax.tree.map(equal, gradients, wanted_gradients)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_as_loops(preset):
    config = ModelConfig(preset=preset, num_layers=4, stack="scan", dtype="bfloat16", **SMALL)
    assert uses_scan(config, "cpu")
    shapes = parameter_shapes(config)
    batch = {
        name: jax.ShapeDtypeStruct((B, T), kind)
        for name, kind in (("inputs", "int32"), ("targets", "int32"), ("weights", "float32"))
    }
    loss = lambda params, batch: training_loss(params, batch, config, unconstrained, scan=True)
    gradients = jax.eval_shape(jax.grad(loss), shapes, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), gradients) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


UNIT = 4 * 4 * 128 * 16  # bytes of an activation [B, T, D] in float32


@cache
def temporary_bytes(layers, scan=True, **options):
    config = ModelConfig(num_layers=layers, width=16, num_heads=2, mlp_dim=16, vocab_size=8, remat="layer", **options)
    shapes = parameter_shapes(config)
    if not scan:
        shapes = jax.eval_shape(unstack_layers, shapes)
    batch = {
        name: jax.ShapeDtypeStruct((4, 128), kind)
        for name, kind in (("inputs", "int32"), ("targets", "int32"), ("weights", "float32"))
    }
    function = lambda params, batch: training_loss(params, batch, config, unconstrained, scan=scan)
    compiled = (
        jax.jit(jax.grad(function))
        .lower(shapes, batch)
        .compile(compiler_options={"xla_backend_optimization_level": "0"})
    )
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "options",
    [dict(preset="residual"), dict(preset="attnres"), dict(preset="oasis_blocks", blocks=2), dict(preset="oasis")],
    ids=lambda o: o["preset"],
)
def test_temporary_memory_is_linear_in_depth(options):
    """Equal steps of depth cost equal memory; a stored history would make the second step cost more than twice the
    first.
    """
    few, more, many = (temporary_bytes(layers, **options) for layers in (4, 8, 16))
    assert few < more < many
    # The scores at birth are quadratic, 2 (2L + 1) numbers a token and source against the D of a source: with D = 16
    # they are seen.
    scores = 4 * 512 * (33 * 32 - 17 * 16) if options["preset"] == "attnres" else 0
    assert many - more - scores < 1.25 * 2 * (more - few)


def test_a_history_and_its_gradients_are_stored_once():
    """A layer costs its source, its gradient and statistics, in which D = 16 numbers count; one copy of
    either would be seen.
    """
    assert (temporary_bytes(8, preset="oasis") - temporary_bytes(4, preset="oasis")) / 4 < 3 * UNIT


@pytest.mark.slow
def test_one_by_one_a_history_costs_more():
    assert (
        temporary_bytes(4, scan=False, preset="oasis") - temporary_bytes(2, scan=False, preset="oasis")
    ) / 2 > 6 * UNIT


def test_where_loops_are_used():
    assert uses_scan(ModelConfig(preset="oasis"), "tpu") and not uses_scan(ModelConfig(preset="oasis"), "cpu")
    assert uses_scan(ModelConfig(stack="scan"), "cpu") and not uses_scan(ModelConfig(stack="unroll"), "gpu")


@pytest.mark.parametrize(
    "vocab, length, chunks", [(258, 512, 2), (100_000, 512, 512), (8, 7, 1), (1000, 30, 5), (1000, 7, 7)]
)
def test_the_number_of_chunks_divides_the_length(vocab, length, chunks):
    assert loss_chunks(ModelConfig(width=128, num_heads=4, vocab_size=vocab), length) == chunks
