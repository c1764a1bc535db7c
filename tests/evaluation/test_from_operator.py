"""Statistics of layers that call the operator themselves: against a decoder's own layers, and counted out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation.toys import ROUNDING
from flax import nnx

from oasis_jax import Attention, AttentionConfig, AttentionStatistics, Context
from oasis_jax.errors import UserError
from oasis_jax.evaluation import measure
from pallas_kernels import null_attention

B, T, D, N, K, H, VOCAB = 2, 9, 14, 6, 3, 4, 23
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 5 + [3] * 4])


class Foreign(nnx.Module):
    """One layer of attention with a null per head, from projections of its own."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        shapes = dict(query=(N, H), key=(K, H), value=(K, H))
        self.maps = nnx.Dict({name: nnx.LinearGeneral(D, shape, rngs=rngs) for name, shape in shapes.items()})
        self.output = nnx.LinearGeneral((N, H), VOCAB, axis=(-2, -1), rngs=rngs)
        self.null_logit = nnx.Param(rngs.params.normal((N,)))

    def __call__(self, tokens, segment_ids=None):
        x = 2.0 * self.embed(tokens)
        arrays = [self.maps[name](x) for name in ("query", "key", "value")]
        options = dict(null_logit=self.null_logit[...], window=5, segment_ids=segment_ids, scale=0.9, logit_softcap=3.0)
        result = null_attention(*arrays, **options)
        return self.output(result.output), [AttentionStatistics.from_operator(*arrays, result, **options)]


@pytest.mark.parametrize("segments", [False, True])
def test_a_foreign_model_is_measured(segments):
    model = Foreign(nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    tokens = np.random.default_rng(0).integers(VOCAB, size=(B, T))
    ids = SEGMENTS if segments else np.zeros((B, T), int)
    batch = {"inputs": tokens} | ({"segment_ids": SEGMENTS} if segments else {})
    found = measure(
        lambda params, *x, **more: nnx.merge(graphdef, params)(*x, **more), params, [batch],
        measures=["sinks", "attention_maps", "values"],
    ).values  # fmt: skip
    layer = model(tokens)[1][0]
    query, key = (np.asarray(x, np.float64) for x in (layer.query, np.repeat(layer.key, N // K, axis=2)))
    scores = 3.0 * np.tanh(0.9 * np.einsum("btnh,bsnh->bnts", query, key) / 3.0)
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    seen = (j <= i) & (i - j < 5) & (ids[:, :, None] == ids[:, None])
    e = np.where(seen[:, None], np.exp(scores), 0)
    p = e / (np.exp(np.asarray(model.null_logit[...], np.float64))[:, None, None] + e.sum(-1, keepdims=True))
    first = np.stack([np.searchsorted(row, row) for row in ids])
    mass = np.take_along_axis(p, np.broadcast_to(first[:, None, :, None], (B, N, T, 1)), axis=-1)[..., 0]
    assert found["null_mass"] == pytest.approx((1 - p.sum(-1)).mean(), abs=ROUNDING)
    assert found["first_token_mass"] == pytest.approx(mass.mean(), abs=ROUNDING)
    assert found["sink_rate"] == pytest.approx((mass.mean(-1) > 0.3).mean())
    assert found["max_probability"] == pytest.approx(p.max(-1).mean(), abs=ROUNDING)
    assert found["value_drain"] is not None


@pytest.mark.parametrize("batch, says", [
    ({}, "attention layer 0 used segment ids that the batches do not have"),
    ({"segment_ids": SEGMENTS}, "the batches have segment_ids, and attention layer 0 did not use them"),
], ids=["captured", "ignored"])  # fmt: skip
@pytest.mark.parametrize("own", [False, True], ids=["operator", "layer"])
def test_segment_ids_that_only_one_side_knows_are_refused(batch, says, own):
    """Captured inside of apply_fn, or given in batches and not passed on: measures would mix up documents."""
    ids = None if batch else SEGMENTS
    layer = Attention(AttentionConfig(width=D, num_heads=N, num_kv_heads=K, head_dim=H), rngs=nnx.Rngs(0))
    foreign = Foreign(nnx.Rngs(0))

    def apply(params, tokens, segment_ids=None):
        del params, segment_ids
        if own:
            return jnp.zeros((B, T, 2)), [layer(jnp.ones((B, T, D)), Context(segment_ids=ids))[1]]
        return foreign(tokens, segment_ids=ids)

    with pytest.raises(UserError, match=says):
        measure(apply, {}, [{"inputs": np.zeros((B, T), int), **batch}], measures=["sinks"])


@pytest.mark.parametrize(
    "options", [dict(normalizer="softmax"), dict(normalizer="softmax1", window=3), dict(normalizer="learned_sink")]
)
def test_it_says_what_our_own_layer_says(options):
    """Every statistic and every measure of a layer of the library."""
    config = AttentionConfig(**dict(width=D, num_heads=N, num_kv_heads=K, head_dim=H, logit_softcap=2.0) | options)
    layer, x = Attention(config, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (B, T, D))
    own = layer(x, Context(segment_ids=jnp.asarray(SEGMENTS)))[1]
    null = {"softmax": -np.inf, "softmax1": 0.0, "learned_sink": layer.parameters.get("null_logit")}
    given = dict(
        null_logit=null[config.normalizer], window=config.window or None, segment_ids=SEGMENTS, logit_softcap=2.0
    )
    result = null_attention(own.query, own.key, own.value, **given)
    found = AttentionStatistics.from_operator(own.query, own.key, own.value, result, **given)
    for name in AttentionStatistics._fields[:-2]:  # neither static facts nor a cache
        np.testing.assert_allclose(getattr(found, name), getattr(own, name), atol=1e-6, err_msg=name)
    batch = {"inputs": np.zeros((B, T), int), "segment_ids": SEGMENTS}
    values = [
        measure(lambda s, x, segment_ids: (jnp.zeros((B, T, 2)), [s]), statistics, [batch],
                measures=["sinks", "attention_maps", "values"]).values
        for statistics in (own, found)
    ]  # fmt: skip
    for x, y in zip(*map(jax.tree.leaves, values)):
        np.testing.assert_allclose(x, y, atol=1e-6)
    assert values[0].keys() == values[1].keys()
    assert [name for name, x in values[0].items() if x is None] == [name for name, x in values[1].items() if x is None]


def test_masks_and_biases_count_and_whole_rows_are_not_claimed():
    random = np.random.default_rng(0)
    query, key, value = (random.normal(size=(B, n, h, H)).astype("f") for n, h in ((5, N), (T, K), (T, K)))
    mask, bias = random.random((B, 1, 5, T)) < 0.6, random.normal(size=(1, N, 1, T)).astype("f")
    ids = SEGMENTS[:, -5:], SEGMENTS
    options = dict(mask=mask, bias=bias, query_offset=np.array([4, 4]), kv_lengths=np.array([9, 4]), segment_ids=ids)
    result = null_attention(query, key, value, **options)
    found = AttentionStatistics.from_operator(query, key, value, result, **options)
    scores = np.einsum("btnh,bsnh->bnts", query.astype(float), np.repeat(key, N // K, 2)) / np.sqrt(H) + bias
    i, j = np.arange(5)[:, None] + 4, np.arange(T)[None]
    live = (j < np.array([9, 4])[:, None])[:, None]
    seen = mask[:, 0] & (j <= i) & live & (ids[0][:, :, None] == ids[1][:, None])
    e = np.where(seen[:, None], np.exp(scores), 0)
    p = e / (1 + e.sum(-1, keepdims=True))
    first = (ids[0][:, :, None] == ids[1][:, None]).argmax(-1)
    expected = np.take_along_axis(p, np.broadcast_to(first[:, None, :, None], (B, N, 5, 1)), axis=-1)[..., 0]
    np.testing.assert_allclose(found.first_token_mass, expected, atol=1e-6)
    assert found.static is None and expected.any()
    with pytest.raises(ValueError, match=r"^window: must be None or a whole number"):
        AttentionStatistics.from_operator(query, key, value, result, window=0)
    with pytest.raises(TypeError, match="causal"):
        AttentionStatistics.from_operator(query, key, value, result, causal=True)
