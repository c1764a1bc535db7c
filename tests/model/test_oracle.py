"""The decoder in float64 against plain numpy, for every preset and every field that changes what a layer computes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model import oracle
from sampling import sampled

from oasis_jax import PRESETS, Decoder, ModelConfig
from oasis_jax.config import LayerPattern, RopeScaling
from oasis_jax.model.context import Context

B, T, VOCAB, VECTOR = 2, 13, 29, 7
SMALL = dict(width=15, num_heads=6, num_kv_heads=2, head_dim=10, num_layers=2, mlp_dim=21, vocab_size=VOCAB)
PACKED = dict(  # three documents a row
    segment_ids=np.array([[0] * 5 + [1] * 3 + [2] * 5, [4] * 1 + [7] * 9 + [9] * 3]),
    positions=np.concatenate([np.r_[0:5, 0:3, 0:5], np.r_[0:1, 0:9, 0:3]]).reshape(B, T),
)
FAR = dict(positions=17 * np.arange(T)[None])
YARN = dict(kind="yarn", factor=6.0, original_length=64)
LONGROPE = dict(
    kind="longrope", factor=8.0, short_factors=(1.0, 1.2, 1.1, 1.7, 1.9), long_factors=(1.5, 2.5, 3.0, 7.0, 5.0)
)
ODD = dict(
    width=15, num_heads=6, num_kv_heads=3, head_dim=14, num_layers=3, mlp_dim=21, vocab_size=VOCAB, qkv_bias=True,
    output_bias=True, attention_scale=0.2, logit_softcap=5.0, qk_norm=True, norm="layernorm", norm_epsilon=1e-3,
    mlp_activation="gelu_tanh", mlp_gated=False, mlp_bias=True, rope_fraction=0.75,
    rope_scaling=RopeScaling(kind="linear", factor=3.0), learned_positions=T + 2, position_offset=2,
    layer_pattern=(LayerPattern(window=5, rope_theta=100.0), LayerPattern(window=0, rope_theta=0.0),
                   LayerPattern(window=3, rope_theta=1e4)),
    embedding_multiplier=1.5, residual_multiplier=0.7, logits_multiplier=0.3, residual_clip=2.0, tied_head=False,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """The models here are tiny and run once: what takes time is to compile them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def in_float64(config: ModelConfig) -> ModelConfig:
    """The config, computing in float64, which no schema allows a user."""
    layers = [config.layer(i) for i in range(config.num_layers)]
    for one in (config, *layers):
        object.__setattr__(one, "dtype", "float64")
    object.__setattr__(config, "layer", layers.__getitem__)
    return config


def moved_decoder(config: ModelConfig) -> tuple[Decoder, dict]:
    """A decoder with every parameter away from its start, in float64, and those parameters; the couplings lie on both
    sides of their upper bound.
    """
    rng = np.random.default_rng(3)

    def move(path, x):
        if "beta_raw" in jax.tree_util.keystr(path):
            return rng.uniform(-5.0, 15.0, x.shape)
        return np.asarray(x, np.float64) + 0.3 * rng.standard_normal(x.shape)

    graphdef, state = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    decoder = nnx.merge(graphdef, jax.tree_util.tree_map_with_path(move, state))
    return decoder, decoder.parameters()


def random_inputs(config: ModelConfig) -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.integers(0, VOCAB, (B, T)) if config.inputs == "tokens" else rng.standard_normal((B, T, VECTOR))


def library(config: ModelConfig, **context) -> tuple[dict, dict]:
    """What `oracle.forward` returns, as far as the library gives it, and the parameters."""
    decoder, params = moved_decoder(config)
    graphdef, state = nnx.split(decoder)

    @jax.jit
    def run(state, inputs, context):
        logits, statistics = nnx.merge(graphdef, state)(inputs, context)
        return dict(
            logits=logits,
            null_mass=[layer.null_mass for layer in statistics.attention],
            first_token_mass=[layer.first_token_mass for layer in statistics.attention],
            layer_outputs=statistics.taps["layer_output"],
            router_weights={name: router.weights for name, router in statistics.routers.items()},
            router_null_mass={name: router.null_mass for name, router in statistics.routers.items()},
        )

    with jax.enable_x64(True):
        context = Context(**{name: jnp.asarray(value) for name, value in context.items()})
        return jax.tree.map(np.asarray, run(state, random_inputs(config), context)), params


def check(options: dict, **context) -> None:
    config = in_float64(ModelConfig(**(SMALL | options)))
    actual, params = library(config, **context)
    expected = oracle.forward(params, config, random_inputs(config), **context)
    assert actual["logits"].dtype == np.float64
    assert np.abs(expected["logits"]).max() > 0.1
    for name in actual:
        jax.tree_util.tree_map_with_path(
            lambda path, x, y, name=name: np.testing.assert_allclose(
                x, y, rtol=1e-10, atol=1e-10, err_msg=name + jax.tree_util.keystr(path)
            ),
            actual[name],
            expected[name],
        )


def named(options: dict) -> str:
    return "-".join(f"{name}={getattr(value, 'kind', value)}" for name, value in options.items())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    check(dict(preset=preset, **(dict(blocks=3) if PRESETS[preset]["blocks"] else {})))


@pytest.mark.parametrize(
    "options",
    [
        dict(preset="attnres", blocks=2, num_layers=3, normalizer="null_key"),
        dict(preset="oasis_blocks", blocks=4, num_layers=3),  # sizes 2, 2, 1, 1
        dict(preset="oasis_blocks", blocks=1, normalizer="clipped"),
        dict(preset="attnres", coupling=True, normalizer="token_null"),
        dict(preset="oasis", router="static"),
        dict(preset="oasis_blocks", blocks=3, router="projected"),
        dict(preset="attnres", depth_normalizer="softmax1", residual_clip=0.7),
        dict(preset="oasis", depth_normalizer="sigmoid"),
        dict(preset="oasis", fixed_beta=2.5),
        dict(preset="attnres_qkv", blocks=4, num_layers=3, gate="per_head", normalizer="token_null", coupling=True),
        dict(preset="oasis_blocks", blocks=3, depth_normalizer="sigmoid"),
        dict(preset="oasis_blocks", blocks=3, output_norm=True, residual_clip=0.9, norm_epsilon=0.1),
        dict(preset="attnres_cumulative", depth_normalizer="uniform"),
        dict(preset="attnres", blocks=3, depth_normalizer="uniform"),
        dict(preset="oasis", embedding_multiplier=20.0),  # scores of routers beyond +-50
        dict(preset="oasis", residual_clip=0.7, residual_multiplier=0.6),
        dict(preset="oasis_blocks", blocks=3, residual_clip=0.7, residual_multiplier=0.6),
    ],
    ids=named,
)
def test_wirings(options):
    check(options)


@pytest.mark.parametrize(
    "options",
    [
        dict(normalizer="softpick"),
        dict(normalizer="softpick", logit_softcap=1.5, window=4),
        dict(normalizer="clipped", clip_gamma=-0.1, clip_zeta=1.2),
        dict(normalizer="null_key", logit_softcap=1.5, qk_norm=True, null_keys=3),
        dict(normalizer="null_key_value", logit_softcap=1.5, attention_scale=0.4, window=1),
        dict(normalizer="token_null", logit_softcap=1.5, num_kv_heads=0),
        dict(gate="per_head", normalizer="learned_sink"),
        dict(gate="elementwise", normalizer="null_key_value", null_keys=2),
        dict(gate="affine"),
        dict(gate="affine", normalizer="sparsemax", window=4, num_kv_heads=1),
        dict(qk_norm=True, norm_epsilon=0.1),
        dict(qk_norm=True, rope_theta=0.0, head_dim=7, qkv_bias=True),
        dict(rope_fraction=0.6, output_bias=True),
        dict(attention_scale=0.7, num_kv_heads=1),
        dict(head_dim=0, width=18, num_heads=3, num_kv_heads=0),
    ],
    ids=named,
)
def test_attention(options):
    check(dict(preset="residual", num_layers=1) | options)


@pytest.mark.parametrize(
    "preset", sampled(["residual", "oasis", "oasis_blocks", "sparsemax", "null_key"], ("oasis_blocks", "sparsemax"))
)
def test_windows(preset):
    check(dict(preset=preset, window=4, **(dict(blocks=2) if PRESETS[preset]["blocks"] else {})))


@pytest.mark.parametrize(
    "preset",
    sampled(
        ["residual", "oasis", "oasis_blocks", "clipped", "entmax15", "null_key_value", "token_null"],
        ("oasis", "clipped", "null_key_value"),
    ),
)
def test_packed_documents_with_positions_that_start_over(preset):
    blocks = dict(blocks=3) if PRESETS[preset]["blocks"] else {}
    check(dict(preset=preset, window=4, learned_positions=11, position_offset=2, **blocks), **PACKED)


@pytest.mark.parametrize("name", PACKED)
def test_positions_and_segments_alone(name):
    check(dict(preset="oasis"), **{name: PACKED[name]})


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "preaffine", "gatednorm", "dyt", "none"])
def test_norms(norm):
    check(dict(preset="residual", norm=norm, norm_epsilon=0.01))


@pytest.mark.parametrize(
    "mlp_activation, mlp_gated",
    sampled(
        itertools.product(["silu", "gelu", "gelu_tanh", "relu"], [True, False]),
        [("silu", True), ("gelu", False), ("gelu_tanh", True), ("relu", False)],
    ),
)
def test_mlps(mlp_activation, mlp_gated):
    mlp_bias = (mlp_activation in ("silu", "relu")) == mlp_gated  # each of the four combinations twice
    mlp = dict(mlp_activation=mlp_activation, mlp_gated=mlp_gated, mlp_bias=mlp_bias)
    check(dict(preset="residual", num_layers=1, **mlp))


@pytest.mark.parametrize(
    "scaling",
    [
        dict(kind="linear", factor=4.0),
        dict(
            kind="llama3", factor=8.0, original_length=64
        ),  # of five channels some stay, some are divided, one is mixed
        dict(kind="llama3", factor=32.0, original_length=100, low_frequency_factor=0.5, high_frequency_factor=3.0),
        YARN,
        YARN | dict(beta_fast=4.0, beta_slow=0.5),
        YARN | dict(attention_factor=1.7, original_length=4),  # both bounds of the ramp on the first channel
        LONGROPE | dict(original_length=64),
        LONGROPE | dict(original_length=64, attention_factor=0.8),
        LONGROPE | dict(original_length=17 * (T - 1)),  # the largest position + 1 is one more
        LONGROPE | dict(original_length=17 * (T - 1) + 1),  # and here it fits
    ],
    ids=str,
)
def test_rope_scaling_beyond_the_original_length(scaling):
    check(dict(preset="residual", num_layers=1, rope_scaling=RopeScaling(**scaling)), **FAR)


@pytest.mark.parametrize("offset", [0, 1])
def test_longrope_counts_the_offset(offset):
    scaling = RopeScaling(**LONGROPE, original_length=T)
    check(dict(preset="residual", num_layers=1, rope_scaling=scaling, position_offset=offset))


def test_longrope_decides_for_the_whole_batch():
    positions = np.stack([np.arange(T), np.arange(T) + 40])
    check(
        dict(preset="residual", num_layers=1, rope_scaling=RopeScaling(**LONGROPE, original_length=T)),
        positions=positions,
    )


@pytest.mark.parametrize("preset", ["residual", "oasis", "oasis_blocks", "entmax15"])
def test_layer_patterns(preset):
    pattern = (LayerPattern(window=4, rope_theta=50.0), LayerPattern(window=0, rope_theta=0.0))
    blocks = dict(blocks=3) if PRESETS[preset]["blocks"] else {}
    check(dict(preset=preset, num_layers=4, layer_pattern=pattern, window=2, rope_theta=7.0, **blocks))


@pytest.mark.parametrize(
    "options",
    [
        dict(tied_head=True, logits_multiplier=0.3, embedding_multiplier=2.5),
        dict(tied_head=False, learned_positions=T, rope_theta=0.0),
        dict(inputs="vectors", vector_dim=VECTOR, embedding_multiplier=2.5),
        dict(inputs="vectors", vector_dim=VECTOR, learned_positions=T + 3, position_offset=3),
    ],
    ids=named,
)
def test_embeddings_and_heads(options):
    check(dict(preset="residual", num_layers=1) | options)


@pytest.mark.parametrize(
    "preset",
    sampled(["residual", "oasis", "oasis_blocks", "null_key_value", "token_null"], ("oasis", "null_key_value")),
)
def test_all_odd_fields_at_once(preset):
    blocks = dict(blocks=4) if PRESETS[preset]["blocks"] else {}
    check(ODD | dict(preset=preset, **blocks), **PACKED)


def test_all_odd_fields_at_once_in_one_document():
    check(ODD | dict(preset="oasis"))


def test_every_odd_field_counts():
    """Of the fields that leave the parameters' shapes alone: the comparison above would see each of them ignored."""
    config = ModelConfig(**ODD, preset="residual")
    params = moved_decoder(config)[1]
    inputs = random_inputs(config)
    expected = oracle.forward(params, config, inputs)["logits"]
    fields = {field.name: field.default for field in dataclasses.fields(ModelConfig) if field.name in ODD}
    shapes = {"width", "num_heads", "num_kv_heads", "head_dim", "num_layers", "mlp_dim", "mlp_gated", "vocab_size"}
    for name in fields.keys() - shapes:
        changed = dataclasses.replace(config, **{name: fields[name]})
        difference = np.abs(oracle.forward(params, changed, inputs)["logits"] - expected).max()
        assert difference > 1e-4, name
