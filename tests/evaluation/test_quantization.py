"""Quantization of layers and models against numpy, and what a scheme leaves alone."""

import pathlib
import re

import jax
import numpy as np
import pytest
from evaluation.test_quantizers import EPS, normal, np_asymmetric, np_symmetric
from evaluation.toys import placed
from flax import nnx
from sampling import sampled

from oasis_jax.config import PRESETS, AttentionConfig, ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.evaluation.quantization import (
    SCHEMES,
    Calibration,
    Quantized,
    Recorder,
    Recording,
    calibrate,
    calibration_for,
    losses,
    parse_scheme,
    parse_schemes,
    quantization,
    rounded_tensors,
)
from oasis_jax.evaluation.quantization.inference import beside_float, tensor_roles
from oasis_jax.evaluation.quantization.weights import round_weight, smoothing_factors
from oasis_jax.model.attention import attention, attention_parameters
from oasis_jax.model.context import Context
from oasis_jax.model.decoder import Decoder, parameter_roles
from oasis_jax.model.numerics import Numerics
from oasis_jax.model.parameters import ROLES
from oasis_jax.placement import UNSHARDED

VOCAB = 29
SIZES = dict(num_layers=2, width=24, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=10)


def build(**fields) -> Decoder:
    sizes = SIZES | ({"vocab_size": VOCAB} if fields.get("inputs", "tokens") == "tokens" else {"vector_dim": 5})
    sizes |= {"blocks": 3} if "preset" in fields and PRESETS[fields["preset"]]["blocks"] else {}
    return Decoder(ModelConfig(**(sizes | fields)), rngs=nnx.Rngs(0))


def token_batches(count: int) -> list[dict]:
    random = np.random.default_rng(2)
    draw = lambda: random.integers(VOCAB, size=(3, 11), dtype=np.int32)
    return [{"inputs": draw(), "targets": draw(), "weights": np.ones((3, 11), np.float32)} for _ in range(count)]


class Plain(Numerics):
    """Overrides nothing, and is not the default object."""


@pytest.mark.parametrize("preset", sampled(PRESETS, ("oasis", "oasis_blocks", "sparsemax", "null_key_value")))
def test_numerics_that_change_nothing_change_no_bit(preset):
    model, inputs = build(preset=preset), token_batches(1)[0]["inputs"]
    expected, statistics = model(inputs)
    found, same = model(inputs, Context(numerics=Plain()))
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, same, statistics)


def test_a_scheme_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"^scheme: expected a Scheme, as parse_scheme\('w8a8'\) makes it, got 'w8a8'$"):
        Quantized("w8a8")


@pytest.mark.parametrize("normalizer", ["softmax", "softmax1", "learned_sink"])
def test_materialized_attention_is_the_fused_one(normalizer):
    config = AttentionConfig(
        width=24, num_heads=6, num_kv_heads=3, head_dim=10, normalizer=normalizer, window=5, logit_softcap=3.0
    )
    parameters = {
        name: 0.3 * normal(*spec.shape, seed=i) for i, (name, spec) in enumerate(attention_parameters(config).items())
    }
    segments = np.array([[0] * 4 + [1] * 7, [0] * 11])
    expected = attention(parameters, config, normal(2, 11, 24), Context(segment_ids=segments))
    found = attention(parameters, config, normal(2, 11, 24), Context(segment_ids=segments, numerics=Recorder()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=200 * EPS, rtol=0), found, expected)


def test_attention_with_everything_rounded_equals_numpy():
    config = AttentionConfig(width=9, num_heads=3, head_dim=5, normalizer="softmax1", rope_theta=0.0)
    parameters = {
        name: 0.5 * normal(*spec.shape, seed=i) for i, (name, spec) in enumerate(attention_parameters(config).items())
    }
    x = normal(2, 7, 9, seed=9)
    names = ("query", "key", "value", "output", "scores", "probabilities", "context")
    ranges = {name: (np.float32(-1.5 - i / 7), np.float32(1.2 + i / 9)) for i, name in enumerate(names)}
    numerics = Quantized(SCHEMES["w8a8_tensor"], Calibration(ranges))
    found, _ = attention(parameters, config, x, Context(numerics=numerics))

    def snap(name, y):
        return np_asymmetric(y, 8, *(float(end) for end in ranges[name]))

    weights = {name: np_symmetric(value.astype(float), 8) for name, value in parameters.items()}
    q, k, v = (
        np.einsum("BTD,DNH->BTNH", snap(name, x.astype(float)), weights[name]) for name in ("query", "key", "value")
    )
    s = np.exp(snap("scores", np.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(5)))
    s = np.where(np.tril(np.ones((7, 7), bool)), s, 0)
    p = snap("probabilities", s / (1 + s.sum(-1, keepdims=True)))
    context = snap("context", np.einsum("BNTS,BSNH->BTNH", p, v))
    expected = np.einsum("BTNH,NHD->BTD", snap("output", context), weights["output"])
    np.testing.assert_allclose(found, expected, atol=100 * EPS * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("keeps_first", [False, True])
@pytest.mark.parametrize("name, bits, everywhere", [("w16a6_tensor", 6, False), ("w8a8_tensor", 8, True)])
def test_the_first_token_in_float_equals_numpy(name, bits, everywhere, keeps_first):
    """Ranges as they come, or given; the first token of every row rounded as the others, or not at all and in no
    range.
    """
    config = AttentionConfig(width=9, num_heads=3, head_dim=5, normalizer="softmax1", rope_theta=0.0)
    parameters = {
        name: 0.5 * normal(*spec.shape, seed=i) for i, (name, spec) in enumerate(attention_parameters(config).items())
    }
    x = normal(2, 7, 9, seed=9)
    x[:, 0] *= 4
    given = {name: (np.float32(-2.5), np.float32(2.2)) for name in ("query", "key", "value", "output", "context")}
    given |= {"scores": (np.float32(-9.0), np.float32(7.0)), "probabilities": (np.float32(0.0), np.float32(0.9))}
    scheme = parse_scheme(name + "+sink_float" * keeps_first)
    numerics = Quantized(scheme, Calibration(given if everywhere else {}))
    found, _ = attention(parameters, config, x, Context(numerics=numerics))

    def snap(name, y, axis=1):
        if name in ("scores", "probabilities", "context") and not everywhere:
            return y
        rest = np.take(y, range(int(keeps_first), y.shape[axis]), axis)
        ends = given[name] if everywhere else (rest.min(), rest.max())
        rounded = np_asymmetric(y, bits, *(float(end) for end in ends))
        first = np.arange(y.shape[axis]).reshape(-1, *[1] * (y.ndim - 1 - axis)) == 0
        return np.where(first, y, rounded) if keeps_first else rounded

    weights = {name: np_symmetric(w.astype(float), 8) if everywhere else w for name, w in parameters.items()}
    q, k, v = (
        np.einsum("BTD,DNH->BTNH", snap(name, x.astype(float)), weights[name]) for name in ("query", "key", "value")
    )
    s = np.exp(snap("scores", np.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(5), 2))
    s = np.where(np.tril(np.ones((7, 7), bool)), s, 0)
    p = snap("probabilities", s / (1 + s.sum(-1, keepdims=True)), 2)
    context = snap("context", np.einsum("BNTS,BSNH->BTNH", p, v))
    expected = np.einsum("BTNH,NHD->BTD", snap("output", context), weights["output"])
    np.testing.assert_allclose(found, expected, atol=300 * EPS * np.abs(expected).max(), rtol=0)


def test_calibration_may_leave_the_first_token_out():
    model, batches = build(preset="residual"), token_batches(1)
    statistics = model(batches[0]["inputs"])[1]
    found = calibrate(*placed(model), batches, Recording(skip_first=True)).ranges
    seen = {
        "layer0.attention.query": statistics.taps["attention_norm"][0],
        "layer1.attention.context": statistics.attention[1].head_output,
        "layer1.mlp.residual_sum": statistics.taps["layer_output"][1],
    }
    for name, x in seen.items():
        np.testing.assert_allclose(found[name], (x[:, 1:].min(), x[:, 1:].max()), rtol=1e-5)


def test_d_sink_is_what_the_first_token_costs():
    """A begin token's embedding is made massive: its range leaves the other tokens few codes."""
    model, batches = build(preset="residual"), token_batches(2)
    for batch in batches:
        batch["inputs"][:, 0] = 7
        batch["inputs"][:, 1:] %= 7
    table = np.array(model.embedding.table[...])
    table[7, 3] = 500.0
    model.embedding.table[...] = table
    names = ["w8a8_tensor", "w8a8_tensor+sink_float", "w16a8"]
    found = quantization(*placed(model), batches, batches, parse_schemes(names))
    whole, kept, other = (found[name] for name in names)
    assert whole["d_sink"] == pytest.approx(whole["nats"] - kept["nats"], abs=1e-6)
    assert whole["d_sink_interval"][0] <= whole["d_sink"] <= whole["d_sink_interval"][1]
    assert "d_sink" not in kept and "d_sink" not in other


def test_ranges_are_running_ones_and_channels_the_largest():
    model, batches = build(preset="residual"), token_batches(3)
    statistics = [model(batch["inputs"])[1] for batch in batches]
    found = calibrate(*placed(model), batches)
    seen = {
        "layer0.attention.query": [s.taps["attention_norm"][0] for s in statistics],
        "layer1.mlp.gate": [s.taps["mlp_norm"][1] for s in statistics],
        "layer1.attention.context": [s.attention[1].head_output for s in statistics],
        "layer1.mlp.residual_sum": [s.taps["layer_output"][1] for s in statistics],
        "head": [s.taps["final_norm"][0] for s in statistics],
    }
    for name, arrays in seen.items():
        low, high = float(arrays[0].min()), float(arrays[0].max())
        for array in arrays[1:]:
            low, high = 0.9 * low + 0.1 * float(array.min()), 0.9 * high + 0.1 * float(array.max())
        np.testing.assert_allclose(found.ranges[name], (low, high), rtol=1e3 * EPS, err_msg=name)
    largest = np.abs(np.concatenate(seen["head"])).max((0, 1))
    np.testing.assert_allclose(found.channels["head"], largest, rtol=1e3 * EPS)


def test_smoothing_keeps_the_product_and_helps_where_a_channel_sticks_out():
    x, weight = normal(40, 20), normal(20, 30, seed=1)
    x[:, 3] *= 80
    x[:, 7], weight[11] = 0, 0
    factors = np.asarray(smoothing_factors(np.abs(x).max(0), weight))
    assert factors[7] == factors[11] == 1
    np.testing.assert_allclose(factors[3], np.sqrt(np.abs(x[:, 3]).max() / np.abs(weight[3]).max()), rtol=4 * EPS)
    exact = x.astype(float) @ weight
    np.testing.assert_allclose((x / factors) @ (weight * factors[:, None]), exact, atol=100 * EPS * np.abs(exact).max())
    error = {}
    for name in ("w8a8", "w8a8+smooth"):
        codes, found = round_weight(parse_scheme(name), weight, np.abs(x).max(0))
        calibration = Calibration({}, {} if found is None else {"a": found}, {"a": codes})
        y = Quantized(parse_scheme(name), calibration).einsum("a", "RD,DM->RM", x, weight)
        error[name] = np.square(y - exact).mean()
    assert error["w8a8+smooth"] < error["w8a8"] / 4


def test_smoothed_ranges_are_of_smoothed_inputs():
    model, batches = build(preset="residual"), token_batches(2)
    found = calibration_for(parse_scheme("w8a8_tensor+smooth"), *placed(model), batches)
    x = np.asarray(model(batches[0]["inputs"])[1].taps["final_norm"][0])
    second = np.asarray(model(batches[1]["inputs"])[1].taps["final_norm"][0])
    channels = calibrate(*placed(model), batches).channels["head"]
    factors = smoothing_factors(channels, model.embedding.parameters["table"].T)
    expected = 0.9 * (x / factors).max() + 0.1 * (second / factors).max()
    np.testing.assert_allclose(found.ranges["head"][1], expected, rtol=1e3 * EPS)


@pytest.mark.parametrize("preset", sampled(PRESETS, ("residual", "oasis", "oasis_blocks", "gated", "token_null")))
@pytest.mark.parametrize("name", ["w8a8_tensor+float_head", "w8a8"])
def test_what_is_rounded(preset, name):
    model = build(preset=preset)
    tensors = rounded_tensors(model.parameters(), model.config, token_batches(1)[0], parse_scheme(name))
    reference, roles = name.startswith("w8a8_tensor"), tensor_roles(model.config)
    assert sum(np.size(x) > 0 for x in jax.tree.leaves(model.parameters())) == len(roles)
    for tensor, role in roles.items():
        if not ROLES[role].multiplies:
            assert tensors[tensor] == f"float: {role}", tensor
        elif tensor != "embedding":
            assert tensors[tensor].startswith("weight int8"), tensor
    head = "float, by option" if reference else "weight int8, a scale per output channel"
    assert tensors["head"].startswith(head)
    others = {"embedding", "layer1.attention.context"}
    others |= {part for part in tensors if part.endswith(("residual_sum", "mixture"))}
    assert len(others) > 2
    assert all(tensors[part].startswith("int8" if reference else "float") for part in others)
    assert ("layer1.attention.scores" in tensors) == ("layer1.attention.probabilities" in tensors)
    assert not reference or "layer1.attention.scores" in tensors


ODD = dict(
    vocab_size=VOCAB,
    norm="layernorm",
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm=True,
    learned_positions=11,
    tied_head=False,
    norm_epsilon=1e-5,
)


def on_the_grid(path, x: np.ndarray, config: ModelConfig, random: np.random.Generator) -> np.ndarray:
    """A parameter that four bits hold where its role says that activations are multiplied with it; any numbers
    elsewhere.
    """
    names, role = [key.key for key in path if isinstance(key.key, str)], parameter_roles(config)
    for name in names:
        role = role[name]
    if not ROLES[role].multiplies or names[-1] == "positions":
        return (x + 0.3 * random.standard_normal(x.shape)).astype(np.float32)
    codes = random.integers(-7, 8, x.shape)
    # Every output channel has the largest code, so that its scale is 1 / 64.
    first = {("routers", "key"): np.s_[:, 0], ("layers", "output"): np.s_[0, 0]}.get((names[0], names[-1]), 0)
    codes[first] = 7
    return codes.astype(np.float32) / 64


@pytest.mark.parametrize("normalizer", ["learned_sink", "null_key_value", "token_null"])
def test_biases_nulls_and_norms_are_never_rounded(normalizer):
    """Matrices that lie on the grid of weights already are what rounding leaves alone: with activations in float the
    loss is that of float, whatever biases, nulls and gains are.
    """
    fields = SIZES | ODD | dict(preset="oasis", normalizer=normalizer)
    config, random = ModelConfig(**fields), np.random.default_rng(3)
    roles = tensor_roles(config)
    assert {"bias", "null", "norm", "router", "matrix", "router_matrix", "embedding"} == set(roles.values())
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: on_the_grid(path, x, config, random), Decoder(config, rngs=nnx.Rngs(0)).parameters()
    )
    model, batches = (params, config, UNSHARDED), token_batches(1)
    tensors = rounded_tensors(params, config, batches[0], parse_scheme("w4a16_g128"))
    for name in ("layer0.attention.query_bias", "layer1.mlp.down_bias", "layer1.mlp_norm.bias", "final_norm.scale"):
        assert tensors[name] == f"float: {roles[name]}"
    assert any(name.startswith("layer0.attention.null_") and tensors[name] == "float: null" for name in roles)
    found = losses(*model, batches, parse_scheme("w4a16_g128"), Calibration())["loss"]
    np.testing.assert_allclose(found, losses(*model, batches)["loss"], rtol=1e-5)
    # A null, a bias or a gain on that grid would be another model.
    moved = jax.tree_util.tree_map_with_path(lambda path, x: np.round(x * 16) / 16 if x.ndim < 2 else x, params)
    other = losses(moved, config, UNSHARDED, batches)["loss"]
    assert np.abs(other / losses(*model, batches)["loss"] - 1).max() > 1e-4


@pytest.mark.parametrize(
    "name",
    sampled(
        [*SCHEMES, "w8a8_tensor+mse+smooth"],
        ("w8a8_tensor", "w16a8_tensor", "w8a8", "w4a4_g32", "fp8", "w8a8_tensor+mse+smooth"),
    ),
)
def test_schemes_cost_little_with_many_bits_and_more_with_few(name):
    model, batches = build(preset="oasis"), token_batches(2)
    found = quantization(*placed(model), batches, batches, {name: parse_scheme(name)})[name]
    error = abs(found["relative_change"])
    assert 0 < error < (0.1 if "4" in name else 0.02)
    assert found["value"] == pytest.approx(found["float"] * (1 + found["relative_change"]))
    assert found["interval"][0] <= found["relative_change"] <= found["interval"][1]


@pytest.mark.parametrize("name", ["w8a8_tensor", "w8a8+smooth", "w4a4_g32", "fp8"])
def test_a_model_on_integers_agrees_with_the_simulated_one(name):
    model, batches = build(preset="oasis"), token_batches(2)
    exact, simulated, integer = (
        losses(*placed(model), batches, scheme, scheme and calibration_for(scheme, *placed(model), batches))["loss"]
        for scheme in (None, parse_scheme(name), parse_scheme(f"{name}+integer"))
    )
    # Sums in another order may push an activation over the middle between two codes, never many of them.
    assert np.abs(integer - simulated).max() < 0.1 * np.abs(simulated - exact).max()


def test_a_model_of_vectors_is_measured_by_its_squared_error():
    model = build(preset="attnres", inputs="vectors")
    batch = {"inputs": normal(3, 11, 5), "targets": normal(3, 11, 5, seed=1), "weights": np.ones((3, 11), np.float32)}
    found = quantization(*placed(model), [batch], [batch], parse_schemes(["w8a8"]))["w8a8"]
    expected = np.square(np.asarray(model(batch["inputs"])[0]) - batch["targets"]).mean()
    assert found["float"] == pytest.approx(expected, rel=1e-5)
    assert found["tensors"]["embedding"].startswith("weight int8")


def test_a_rematerialized_and_a_bfloat16_model_can_be_calibrated_and_rounded():
    model, batches = build(preset="oasis", remat="layer", dtype="bfloat16"), token_batches(1)
    found = quantization(*placed(model), batches, batches, parse_schemes(["w8a8_tensor"]))["w8a8_tensor"]
    assert 0 < abs(found["relative_change"]) < 0.1


def test_relative_change_by_hand():
    rows, base = ({"loss": np.array(losses, float), "weight": np.array([2.0, 2.0])} for losses in ([6, 2.4], [5, 2]))
    found = beside_float(rows, base, perplexity=True)
    assert (found["value"], found["float"]) == pytest.approx((np.exp(2.1), np.exp(1.75)))
    assert found["relative_change"] == pytest.approx(np.exp(0.35) - 1)
    assert found["interval"] == pytest.approx(
        [np.exp(0.2) - 1, np.exp(0.5) - 1]
    )  # all draws of the one, or of the other sequence
    one = {name: row[:1] for name, row in rows.items()}, {name: row[:1] for name, row in base.items()}
    assert beside_float(*one, perplexity=False)["interval"] is None
    assert beside_float(*one, perplexity=False)["relative_change"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("w8a9", r"^--quantize: unknown name 'w8a9' \(did you mean 'w8a8'\?\); allowed: w8a8_tensor, w16a8_tensor, "),
        ("w8a8,", r"^--quantize: unknown name ''; allowed: "),
        ("fp8+smoth", r"^--quantize: option of fp8: unknown name 'smoth' \(did you mean 'smooth'\?\); allowed: mse, "),
        ("fp8,w8a8,fp8", r"^--quantize: 'fp8' is given twice$"),
        (
            "w4a16_g128+integer",
            r"^--quantize: w4a16_g128\+integer: activations stay in float, so there is no integer product",
        ),
        ("w16a8+integer", r"^--quantize: w16a8\+integer: weights stay in float, so there is no integer product"),
        ("w16a8+mse", r"^--quantize: w16a8\+mse: weights stay in float, so no range of theirs is clipped"),
        ("w8a8+integer+sink_float", r"products are of integers, so a token cannot be left out"),
    ],
)
def test_schemes_that_there_are_not(text, says):
    with pytest.raises(UserError, match=says):
        parse_schemes(text.split(","))


def test_no_calibration_batch():
    with pytest.raises(UserError, match="there is no batch"):
        calibrate(*placed(build()), [])


def test_the_example_of_the_documentation():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "quantization.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(compile(example, "docs/quantization.md", "exec"), names)
    difference = np.abs(names["logits"] - names["model"](names["tokens"])[0])
    assert 1e-4 < difference.max() < 0.5


@pytest.mark.parametrize("site", ["mlp.down", "layer1", "residual_sum", "attention.probabilities", "head", "embedding"])
def test_a_site_alone_is_rounded(site):
    model = build(preset="oasis")
    whole = rounded_tensors(model.parameters(), model.config, token_batches(1)[0], parse_scheme("w8a8_tensor"))
    part = rounded_tensors(model.parameters(), model.config, token_batches(1)[0], parse_scheme(f"w8a8_tensor@{site}"))
    there = [name for name, how in whole.items() if not how.startswith("float") and f".{site}." in f".{name}."]
    assert there and [name for name, how in part.items() if not how.startswith("float")] == there
    assert all(part[name] == whole[name] for name in there)


def test_a_site_is_rounded_as_if_the_rest_of_the_scheme_were_not_there():
    """By hand: the layers' down projections get what the scheme gives them, everything else is float."""
    model, batches = build(preset="residual"), token_batches(2)
    scheme = parse_scheme("w8a8@mlp.down")

    class Down(Quantized):
        def einsum(self, name, equation, x, weight, **options):
            if name == "down":
                return super().einsum(name, equation, x, weight, **options)
            return Numerics.einsum(self, name, equation, x, weight, **options)

    by_hand, _ = model(batches[0]["inputs"], Context(numerics=Down(parse_scheme("w8a8"))))
    found, _ = model(batches[0]["inputs"], Context(numerics=Quantized(scheme)))
    plain, _ = model(batches[0]["inputs"])
    np.testing.assert_array_equal(found, by_hand)
    assert np.abs(found - plain).max() > 1e-4
    rows = losses(*placed(model), batches, scheme, calibration_for(scheme, *placed(model), batches))
    layers = [losses(*placed(model), batches, parse_scheme(f"w8a8@layer{i}.mlp.down")) for i in range(2)]
    assert len({float(part["loss"].sum()) for part in (rows, *layers)}) == 3  # in a loop, and layer by layer


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("w8a8@mlp.dwn", "site of w8a8@mlp.dwn.*mlp.down"),
        ("w8a8@attention.scores", "nothing at attention.scores is rounded|site of"),
        ("w8a8@layer7", "site of w8a8@layer7"),
    ],
)
def test_a_site_that_is_not_there(scheme, words):
    model, batches = build(preset="residual"), token_batches(1)
    with pytest.raises(UserError, match=words):
        quantization(*placed(model), batches, batches, {scheme: parse_scheme(scheme)})


@pytest.mark.parametrize("text", ["w8a8@", "w8a8@mlp.", "w8a8@.down", "w8a8@@mlp"])
def test_a_site_needs_a_name(text):
    with pytest.raises(UserError, match=r"behind @ comes|site of"):
        model = build(preset="residual")
        quantization(*placed(model), token_batches(1), token_batches(1), {text: parse_scheme(text)})
