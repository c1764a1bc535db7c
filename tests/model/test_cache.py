"""Attention after a cache: a pass over the rest of a text equals the tail of one pass over all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oasis_jax import PRESETS, Attention, AttentionConfig, Context, Decoder, LayerPattern, ModelConfig, UserError
from oasis_jax.model.cache import KVCache, RingCache
from oasis_jax.model.loop import run_loop

B, T, CUT, VOCAB = 2, 11, 7, 29
SMALL = dict(width=16, num_heads=4, num_kv_heads=2, num_layers=2, mlp_dim=20, vocab_size=VOCAB)
IDS = jnp.asarray([[0] * 3 + [1] * 8, [0] * 9 + [1] * 2])


def moved(config):
    """A decoder with its parameters away from their start."""
    object.__setattr__(config, "dtype", "float64")  # no user's choice, but what a comparison needs
    graphdef, state = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(state)
    random = np.random.default_rng(0)
    return nnx.merge(graphdef, tree.unflatten([np.asarray(x) + 0.3 * random.normal(size=x.shape) for x in leaves]))


def caches(statistics, segment_ids, size=T + 2, rest=jnp.nan):
    """With room for more than is needed; what holds no token is NaN."""
    made = [KVCache.of(layer.key, layer.value, size, segment_ids) for layer in statistics.attention]
    dead = (jnp.arange(size) >= statistics.attention[0].key.shape[1])[:, None, None]
    return tuple(c._replace(key=jnp.where(dead, rest, c.key), value=jnp.where(dead, rest, c.value)) for c in made)


CASES = [
    *(dict(preset=preset, **(dict(blocks=3) if PRESETS[preset]["blocks"] else {})) for preset in PRESETS),
    dict(preset="oasis", window=3, logit_softcap=2.0, qk_norm=True),
    dict(preset="softmax1", normalizer="clipped", clip_gamma=-0.03, window=3),
    dict(preset="attnres", layer_pattern=(LayerPattern(window=4), LayerPattern(rope_theta=0.0))),
    dict(preset="residual", rope_theta=0.0, learned_positions=T + 2, position_offset=2, norm="layernorm"),
]


NAMES = ["-".join(str(v) for v in options.values() if not isinstance(v, tuple)) for options in CASES]
NOW = ("oasis", "oasis_blocks-3", "entmax15", "null_key_value", "oasis-3-2.0-True")
PACKED = [
    pytest.param(
        options, True, id=f"{name}-packed", marks=() if name in NOW or number >= len(PRESETS) else pytest.mark.slow
    )
    for number, (name, options) in enumerate(zip(NAMES, CASES))
]
ALONE = [pytest.param(options, False, id=name) for name, options in zip(NAMES, CASES) if name == "oasis"]


@pytest.mark.parametrize("options, segments", [*PACKED, *ALONE])
def test_the_rest_after_a_cache_equals_the_whole(options, segments):
    if options["preset"] == "clipped":  # gamma = -alpha / S would depend on how many keys there are
        options = options | dict(clip_gamma=-0.03)
    with jax.enable_x64(True):
        compare(moved(ModelConfig(**SMALL, **options)), segments)


def compare(model, segments):
    """The logits and masses of the rest, with a cache and without."""
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)
    ids = IDS if segments else None
    first, rest = (None if ids is None else ids[:, part] for part in (slice(CUT), slice(CUT, None)))

    @nnx.jit
    def run(model):
        whole, seen = model(tokens, Context(segment_ids=ids))
        _, statistics = model(tokens[:, :CUT], Context(segment_ids=first))
        context = Context(segment_ids=rest, cache=caches(statistics, first))
        logits, after = model(tokens[:, CUT:], context)
        masses = lambda s: [(x.null_mass[..., CUT - T :], x.first_token_mass[..., CUT - T :]) for x in s.attention]
        return (whole[:, CUT:], masses(seen)), (logits, masses(after))

    for expected, found in zip(*(jax.tree.leaves(part) for part in run(model))):
        np.testing.assert_allclose(found, expected, atol=1e-11, rtol=1e-10)


def test_what_does_not_fit_says_so():
    model = Decoder(ModelConfig(preset="oasis", **SMALL), rngs=nnx.Rngs(0))
    tokens = jnp.zeros((B, 3), jnp.int32)
    statistics = nnx.jit(lambda model: model(tokens)[1])(model)
    short = tuple(KVCache.of(layer.key[:1], layer.value[:1], 9) for layer in statistics.attention)
    with pytest.raises(UserError, match=r"context.cache: key and value must have one shape \[2, S, K, H\]"):
        model(tokens, Context(cache=short))
    with pytest.raises(UserError, match=r"context\.cache: needs segment_ids"):
        model(tokens, Context(segment_ids=jnp.zeros((B, 3), jnp.int32), cache=caches(statistics, None)))
    with pytest.raises(UserError, match=r"context\.cache: layers run as a loop have none"):
        run_loop({}, model.config, jnp.ones((B, 3, 16)), Context(cache=caches(statistics, None)))
    with pytest.raises(
        UserError, match=r"context\.cache: has 5 places, of which 3 are taken; 3 more tokens do not fit"
    ):
        model(tokens, Context(cache=caches(statistics, None, size=5)))
    odd = tuple(c._replace(length=jnp.arange(3)) for c in caches(statistics, None))
    with pytest.raises(UserError, match=r"context\.cache: length must be one integer or 2 of them, got int32 of shape"):
        model(tokens, Context(cache=odd))
    half = tuple(
        c._replace(key=c.key.astype("bfloat16"), value=c.value.astype("bfloat16")) for c in caches(statistics, None)
    )
    with pytest.raises(
        UserError, match=r"context\.cache: must have the type of its layer's keys, float32, got bfloat16"
    ):
        model(tokens, Context(cache=half))


def test_what_a_ring_cannot_do_says_so():
    layer = Attention(AttentionConfig(width=16, num_heads=4, num_kv_heads=2, window=5), rngs=nnx.Rngs(0))
    x, entries = jnp.ones((B, 3, 16)), jnp.zeros((B, 0, 2, 4))
    ring = lambda size: RingCache.of(entries, entries, size)
    with pytest.raises(UserError, match=r"context\.cache: a ring takes one token a pass, got 3"):
        layer(x, Context(cache=ring(5)))
    with pytest.raises(UserError, match=r"context\.cache: a ring of 4 places is of a window of 4, got 5"):
        layer(x[:, :1], Context(cache=ring(4)))
    with pytest.raises(UserError, match=r"context\.cache: a ring has no segment_ids"):
        layer(x[:, :1], Context(cache=ring(5), segment_ids=jnp.zeros((B, 1), jnp.int32)))


def test_a_ring_that_starts_empty_equals_one_pass():
    """What lies in places that hold no token yet is NaN."""
    layer = Attention(AttentionConfig(width=16, num_heads=4, num_kv_heads=2, window=5), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (B, T, 16))
    whole, statistics = layer(x)
    empty = jnp.full((B, 5, 2, 4), jnp.nan)
    cache = RingCache(empty, empty, jnp.int32(0))
    step = nnx.jit(lambda layer, x, cache: layer(x, Context(cache=cache)))
    for number in range(T):
        y, seen = step(layer, x[:, number : number + 1], cache)
        np.testing.assert_allclose(y[:, 0], whole[:, number], atol=1e-5)
        wanted = statistics.first_token_mass[:, :, number]
        np.testing.assert_allclose(seen.first_token_mass[:, :, 0], wanted, atol=1e-6)
        cache = seen.cache
    assert cache.key.shape == (B, 5, 2, 4) and cache.length == T


@pytest.mark.parametrize(
    "options",
    [dict(preset="oasis", window=3), pytest.param(dict(preset="entmax15"), marks=pytest.mark.slow)],
    ids=["fused", "dense"],
)
def test_rows_of_unequal_length_step_by_step(options):
    """Two prompts, of 7 and of 4 tokens, then token by token: every row as if it were alone."""
    with jax.enable_x64(True):
        model = moved(ModelConfig(**SMALL, **options))
        tokens, lengths = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB), np.array([CUT, 4])
        whole = nnx.jit(lambda model: model(tokens)[0])(model)
        _, statistics = nnx.jit(lambda model: model(tokens[:, :CUT]))(model)
        filled = tuple(c._replace(length=jnp.asarray(lengths)) for c in caches(statistics, None))

        @nnx.jit
        def step(model, filled, tokens):
            context = Context(cache=filled)
            logits, statistics = model(tokens, context)
            return logits, tuple(layer.cache for layer in statistics.attention)

        for number in range(T - CUT):
            at = lengths + number
            logits, filled = step(model, filled, tokens[np.arange(B), at][:, None])
            np.testing.assert_allclose(logits[:, 0], whole[np.arange(B), at], atol=1e-11, rtol=1e-10)
        assert (np.asarray(filled[0].length) == lengths + T - CUT).all()


def test_a_cache_that_is_full_gives_nan_where_its_length_is_traced():
    model = Decoder(ModelConfig(preset="oasis", **SMALL), rngs=nnx.Rngs(0))
    tokens = jnp.zeros((B, 3), jnp.int32)
    full = caches(model(tokens)[1], None, size=5, rest=0.0)
    step = nnx.jit(lambda model, full, tokens: model(tokens, Context(cache=full))[0])
    assert np.isfinite(step(model, full, tokens[:, :2])).all() and np.isnan(step(model, full, tokens)).all()
    rows = tuple(c._replace(length=jnp.array([2, 3])) for c in full)
    logits = np.asarray(step(model, rows, tokens))
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()


@pytest.mark.parametrize("segments", [False, True])
def test_a_step_copies_no_cache(segments):
    """By the compiler's figures, where the cache is given away: what comes back lies where the cache was, and what
    is needed beside it is far less than one more.
    """
    size, heads, head = 8192, 2, 16
    layer = Attention(AttentionConfig(width=32, num_heads=4, num_kv_heads=heads, head_dim=head), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    shape = lambda *sizes, dtype="float32": jax.ShapeDtypeStruct(sizes, dtype)
    entries, ids = shape(B, size, heads, head), shape(B, size, dtype="int32") if segments else None
    cache = KVCache(entries, entries, shape(dtype="int32"), ids)

    def step(state, cache, x):
        context = Context(cache=cache, segment_ids=jnp.ones(x.shape[:2], jnp.int32) if segments else None)
        y, statistics = nnx.merge(graphdef, state)(x, context)
        return y, statistics.cache

    compiled = jax.jit(step, donate_argnums=1).lower(state, cache, shape(B, 1, 32)).compile()
    memory, bytes_of_one = compiled.memory_analysis(), 4 * B * size * heads * head
    assert memory.alias_size_in_bytes >= 2 * bytes_of_one
    assert memory.temp_size_in_bytes < bytes_of_one / 4
