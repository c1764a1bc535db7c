"""The grids of quantization and their products, against numpy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from oasis_jax.evaluation.quantization import SCHEMES
from oasis_jax.evaluation.quantization.quantizers import (
    Format,
    as_matrices,
    asymmetric,
    grouped,
    integer_product,
    product,
    symmetric,
    symmetric_mse,
)

EPS = float(np.finfo(np.float32).eps)


def normal(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def np_symmetric(x, bits, axis=None, share=1.0):
    scale = share * np.abs(x).max(axis=axis, keepdims=axis is not None) / (2 ** (bits - 1) - 1)
    return np.clip(np.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def np_asymmetric(x, bits, low, high):
    low, high = min(low, 0), max(high, 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_symmetric_equals_numpy(bits, axis):
    x = normal(13, 7)
    found = symmetric(x, Format(bits), axis if axis is None else (axis,))
    assert found.codes.dtype == jnp.int8 and np.abs(found.codes).max() == 2 ** (bits - 1) - 1
    np.testing.assert_allclose(found.values(), np_symmetric(x, bits, axis), rtol=2 * EPS)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [None, 0])
def test_mse_takes_the_best_of_100_ranges(bits, axis):
    x = normal(41, 3)
    x[5] *= 9  # outliers, so that clipping pays
    errors = np.array([((np_symmetric(x, bits, axis, i / 100) - x) ** 2).mean(axis) for i in range(1, 101)])
    best = (errors.argmin(0) + 1) / 100
    found = symmetric_mse(x, Format(bits), axis if axis is None else (axis,)).values()
    np.testing.assert_allclose(found, np_symmetric(x, bits, axis, best), rtol=4 * EPS)
    assert bits == 8 or np.any(best < 1)


@pytest.mark.parametrize(("low", "high"), [(-1.5, 2.5), (0.25, 2.0), (-2.0, -0.25), (0.0, 1.0)])
def test_asymmetric_equals_numpy(low, high):
    x = normal(11, 5)
    found = asymmetric(x, 8, np.float32(low), np.float32(high))
    assert found.codes.dtype == jnp.int8
    np.testing.assert_allclose(found.values(), np_asymmetric(x, 8, low, high), rtol=4 * EPS, atol=4 * EPS)
    assert (
        asymmetric(np.zeros((1, 1), np.float32), 8, np.float32(low), np.float32(high)).values() == 0
    )  # 0 is on the grid


def test_e4m3_equals_ml_dtypes():
    x = normal(9, 33) * 100
    scale = np.abs(x).max(1, keepdims=True) / np.float32(448)
    expected = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_allclose(symmetric(x, Format(8, floating=True), (1,)).values(), expected, rtol=2 * EPS)


@pytest.mark.parametrize("form", [Format(8), Format(8, floating=True)])
def test_a_tensor_of_zeros_stays_zero(form):
    x = np.zeros((3, 5), np.float32)
    for found in (
        symmetric(x, form, (1,)),
        symmetric_mse(x, form, None),
        asymmetric(x, 8, np.float32(0), np.float32(0)),
    ):
        np.testing.assert_array_equal(found.values(), x)


FORMATS = [Format(8), Format(4), Format(8, floating=True), Format(4, floating=True)]


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_rounded_to_a_number(form, bad):
    """Of all that shares its scale: no code says NaN."""
    x = normal(5, 16)
    x[2, 3] = bad
    kinds = ["", "e8m0", *(["e4m3"] if str(form) == "E2M1" else [])]
    found = [symmetric(x, form, (1,), scales=kind, whole=np.float32(9)).values() for kind in kinds]
    found += [symmetric(x, form, (1,), clip=0.9).values(), symmetric_mse(x, form, (1,)).values()]
    for values in found:
        assert np.isnan(values[2]).all() and np.isfinite(np.delete(values, 2, 0)).all()
    for low, high in ((-2.0, 2.0), (x.min(), x.max())):
        assert np.isnan(asymmetric(x, 8, np.float32(low), np.float32(high)).values()).all()


# Products


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("BTD,DNH->BTNH", ((2, 3, 5), (5, 4, 7))),
        ("BTNH,NHD->BTD", ((2, 3, 4, 7), (4, 7, 5))),
        ("BTC,DC->BTD", ((2, 3, 5), (7, 5))),
    ],
)
def test_einsum_as_matrices(equation, shapes):
    x, weight = normal(*shapes[0]), normal(*shapes[1], seed=1)
    rows, columns, shape = as_matrices(equation, x, weight)
    np.testing.assert_allclose((rows @ columns).reshape(shape), np.einsum(equation, x, weight), atol=50 * EPS)


def test_an_einsum_that_is_not_rows_times_columns_is_refused():
    with pytest.raises(ValueError, match="BTD,DO->BOT"):
        as_matrices("BTD,DO->BOT", normal(2, 3, 5), normal(5, 7))


GRIDS = {8: (ml_dtypes.float8_e4m3fn, 448.0, 8), 4: (ml_dtypes.float4_e2m1fn, 6.0, 2)}  # type, highest, its exponent


def np_floating(x, bits, axis, scales="", whole=None):
    """Scales along an axis in the three kinds that there are, from the definitions."""
    grid, highest, exponent = GRIDS[bits]
    largest = np.abs(x).max(axis, keepdims=True)
    scale = (largest / np.float32(highest)).astype(np.float32)
    if scales == "e8m0":
        scale = 2.0 ** (np.floor(np.log2(largest)) - exponent)
    elif scales == "e4m3":
        above = np.float32(whole) / np.float32(448 * 6)
        scale = np.minimum(scale / above, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * above
    return np.clip((x / scale).astype(np.float32), -highest, highest).astype(grid).astype(float) * scale


def rounded(x, weight, scheme):
    """Both matrices on a scheme's grids, as codes, and in float64 by numpy."""
    rows, columns = grouped(jnp.asarray(x), 1, scheme.group), grouped(jnp.asarray(weight), 0, scheme.group)
    if scheme.per_tensor:
        low, high = np.float32(-1.7), np.float32(2.1)
        codes = asymmetric(rows, 8, low, high), symmetric(columns, scheme.weights, None)
        values = np_asymmetric(x.astype(float), 8, low, high), np_symmetric(weight.astype(float), 8)
        return codes, values
    tops = np.float32(5.0), np.abs(weight).max()
    options = dict(clip=scheme.clip, scales=scheme.scales, whole=tops[0])
    codes = (
        symmetric(rows, scheme.activations, (2,), **options),
        symmetric(columns, scheme.weights, (1,), scales=scheme.scales, whole=tops[1]),
    )
    parts = [slice(i, i + (scheme.group or len(weight))) for i in range(0, len(weight), scheme.group or len(weight))]
    if scheme.weights.floating:
        bits, kind = scheme.weights.bits, scheme.scales
        left = [np_floating(x[:, part], bits, 1, kind, tops[0]) for part in parts]
        return codes, (
            np.concatenate(left, 1),
            np.concatenate([np_floating(weight[part], bits, 0, kind, tops[1]) for part in parts]),
        )
    bits = scheme.activations.bits
    left = np.concatenate([np_symmetric(x[:, part].astype(float), bits, 1, scheme.clip) for part in parts], 1)
    right = np.concatenate([np_symmetric(weight[part].astype(float), scheme.weights.bits, 0) for part in parts])
    return codes, (left, right)


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.weights and scheme.activations])
def test_products_equal_numpy_and_each_other(name):
    x, weight = normal(7, 150), normal(150, 11, seed=1)  # 150 = 4 groups of 32 and 22, or 128 and 22
    codes, (left, right) = rounded(x, weight, SCHEMES[name])
    tolerance = 150 * EPS * (np.abs(left) @ np.abs(right)).max()
    np.testing.assert_allclose(product(*(code.values() for code in codes)), left @ right, rtol=0, atol=tolerance)
    np.testing.assert_allclose(integer_product(*codes), left @ right, rtol=0, atol=tolerance)


def test_integer_product_is_exact_and_runs_on_int8():
    x, weight = np.random.default_rng(0).integers(-127, 128, (2, 5, 600))
    x, weight = x.astype(np.float32), weight.T.astype(np.float32)
    x[:, 0] = weight[0] = 127  # so that every scale is 1 and rounding changes nothing
    codes = symmetric(x[:, None], Format(8), (2,)), symmetric(weight[None], Format(8), (1,))
    np.testing.assert_array_equal(integer_product(*codes), x.astype(np.int64) @ weight.astype(np.int64))
    text = jax.jit(integer_product).lower(*codes).as_text()
    assert "dot_general" in text and "(tensor<5x600xi8>, tensor<600x5xi8>) -> tensor<5x5xi32>" in text
