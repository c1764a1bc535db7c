"""Whole attention rows read block by block, against probabilities written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation.toys import (
    NORMALIZERS,
    ROUNDING,
    WITH_NULL,
    all_probabilities,
    build,
    forward,
    measure_family,
    token_batches,
)
from flax import nnx

from oasis_jax.config import AttentionConfig
from oasis_jax.evaluation import EVALUATORS
from oasis_jax.evaluation.measures.attention_maps import EPSILONS
from oasis_jax.evaluation.measures.probabilities import PREFIX, probabilities
from oasis_jax.evaluation.passes import DecoderPass, lower
from oasis_jax.model.attention import Attention
from oasis_jax.model.context import Context
from oasis_jax.model.masks import first_in_document
from oasis_jax.model.statistics import AttentionStatistics, Static


def xlogx(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_attention_maps_equal_materialized_probabilities(normalizer):
    model, batches = build(normalizer=normalizer), token_batches()
    p = all_probabilities(model, forward(model, batches)[1])
    metrics = measure_family("attention_maps", model, batches)
    length, omega = p.shape[-1], np.maximum(0, 1 - p.sum(-1))
    if normalizer not in WITH_NULL:
        omega = np.zeros_like(omega)
    attending = 1 - omega > 1e-4
    shares = np.where(attending[..., None], p / np.where(attending, 1 - omega, 1)[..., None], 0)
    for suffix, probability, outcome in (("", p, omega), ("_conditional", shares, np.zeros_like(omega))):
        if suffix and normalizer not in WITH_NULL:
            assert all(
                metrics[name] is None for name in metrics if name.endswith("conditional") or "conditional_by" in name
            )
            continue
        a = probability.sum(-2) / (length - np.arange(length))  # [B, L, N, k]
        np.testing.assert_allclose(metrics[f"token_mass_by_key{suffix}"], a.mean((0, 2)), atol=ROUNDING)
        for epsilon in EPSILONS:
            rate = np.asarray(metrics[f"sink_rate_by_key{suffix}"][str(epsilon)])
            # Between the rates of thresholds that rounding can reach: clipped probabilities of exactly 1 give means of
            # exactly 0.2.
            least, most = ((a > epsilon + shift).mean((0, 1, 2)) for shift in (ROUNDING, -ROUNDING))
            assert (rate > least - ROUNDING).all() and (rate < most + ROUNDING).all()
        secondary = a[..., 1 : length // 2].max(-1)
        np.testing.assert_allclose(metrics[f"secondary_sink_mass_by_head{suffix}"], secondary.mean(0), atol=ROUNDING)
        least, most = ((secondary > 0.3 + shift).mean() for shift in (ROUNDING, -ROUNDING))
        assert least - ROUNDING < metrics[f"secondary_sink_rate{suffix}"] < most + ROUNDING
        entropy = -xlogx(probability).sum(-1) - xlogx(outcome)
        np.testing.assert_allclose(
            metrics[f"attention_entropy{suffix}_by_head"], entropy.mean((0, 3)), atol=2 * ROUNDING
        )
        assert metrics[f"attention_entropy{suffix}"] == pytest.approx(entropy.mean(), abs=2 * ROUNDING)
        assert metrics[f"max_probability{suffix}"] == pytest.approx(probability.max(-1).mean(), abs=ROUNDING)


def attention_statistics(length: int, config: AttentionConfig, segment_ids=None, batch: int = 2) -> AttentionStatistics:
    x = 2 * np.random.default_rng(length).standard_normal((batch, length, config.width)).astype(np.float32)
    return Attention(config, rngs=nnx.Rngs(0))(jnp.asarray(x), Context(segment_ids=segment_ids))[1]


CASES = {
    "plain": dict(),
    "window": dict(window=70),
    "soft cap": dict(logit_softcap=3.0),
    "softmax": dict(normalizer="softmax"),
    "clipped": dict(normalizer="clipped"),
    "segments": dict(),
}


@pytest.mark.parametrize("case", CASES)
def test_several_tiles_equal_one_matrix(case):
    """333 queries are ten tiles of 32 or 64 and a rest, in groups of different width."""
    config, length = AttentionConfig(width=15, num_heads=6, num_kv_heads=3, head_dim=4, **CASES[case]), 333
    segments = jnp.asarray(np.arange(length)[None] // np.array([[100], [41]])) if case == "segments" else None
    layer = attention_statistics(length, config, segments)
    context = Context(segment_ids=segments)
    place = None if segments is None else context.order(length) - first_in_document(context, length)
    found = jax.jit(probabilities)(layer, context, place)
    query, key = np.asarray(layer.query, np.float64), np.repeat(np.asarray(layer.key, np.float64), 2, 2)
    scores = np.einsum("btnh,bsnh->bnts", query, key) / 2
    if config.logit_softcap:
        scores = 3 * np.tanh(scores / 3)
    distance = np.arange(length)[:, None] - np.arange(length)
    allowed = np.broadcast_to((distance >= 0) & (distance < (config.window or length)), scores.shape)
    if segments is not None:
        ids = np.asarray(segments)
        allowed = allowed & (ids[:, None, :, None] == ids[:, None, None, :])
    e = np.where(allowed, np.exp(scores), 0)
    p = e / (e.sum(-1, keepdims=True) + (config.normalizer == "softmax1"))
    if config.normalizer == "clipped":
        p = np.where(allowed, np.clip((1 + 4 / length) * p - 4 / length, 0, 1), 0)
    starts = np.ones_like(distance[:1], bool) & (np.arange(length) < PREFIX)
    if segments is not None:
        starts = np.stack([np.arange(length) - np.searchsorted(row, row) < PREFIX for row in ids])
    in_prefix = starts[:, None, None]
    share = np.where(p.sum(-1) > 1e-4, 1 / np.maximum(p.sum(-1), 1e-30), 0)
    expected = dict(
        token_mass=p.sum(-1),
        max_probability=p.max(-1),
        negative_entropy=xlogx(p).sum(-1),
        prefix_mass=(p * in_prefix).sum(-1),
        column_sums=p.sum(-2),
        conditional_column_sums=(p * share[..., None]).sum(-2),
    )
    for name, value in expected.items():
        # Sums of up to 333 terms; the statistics are promised to 1e-5.
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-5, atol=1e-5, err_msg=name)


@functools.cache
def temporary_bytes(length: int) -> int:
    """Of the compiled statistics of one layer of 2 heads, from shapes alone."""
    config = AttentionConfig(width=16, num_heads=2, head_dim=8, rope_theta=0.0)
    vector = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    row = jax.ShapeDtypeStruct((1, 2, length), jnp.float32)
    layer = AttentionStatistics(vector, vector, vector, vector, row, row, row, Static(config))
    return jax.jit(probabilities).lower(layer).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_length():
    """By the compiler's figures: twice the length, twice the memory; a T x T array of one head alone would be
    256 MiB at 8192.
    """
    assert temporary_bytes(8192) < 2.2 * temporary_bytes(4096)
    assert temporary_bytes(8192) < 8192 * 8192 * 4 / 8


@pytest.mark.slow
def test_memory_at_32k_tokens():
    """Twice the length of 16k again costs twice the memory, and 32k^2 scores would be 8 GiB for the two heads."""
    assert temporary_bytes(32768) < 2.2 * temporary_bytes(16384)
    assert temporary_bytes(32768) < 2**30


def model_bytes(length: int) -> int:
    """Temporary memory of one compiled pass of a Decoder with every measure that reads whole rows."""
    model = build(preset="oasis")
    batch = {"inputs": jax.ShapeDtypeStruct((1, length), jnp.int32)}
    evaluators = {name: EVALUATORS[name] for name in ("sinks", "attention_maps", "joint")}
    lowered = lower(DecoderPass(model.config), model.parameters(), batch, evaluators)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_of_a_whole_model_is_linear_in_length():
    assert model_bytes(4096) < 2.2 * model_bytes(2048)


@pytest.mark.slow
def test_statistics_of_32k_tokens():
    """Run, not only compiled: rows against numpy in float64, columns by what they have to add up to."""
    length, config = 32768, AttentionConfig(width=8, num_heads=1, head_dim=8)
    layer = jax.jit(lambda: attention_statistics(length, config, batch=1))()
    found = jax.jit(probabilities)(layer)
    query, key = (np.asarray(x, np.float64)[0, :, 0] for x in (layer.query, layer.key))
    for t in (0, 1, 127, 128, 4097, 20000, length - 1):
        e = np.exp(key[: t + 1] @ query[t] / np.sqrt(8))
        p = e / (1 + e.sum())
        expected = (p.sum(), p.max(), xlogx(p).sum(), p[:PREFIX].sum())
        np.testing.assert_allclose([x[0, 0, t] for x in found[:4]], expected, rtol=1e-4, atol=1e-5)
    columns = np.asarray(found.column_sums, np.float64)[0, 0]
    assert columns[0] == pytest.approx(np.asarray(layer.first_token_mass, np.float64).sum(), rel=1e-4)
    assert columns.sum() == pytest.approx((1 - np.asarray(layer.null_mass, np.float64)).sum(), rel=1e-5)
    assert np.asarray(found.conditional_column_sums, np.float64).sum() == pytest.approx(length, rel=1e-5)


def test_statistics_that_do_not_say_how_they_normalize_are_not_applicable():
    from oasis_jax.evaluation import measure

    layer = attention_statistics(9, AttentionConfig(width=15, num_heads=3, head_dim=4))._replace(static=None)
    found = measure(
        lambda layer, inputs: (inputs, [layer]),
        layer,
        [{"inputs": np.zeros((2, 9), np.float32)}],
        measures=["attention_maps"],
    )
    assert set(found.values.values()) == {None}
