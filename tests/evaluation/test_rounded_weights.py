"""Weights that are rounded once: GPTQ, AWQ and rotation against numpy, and models that carry their codes."""

import jax
import numpy as np
import pytest
from evaluation.test_quantization import build, token_batches
from evaluation.test_quantizers import EPS, normal, np_symmetric
from evaluation.toys import placed
from sampling import sampled

from oasis_jax.errors import UserError
from oasis_jax.evaluation.quantization import (
    SCHEMES,
    Calibration,
    Quantized,
    Recording,
    calibrate,
    calibration_for,
    losses,
    parse_scheme,
    quantized,
)
from oasis_jax.evaluation.quantization.weights import awq_factors, output_error, round_weight, turned
from oasis_jax.model.context import Context
from oasis_jax.pretrained.load import Pretrained


def inputs_of(size: int, tokens: int = 300) -> np.ndarray:
    """Inputs of a linear layer whose channels go together, one of which never speaks."""
    x = normal(tokens, size) @ normal(size, size, seed=1) / np.float32(np.sqrt(size)) + normal(tokens, size, seed=2)
    x[:, 4] = 0
    return x


def np_gptq(weight: np.ndarray, x: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Optimal brain quantization in the order of the contraction (arXiv 2210.17323, section 3.1), by the inverse of
    what is left of H, anew for every term; float64.
    """
    products = x.T @ x
    mean = np.diagonal(products).mean()
    dead = np.diagonal(products) == 0
    products = products + np.diag(np.where(dead, mean, 0) + 0.01 * mean)
    weight, found = weight.copy(), np.zeros_like(weight)
    scales = np.concatenate(
        [
            np.repeat(np.abs(weight[i : i + group]).max(0, keepdims=True) / (2 ** (bits - 1) - 1), group, 0)
            for i in range(0, len(weight), group)
        ]
    )[: len(weight)]
    for i in range(len(weight)):
        found[i] = np.clip(np.round(weight[i] / scales[i]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scales[i]
        inverse = np.linalg.inv(products[i:, i:])
        weight[i:] -= inverse[:, :1] * (weight[i] - found[i]) / inverse[0, 0]
    return found


@pytest.mark.parametrize(("name", "group"), [("w4a16_g128", 128), ("w4a4_g32", 32), ("w4a4_token", 0)])
@pytest.mark.parametrize("size", [37, 150])
def test_gptq_equals_numpy(name, group, size):
    """Ties aside: float32 may send one code of a few thousand, and what follows it in its column, another way."""
    x, weight = inputs_of(size), normal(size, 11, seed=3)
    codes, factors = round_weight(parse_scheme(f"{name}+gptq"), weight, None, x.T @ x)
    values = np.asarray(codes.values()).reshape(-1, 11)[:size]
    expected = np_gptq(weight.astype(float), x.astype(float), 4, group or size)
    same = np.isclose(values, expected, rtol=20 * EPS, atol=20 * EPS).all(0)
    assert factors is None and same.mean() > 0.7
    error = lambda found: float(output_error(np.asarray(found, np.float32) - weight, x.T @ x))
    nearest = round_weight(parse_scheme(name), weight).codes.values()
    assert error(values) == pytest.approx(error(expected), rel=0.02)
    assert error(values) < 0.9 * error(np.asarray(nearest).reshape(-1, 11)[:size])


@pytest.mark.parametrize("name", ["w8a8_tensor", "fp8", "nvfp4", "mxfp4", "w4a4_g32+smooth", "w4a4_g32+awq+rotate"])
def test_gptq_goes_with_every_grid(name):
    x, weight = inputs_of(50), normal(50, 7, seed=3)
    recorded = np.abs(turned(x) if "rotate" in name else x).max(0), None
    products = (lambda y: y.T @ y)(np.asarray(turned(x) if "rotate" in name else x))
    errors = []
    for option in ("", "+gptq"):
        codes, factors = round_weight(parse_scheme(name + option), weight, recorded[0], products)
        values = np.asarray(codes.values()).reshape(-1, 7)[:50]
        target = np.asarray(turned(weight.T).T if "rotate" in name else weight)
        values = values if factors is None else values / np.asarray(factors)[:, None]
        errors.append(float(output_error(values - target, products)))
    assert 0 < errors[1] < errors[0]


def test_awq_takes_the_power_that_costs_least():
    x, weight = inputs_of(64) * np.exp(2 * normal(64, seed=5), dtype=np.float32), normal(64, 9, seed=3)
    products = x.T @ x
    size = np.sqrt(np.maximum(np.diagonal(products).astype(float), 0))
    size = np.maximum(size / size.max(), 1e-4)
    errors, factors = [], []
    for power in np.linspace(0, 1, 20):
        s = size**power / np.sqrt((size**power).max() * (size**power).min())
        scaled = weight * s[:, None]
        parts = [np_symmetric(scaled[i : i + 32], 4, 0) for i in (0, 32)]
        errors.append(np.square(x @ (np.concatenate(parts) / s[:, None] - weight)).sum())
        factors.append(s)
    found = awq_factors(SCHEMES["w4a4_g32"], weight, products)
    np.testing.assert_allclose(found, factors[np.argmin(errors)], rtol=1e-4)
    assert 0 < np.argmin(errors) < 19 and min(errors) < errors[0] / 2


@pytest.mark.parametrize("size", [7, 24, 1024, 1536])
def test_turning_is_orthogonal_and_spreads_an_outlier(size):
    x, weight = normal(5, size), normal(size, 3, seed=1)
    exact = x.astype(float) @ weight
    np.testing.assert_allclose(turned(x) @ turned(weight.T).T, exact, atol=size * EPS * np.abs(exact).max())
    spike = np.zeros((1, size), np.float32)
    spike[0, 3] = 100
    block = min(size & -size, 512)
    assert np.abs(turned(spike)).max() == pytest.approx(100 / np.sqrt(block), rel=1e-5)


NAMES = ["w8a8_tensor+mse", "w4a4_g32", "w4a4_token", "nvfp4", "mxfp4", "w8a8+smooth", "w4a4_g32+rotate"]


@pytest.mark.parametrize("name", sampled(NAMES, ("w8a8_tensor+mse", "nvfp4", "w4a4_g32+rotate")))
def test_codes_that_are_carried_are_those_of_rounding_as_one_goes(name):
    model, batches, scheme = build(preset="oasis"), token_batches(2), parse_scheme(name)
    calibration = calibration_for(scheme, *placed(model), batches)
    assert {"head", "layer0.attention.query", "layer1.mlp.down"} <= set(calibration.weights)
    once = losses(*placed(model), batches, scheme, calibration)["loss"]
    if scheme.smooth:  # factors come from calibration
        with pytest.raises(UserError, match=r"\+smooth needs a calibration that has seen layer0.attention.query"):
            losses(*placed(model), batches, scheme, calibration._replace(factors={}, weights={}))
        return
    again = losses(*placed(model), batches, scheme, calibration._replace(weights={}))["loss"]
    np.testing.assert_allclose(once, again, rtol=1e-5)
    assert np.abs(once / losses(*placed(model), batches)["loss"] - 1).max() > 1e-5


def test_products_of_inputs_are_those_of_all_tokens():
    model, batches = build(preset="residual"), token_batches(2)
    found = calibrate(*placed(model), batches, Recording(products=True)).products
    seen = np.concatenate([model(batch["inputs"])[1].taps["mlp_norm"][1].reshape(33, 24) for batch in batches])
    np.testing.assert_allclose(found["layer1.mlp.gate"], seen.T @ seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", ["gptq", "awq"])
def test_weights_chosen_by_their_inputs_cost_less(option):
    """On the data of calibration, over seeds of models: the mean squared distance of logits."""
    batches, distance = token_batches(2), {"": 0.0, f"+{option}": 0.0}
    for preset in ("residual", "oasis"):
        model = build(preset=preset)
        exact = model(batches[0]["inputs"])[0]
        for suffix in distance:
            changed = quantized(pretrained(model), f"w4a16_g128{suffix}", batches)
            logits = model(batches[0]["inputs"], context_of(changed))[0]
            distance[suffix] += float(np.square(logits - exact).mean())
    assert distance[f"+{option}"] < distance[""]


def pretrained(model) -> Pretrained:
    params, config, placement = placed(model)
    return Pretrained(config, params, placement)


def context_of(model: Pretrained) -> Context:
    return Context(numerics=model.numerics)


def test_a_quantized_model_is_a_pytree_and_says_so():
    model = pretrained(build(preset="oasis"))
    changed = quantized(model, "w8a8")
    leaves, tree = jax.tree.flatten(changed.numerics)
    assert any(leaf.dtype == np.int8 for leaf in leaves)
    again = jax.tree.unflatten(tree, leaves)
    assert isinstance(again, Quantized) and again.scheme == changed.numerics.scheme
    assert changed.card["changes"] == ["quantized: w8a8"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("w16a8_tensor", "takes ranges of a whole batch, .* take one with ranges from calibration: w8a8_tensor, "),
        ("w8a8_tensor+sink_float", "leave out .sink_float"),
        ("w8a8_tensor", "there is no batch"),
        ("w4a4_g32+gptq", "there is no batch"),
        ("w4a4_g31", r"unknown name 'w4a4_g31' \(did you mean 'w4a4_g32'\?\)"),
    ],
)
def test_what_cannot_be_quantized_for_text(name, says):
    with pytest.raises(UserError, match=says):
        quantized(pretrained(build(preset="residual")), name)


def test_static_ranges_that_are_missing_are_named():
    model, scheme = build(preset="residual"), SCHEMES["w8a8_tensor"]
    with pytest.raises(UserError, match=r"takes the range of layer0.* from calibration, which has none"):
        losses(*placed(model), token_batches(1), scheme, Calibration())


@pytest.mark.parametrize("where", ["weight", "activation"])
@pytest.mark.parametrize(
    "name",
    sampled(
        [*SCHEMES, "w8a8+mse", "w8a8_tensor+mse"],
        ("w8a8_tensor", "w16a8_tensor", "w8a8", "nvfp4", "mxfp4", "w8a8_tensor+mse"),
    ),
)
def test_a_broken_model_has_no_loss(name, where):
    """One NaN in a weight, or one activation that overflows, after a sound calibration."""
    model, batches, scheme = build(preset="residual"), token_batches(1), parse_scheme(name)
    params, config, placement = placed(model)
    ranges = calibration_for(scheme, params, config, placement, batches).ranges
    params = jax.tree.map(lambda x: x, params)
    if where == "weight":
        params["layers"][1]["mlp"]["down"] = params["layers"][1]["mlp"]["down"].at[2, 3].set(np.nan)
    else:
        params["layers"][1]["mlp_norm"]["scale"] = params["layers"][1]["mlp_norm"]["scale"].at[2].set(np.inf)
    calibration = Calibration(ranges) if scheme.static else calibration_for(scheme, params, config, placement, batches)
    assert np.isnan(losses(params, config, placement, batches, scheme, calibration)["loss"]).all()
