"""Attention after a cache: a pass over the rest of a text equals the tail of one pass over all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oasis_jax import PRESETS, Context, Decoder, LayerPattern, ModelConfig, UserError
from oasis_jax.model.context import Cache
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


def caches(statistics, segment_ids):
    return tuple(Cache(layer.key, layer.value, segment_ids) for layer in statistics.attention)


CASES = [
    *(dict(preset=preset, **(dict(blocks=3) if preset == "oasis_blocks" else {})) for preset in PRESETS),
    dict(preset="oasis", window=3, logit_softcap=2.0, qk_norm=True),
    dict(preset="softmax1", normalizer="clipped", clip_gamma=-0.03, window=3),
    dict(preset="attnres", layer_pattern=(LayerPattern(window=4), LayerPattern(rope_theta=0.0))),
    dict(preset="residual", rope_theta=0.0, learned_positions=T + 2, position_offset=2, norm="layernorm"),
]


NAMES = ["-".join(str(v) for v in options.values() if not isinstance(v, tuple)) for options in CASES]
NOW = ("oasis", "oasis_blocks-3", "entmax15", "token_null", "null_key_value", "oasis-3-2.0-True")
PACKED = [
    pytest.param(
        options, True, id=f"{name}-packed", marks=() if name in NOW or number >= len(PRESETS) else pytest.mark.slow
    )
    for number, (name, options) in enumerate(zip(NAMES, CASES))
]
ALONE = [pytest.param(options, False, id=name) for name, options in zip(NAMES, CASES) if name in ("oasis", "null_key")]


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
    statistics = model(tokens)[1]
    short = tuple(Cache(layer.key[:1], layer.value[:1]) for layer in statistics.attention)
    with pytest.raises(UserError, match=r"context.cache: key and value must have one shape \[2, S, K, H\]"):
        model(tokens, Context(cache=short))
    with pytest.raises(UserError, match=r"context\.cache: needs segment_ids"):
        model(tokens, Context(segment_ids=jnp.zeros((B, 3), jnp.int32), cache=caches(statistics, None)))
    with pytest.raises(UserError, match=r"context\.cache: layers run as a loop have none"):
        run_loop({}, model.config, jnp.ones((B, 3, 16)), Context(cache=caches(statistics, None)))
