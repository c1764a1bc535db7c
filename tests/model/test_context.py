"""Positions and segments from the decoder to every sublayer: documents packed into rows equal documents alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model.exact import SMALL, V, in_float64, moved_parameters
from sampling import sampled

from oasis_jax import MLP, PRESETS, Attention, Context, Decoder, ModelConfig, UserError
from oasis_jax.config import AttentionConfig, LayerPattern, MLPConfig, RopeScaling
from oasis_jax.model.decoder import final_stream, forward
from oasis_jax.model.head import embed, with_offset
from oasis_jax.model.loop import run_loop
from oasis_jax.model.masks import allowed_keys, first_in_document
from oasis_jax.model.norms import norm
from oasis_jax.training.step import training_loss

T = 9
# Rows of two documents, 4 + 5 and 5 + 4 tokens.
LENGTHS = ((4, 5), (5, 4))
SEGMENTS = np.array([[0] * 4 + [1] * 5, [6] * 5 + [2] * 4])
POSITIONS = np.array([[*range(4), *range(5)], [*range(5), *range(4)]])
PACKED = dict(positions=POSITIONS, segment_ids=SEGMENTS)


def tokens(seed=1):
    return np.random.default_rng(seed).integers(0, V, (2, T))


def looped(params, config, inputs, context):
    """What the head reads, by way of the loop."""
    embedding = embed(params, config, inputs, context)
    stream = run_loop(params, config, embedding, with_offset(config, context, inputs.shape[1])).stream
    return norm(params.get("final_norm", {}), config, stream)


def unrolled(params, config, inputs, context):
    return final_stream(params, config, inputs, context)[0]


def alone(run, inputs):
    """Every document as a row of its own, put back where it lay; documents of one length are one call."""
    whole = None
    for length in {4, 5}:
        places = [
            (row, sum(LENGTHS[row][:k])) for row in range(2) for k in range(2) if LENGTHS[row][k] == length
        ]  # fmt: skip
        found = run(np.stack([inputs[row, start : start + length] for row, start in places]), Context())
        for (row, start), x in zip(places, found):
            whole = np.zeros((2, T, x.shape[-1])) if whole is None else whole
            whole[row, start : start + length] = x
    return whole


@pytest.mark.parametrize("preset", sampled(PRESETS, ("clipped", "null_key_value", "oasis_blocks")))
@pytest.mark.parametrize("executor", [unrolled, looped], ids=lambda f: f.__name__)
def test_packed_documents_equal_documents_alone(preset, executor):
    options = dict(blocks=3) if PRESETS[preset]["blocks"] else {}
    options |= dict(clip_gamma=-0.1) if preset == "clipped" else {}  # otherwise it depends on the number of keys
    config = in_float64(
        ModelConfig(preset=preset, num_layers=2, learned_positions=6, position_offset=1, **SMALL, **options)
    )
    with jax.enable_x64(True):
        params = moved_parameters(config)
        run = jax.jit(lambda inputs, context: executor(params, config, inputs, context))
        packed = run(tokens(), Context(**jax.tree.map(jnp.asarray, PACKED)))
        np.testing.assert_allclose(packed, alone(run, tokens()), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("preset", ["residual", "oasis", "oasis_blocks", "clipped", "null_key"])
def test_a_constant_added_to_rotary_positions_changes_nothing(preset):
    blocks = dict(blocks=3) if PRESETS[preset]["blocks"] else {}
    config = in_float64(ModelConfig(preset=preset, num_layers=2, **SMALL, **blocks))
    if preset == "null_key":  # a null key does not turn: its score depends on where the query is
        config = in_float64(ModelConfig(preset="learned_sink", num_layers=2, rope_fraction=0.5, **SMALL))
    with jax.enable_x64(True):
        params = moved_parameters(config)
        run = jax.jit(lambda context: [f(params, config, tokens(), context) for f in (unrolled, looped)])
        plain = run(Context(positions=jnp.arange(T)[None]))
        for found, wanted in zip(run(Context(positions=jnp.arange(T)[None] + 1000)), plain):
            np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-10)
        for found, wanted in zip(run(Context(positions=2 * jnp.arange(T)[None])), plain):
            assert np.abs(found - wanted).max() > 1e-3
        default = jax.jit(lambda: unrolled(params, config, tokens(), Context()))()
        np.testing.assert_allclose(default, plain[0], rtol=1e-12)


def test_an_offset_is_a_constant_added_to_rotary_and_learned_positions():
    options = dict(preset="residual", num_layers=1, rope_scaling=RopeScaling(kind="linear", factor=2.0), **SMALL)
    shifted, plain = (ModelConfig(learned_positions=12, position_offset=x, **options) for x in (3, 0))
    params = jax.tree.map(lambda x: x.astype(jnp.float32), moved_parameters(plain))
    found = forward(params, shifted, tokens())[0]
    given = forward(params, plain, tokens(), Context(positions=jnp.arange(3, 3 + T)[None]))[0]
    np.testing.assert_array_equal(found, given)
    assert float(jnp.abs(found - forward(params, plain, tokens())[0]).max()) > 1e-2


def test_a_context_is_a_pytree_of_its_arrays():
    context = Context(positions=jnp.zeros((1, T), int), segment_ids=jnp.ones((2, T), int))
    leaves, tree = jax.tree.flatten(context)
    assert [x.shape for x in leaves] == [(1, T), (2, T)]
    assert tree.unflatten(leaves) == context
    assert jax.tree.leaves(Context()) == []
    assert context.replace(positions=None).segment_ids is context.segment_ids


# What does not fit


WRONG = [
    (dict(positions=np.zeros((3, T), np.int32)), "positions", "(1, 9) or (2, 9), got int32 of shape (3, 9)"),
    (dict(positions=np.zeros((1, T - 1), np.int32)), "positions", "(1, 9) or (2, 9), got int32 of shape (1, 8)"),
    (dict(positions=np.zeros(T, np.int32)), "positions", "(1, 9) or (2, 9), got int32 of shape (9,)"),
    (dict(positions=np.zeros((2, T), np.float32)), "positions", "(1, 9) or (2, 9), got float32 of shape (2, 9)"),
    (dict(segment_ids=np.zeros((1, T), np.int32)), "segment_ids", "(2, 9), got int32 of shape (1, 9)"),
    (dict(segment_ids=np.zeros((2, T, 1), np.int32)), "segment_ids", "(2, 9), got int32 of shape (2, 9, 1)"),
    (dict(segment_ids=np.zeros((2, T), bool)), "segment_ids", "(2, 9), got bool of shape (2, 9)"),
]


@pytest.mark.parametrize("fields, name, words", WRONG, ids=lambda x: x if isinstance(x, str) else None)
def test_a_context_that_does_not_fit_is_one_line(fields, name, words):
    config = ModelConfig(preset="residual", num_layers=1, **SMALL)
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    layer = Attention(AttentionConfig(width=12, num_heads=3), rngs=nnx.Rngs(0))
    batch = {name: jnp.asarray(tokens()) for name in ("inputs", "targets")} | {"weights": jnp.ones((2, T))} | fields
    params = jax.eval_shape(lambda: moved_parameters(config))
    for call in (
        lambda: decoder(tokens(), Context(**fields)),
        lambda: layer(jnp.zeros((2, T, 12)), Context(**fields)),
        lambda: jax.eval_shape(lambda p: training_loss(p, batch, config, Context().placement, loop=True), params),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value) == f"context.{name}: must be integers of shape {words}"


def test_a_table_of_positions_that_is_too_short():
    config = ModelConfig(preset="residual", num_layers=1, learned_positions=10, position_offset=2, **SMALL)
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    assert np.isfinite(decoder(tokens()[:, :8])[0]).all()
    with pytest.raises(UserError) as error:
        decoder(tokens())
    assert str(error.value) == ("model.learned_positions: 10 rows do not hold 9 positions from 2 on; at most 8 tokens")
    # Given positions are data: one beyond the table is NaN, never another position's row.
    positions = jnp.asarray([[0, 1, 2, 3, 4, 5, 6, 7, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    outputs = decoder(tokens(), Context(positions=positions))[0]
    assert np.isfinite(outputs[0]).all() and np.isnan(outputs[1, 8]).all()


def test_patterns_that_do_not_fit():
    pattern = (LayerPattern(window=3), LayerPattern(rope_theta=0.0), LayerPattern())
    with pytest.raises(UserError) as error:
        ModelConfig(num_layers=4, layer_pattern=pattern)
    assert str(error.value) == (
        "model.layer_pattern: 3 entries do not divide num_layers=4; take a multiple of 3 layers or another pattern"
    )
    with pytest.raises(
        UserError, match=r"layer_pattern: expected LayerPattern\(window=\.\.\., rope_theta=\.\.\.\), got 3"
    ):
        ModelConfig(num_layers=4, layer_pattern=(3,))
    with pytest.raises(UserError, match=r"model\.layer_pattern\.window: must be at least 0, got -1"):
        LayerPattern(window=-1)
    with pytest.raises(UserError, match="an even number of channels, got 7 of head size 7"):
        ModelConfig(head_dim=7, rope_theta=0.0, layer_pattern=(LayerPattern(rope_theta=1e4),))


# Masks


@pytest.mark.parametrize("causal, window", [(True, 0), (True, 1), (True, 3), (False, 0)])
@pytest.mark.parametrize("segments", [False, True])
def test_allowed_keys_of_any_queries_and_keys(causal, window, segments):
    """The last 4 of 9 tokens against all, in an order of their own: as a decoder's cache, or a device's part,
    has them.
    """
    random = np.random.default_rng(0)
    keys, queries = random.permutation(9), random.permutation(np.arange(5, 9))
    ids = np.sort(random.integers(0, 3, (2, 9)), axis=1)
    given = dict(query_segments=ids[:, queries], key_segments=ids[:, keys]) if segments else {}
    found = allowed_keys(
        jnp.asarray(queries)[None],
        jnp.asarray(keys)[None],
        window=window,
        causal=causal,
        **jax.tree.map(jnp.asarray, given),
    )
    for b, (t, i), (s, j) in ((b, q, k) for b in range(2) for q in enumerate(queries) for k in enumerate(keys)):
        wanted = (j <= i or not causal) and (not window or i - j < window) and (not segments or ids[b, i] == ids[b, j])
        assert np.broadcast_to(found, (2, 1, 4, 9))[b, 0, t, s] == wanted


def test_the_first_token_of_each_document():
    context = Context(segment_ids=jnp.asarray(SEGMENTS))
    np.testing.assert_array_equal(first_in_document(context, T), [[0] * 4 + [4] * 5, [0] * 5 + [5] * 4])
    np.testing.assert_array_equal(first_in_document(Context(), T), [[0] * T])


def test_an_mlp_takes_a_context_too():
    module = MLP(MLPConfig(width=12), rngs=nnx.Rngs(0))
    x = jnp.ones((2, T, 12))
    np.testing.assert_array_equal(module(x, Context(segment_ids=jnp.asarray(SEGMENTS))), module(x))
