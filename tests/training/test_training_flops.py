"""FLOPs counted from a config against the products in the traced model."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from oasis_jax.config import LayerPattern, ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.model.decoder import Decoder
from oasis_jax.training.flops import forward_flops, peak_flops, training_flops
from oasis_jax.training.profiling import parse_steps

LENGTH = 11


def products(jaxpr) -> float:
    """The FLOPs of every dot_general in a jaxpr."""
    total = 0.0
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += (
                products(getattr(inner, "jaxpr", inner)) if hasattr(inner, "eqns") or hasattr(inner, "jaxpr") else 0.0
            )
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, output = equation.invars[0].aval, equation.outvars[0].aval
            total += 2.0 * math.prod(output.shape) * math.prod(left.shape[i] for i in contracted)
    return total


def traced(config: ModelConfig) -> float:
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    return products(jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x)[0])(state, tokens).jaxpr)


def make(preset: str, **fields) -> ModelConfig:
    shape = dict(num_layers=3, width=20, num_heads=6, num_kv_heads=2, head_dim=4, mlp_dim=28, vocab_size=41)
    plain = dict(attention_implementation="reference", depth_implementation="reference")
    return ModelConfig(preset=preset, **(shape | plain | fields))


@pytest.mark.parametrize(
    "preset, fields",
    [
        ("residual", {}),
        ("attnres", {}),
        ("oasis", {}),
        ("oasis_blocks", dict(blocks=2)),
        ("gated", {}),
        ("attnres_qkv", dict(blocks=2)),
        ("oasis", dict(depth_normalizer="sigmoid", depth_implementation="auto")),
        ("residual", dict(norm="gatednorm")),
        ("residual", dict(norm="layernorm", qkv_bias=True, output_bias=True, mlp_bias=True, mlp_gated=False)),
        ("learned_sink", dict(gate="per_head", tied_head=False, learned_positions=LENGTH, qk_norm=True)),
    ],
)
def test_counts_are_the_products_of_the_traced_model(preset, fields):
    config = make(preset, **fields)
    counted = forward_flops(config, LENGTH)
    # The reference computes all keys and masks; a causal query sees (T + 1) / 2 of T on average.
    whole = counted["attention"] * 2 * LENGTH / (LENGTH + 1)
    # First-token mass costs one more score per query and head: part of the statistics, dropped by the compiler where
    # nobody reads it.
    statistics = 2.0 * config.num_layers * config.num_heads * config.head_size
    assert traced(config) == pytest.approx(
        LENGTH * (sum(counted.values()) - counted["attention"] + whole + statistics), rel=1e-12
    )


def test_uniform_weights_need_no_scores():
    routing = lambda **fields: forward_flops(make("attnres", **fields), LENGTH)["routing"]
    assert 2 * routing(depth_normalizer="uniform") == routing() > 0


def test_a_window_leaves_keys_out():
    seen = lambda window: forward_flops(make("residual", window=window), 8)["attention"]
    assert seen(1) * 4.5 == seen(0) and seen(8) == seen(0)
    assert seen(3) == pytest.approx(seen(1) * (1 + 2 + 6 * 3) / 8)


def test_a_pattern_counts_each_layer_by_its_own_window():
    seen = lambda **fields: forward_flops(make("residual", **fields), 8)["attention"]
    pattern = (LayerPattern(window=1), LayerPattern(window=3), LayerPattern())
    each = [seen(window=entry.window) / 3 for entry in pattern]
    assert seen(layer_pattern=pattern, window=5) == pytest.approx(sum(each), rel=1e-12)


def test_training_is_three_forward_passes():
    assert training_flops(make("oasis"), LENGTH) == 3 * sum(forward_flops(make("oasis"), LENGTH).values())


def test_peaks_go_by_the_longest_name():
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12
    assert peak_flops("cpu") is None


@pytest.mark.parametrize("text", ["10", "5:5", "0:3", "a:b", "-1:4", ""])
def test_steps_to_trace_that_cannot_be_are_refused(text):
    assert parse_steps("10:15") == (10, 15)
    with pytest.raises(UserError, match="--profile: expected FIRST:END"):
        parse_steps(text)
