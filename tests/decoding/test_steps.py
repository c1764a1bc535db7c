"""Prefill and steps against the full forward pass: every preset, wiring, window and family, at every position."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.exact import in_float64
from pretrained import tiny
from pretrained.tiny import random_model
from sampling import sampled

from oasis_jax import PRESETS, Context, LayerPattern, ModelConfig, RopeScaling
from oasis_jax.decoding.steps import for_length, for_steps, prefill, step
from oasis_jax.model.cache import Int8, KVCache, RingCache
from oasis_jax.model.decoder import forward
from oasis_jax.model.layout import unstack_layers
from oasis_jax.pretrained import transplant_sink
from oasis_jax.pretrained.families import FAMILIES, read_model_config

VOCAB, LENGTH = 29, 23
SMALL = dict(width=24, num_heads=4, num_kv_heads=2, num_layers=2, mlp_dim=20, vocab_size=VOCAB)
MIXED = dict(layer_pattern=(LayerPattern(window=4), LayerPattern(rope_theta=0.0)))
LONGROPE = RopeScaling(
    kind="longrope", factor=4.0, original_length=8, short_factors=(1.0, 1.1, 1.3), long_factors=(1.0, 2.0, 5.0)
)
# gamma = -alpha / number of keys would change with every token
OPTIONS = {
    "clipped": dict(clip_gamma=-0.03),
    "oasis_blocks": dict(blocks=3),
    "attnres_rms": dict(blocks=3),
    "attnres_qkv": dict(blocks=3),
}
HALF = dict(layer_pattern=(LayerPattern(window=3), LayerPattern()))  # a ring, and a cache of all tokens
KINDS = {f"{name}, half": dict(preset=name, **HALF, **OPTIONS.get(name, {})) for name in PRESETS}
KINDS |= {
    "oasis": dict(preset="oasis"),
    "softpick, window": dict(preset="softmax1", normalizer="softpick", window=5),
    "alternating": dict(preset="attnres", **MIXED),
    "two windows": dict(preset="oasis", layer_pattern=(LayerPattern(window=2), LayerPattern(window=7))),
    "window of one": dict(preset="oasis", window=1),
    "several nulls, window": dict(
        preset="residual", normalizer="null_key_value", null_keys=3, null_bias=True, window=4
    ),
    "delta, projected": dict(preset="softmax1", wiring="delta", router="projected", **MIXED),
    "cumulative, static": dict(preset="oasis", router="static", **MIXED),
    "sigmoid over depth": dict(preset="oasis", depth_normalizer="sigmoid", **MIXED),
    "uniform over depth": dict(preset="attnres", depth_normalizer="uniform", **MIXED),
    "affine": dict(preset="residual", gate="affine", window=3),
    "soft cap, norms": dict(preset="oasis", logit_softcap=2.0, qk_norm=True, window=3, gate="per_head"),
    "learned positions": dict(preset="residual", rope_theta=0.0, learned_positions=40, norm="layernorm", window=6),
    "longrope": dict(preset="residual", rope_scaling=LONGROPE),
}  # fmt: skip
NOW = ("oasis_blocks, half", "sparsemax, half", "several nulls, window", "affine", "longrope")

SIZES = tiny.CONFIG | dict(vocab_size=VOCAB, num_hidden_layers=4)
KEYS = {
    "opt": dict(
        vocab_size=VOCAB, hidden_size=24, ffn_dim=20, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=40,
    ),
    "gpt2": dict(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, n_positions=40),
    "granite_swa": SIZES | dict(sliding_window=5, layer_rope_theta=[0, 1e4, 2e4, 0], logits_scaling=3.0),
    "mistral": SIZES | dict(sliding_window=7),
    "qwen2": SIZES | dict(sliding_window=7, use_sliding_window=True, max_window_layers=1),
    "phi3": SIZES | dict(partial_rotary_factor=0.6, sliding_window=6),
}  # fmt: skip


def check(model, storage="float", lengths=(13, 6), rtol=1e-9, atol=1e-10):
    """Prompts of unequal length, then one token after the other up to LENGTH: logits of every step as of one pass."""
    lengths, ids = np.array(lengths), np.random.default_rng(1).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
    config, rows, longest = in_float64(for_length(model.config, LENGTH)), np.arange(2), max(lengths)
    params = jax.tree.map(lambda x: x.astype("float64"), model.params)
    whole = np.asarray(jax.jit(lambda params: forward(params, config, ids)[0])(params))
    start = jax.jit(lambda params: prefill(params, config, ids[:, :longest], lengths, 32, Context(), storage))
    more = jax.jit(lambda params, token, caches: step(params, config, token, caches, Context()))
    logits, caches = start(params)
    params = for_steps(params, config, model.numerics)
    for number in range(LENGTH - longest + 1):
        np.testing.assert_allclose(logits, whole[rows, lengths + number - 1], rtol=rtol, atol=atol)
        if number < LENGTH - longest:
            logits, caches = more(params, ids[rows, lengths + number], caches)
    return caches


@pytest.mark.parametrize("kind", sampled(KINDS, NOW))
def test_prefill_and_steps_equal_the_full_forward_at_every_position(kind):
    """Every ring is filled by a prompt longer than it and goes around several times."""
    with jax.enable_x64(True):
        model = random_model(ModelConfig(**(SMALL | KINDS[kind])))
        caches = check(model)
        for index, cache in enumerate(caches):
            window = model.config.layer(index).window
            assert (type(cache), cache.size) == ((RingCache, window) if window else (KVCache, 32))


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_no_step_turns_a_weight_around(turned, tied_head):
    """A compiled step holds no copy of a weight in another order: every product takes it as it lies."""
    if jax.default_backend() != "cpu":
        pytest.skip("other platforms keep the stack")
    sizes = dict(width=40, num_heads=6, num_kv_heads=3, head_dim=14, num_layers=2, mlp_dim=72, vocab_size=104)
    model = random_model(ModelConfig(preset="residual", gate="elementwise", tied_head=tied_head, **sizes))
    params, numerics = unstack_layers(model.params), model.numerics
    if turned:
        params = for_steps(params, model.config, numerics)
    caches = tuple(KVCache(*jnp.zeros((2, 5, 32, 3, 14)), jnp.full(5, 7)) for _ in range(2))
    run = jax.jit(lambda params, token, caches: step(params, model.config, token, caches, Context()))
    text = run.lower(params, jnp.zeros(5, jnp.int32), caches).compile().as_text()
    weights = {x.size for x in jax.tree.leaves(params) if x.ndim > 1}
    rows = {5 * size for size in (40, 72, 104, 6 * 14, 3 * 14)} | {5 * 32 * 3 * 14}
    assert weights.isdisjoint(rows)
    moved = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    assert text.count(" dot(") >= 2 * 8 + 1
    assert not weights & {math.prod(map(int, shape.split(","))) for shape in moved}


@pytest.mark.parametrize("family", sampled(FAMILIES, ("granite_swa",)))
def test_every_family(family):
    config = read_model_config(KEYS.get(family, SIZES) | {"model_type": family}, family)
    with jax.enable_x64(True):
        check(random_model(config))


def test_a_transplanted_model():
    with jax.enable_x64(True):
        check(transplant_sink(random_model(ModelConfig(**SMALL, preset="residual"), begin_token=3), [3, 5]))


def test_prompts_shorter_than_the_window():
    with jax.enable_x64(True):
        check(random_model(ModelConfig(**SMALL, preset="oasis", window=9)), lengths=(1, 4))


def rounded(x):
    """x [B, S, K, H] as 8 bits hold it."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / np.where(scale > 0, scale, 1)) * scale


@pytest.mark.parametrize("window", [0, 5])
def test_keys_and_values_in_8_bits_are_read_as_numpy_rounds_them(window):
    """Those of a prompt, and those that a step adds."""
    model = random_model(ModelConfig(**SMALL | dict(num_layers=1), preset="oasis", window=window))
    ids, lengths = np.random.default_rng(2).integers(0, VOCAB, (2, 11)).astype(np.int32), np.array([11, 7])
    run = jax.jit(
        lambda storage: prefill(model.params, model.config, ids, lengths, 16, Context(), storage), static_argnums=0
    )
    more = jax.jit(lambda tokens, caches: step(model.params, model.config, tokens, caches, Context()))
    (_, (plain,)), (_, (kept,)) = run("float"), run("int8")
    assert isinstance(kept.key, Int8) and kept.key.values.dtype == np.int8 and kept.size == plain.size
    live = np.arange(plain.size) < np.asarray(plain.live)[:, None]
    for x, stored in ((plain.key, kept.key), (plain.value, kept.value)):
        np.testing.assert_allclose(np.asarray(stored.read("float32"))[live], rounded(np.asarray(x)[live]), atol=1e-6)
    tokens = ids[:, 0]
    logits, (after,) = more(tokens, (kept,))
    _, (own,) = more(tokens, (plain,))
    place, rows = np.asarray(plain.length) % plain.size, np.arange(2)
    for x, stored in ((own.key, after.key), (own.value, after.value)):
        new = np.asarray(stored.read("float32"))[rows, place]
        np.testing.assert_allclose(new, rounded(np.asarray(x)[rows, place]), atol=1e-5)
    expected, _ = more(tokens, (plain,))
    error = np.abs(np.asarray(logits) - np.asarray(expected)).max() / np.abs(expected).max()
    assert 0 < error < 0.05


def test_8_bits_hold_zeros_exactly_and_nan_as_nan():
    x = np.zeros((1, 3, 2, 5), np.float32)
    x[0, 1], x[0, 2, 0, 3] = np.linspace(-1, 1, 5), np.nan
    found = np.asarray(Int8.of(x).read("float32"))
    assert (found[0, 0] == 0).all() and np.isnan(found[0, 2, 0]).all() and (found[0, 2, 1] == 0).all()
    np.testing.assert_allclose(found[0, 1], x[0, 1], atol=0.5 / 127 + 1e-7)
