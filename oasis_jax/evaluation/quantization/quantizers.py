"""Rounding of tensors to few bits, and matrix products of the rounded ones: simulated in float32, or on the integers
themselves.

A `Format` is a grid: b-bit integers, E4M3 or E2M1. `Codes` are a tensor on a grid, value = scale * (code - zero point).
Everything here is 2-D: rows of activations [R, D] times a weight [D, M], the contraction in groups of g: [R, G, g] and
[G, g, M].
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

CANDIDATES = 100  # clipping ranges that the MSE search tries
E4M3_MAX = float(jnp.finfo(jnp.float8_e4m3fn).max)
E2M1_MAX = float(jnp.finfo(jnp.float4_e2m1fn).max)


class Format(NamedTuple):
    """What a number is rounded to."""

    bits: int
    floating: bool = (
        False  # in place of integers E4M3 (arXiv 2209.05433), of 4 bits E2M1 (OCP Microscaling Formats 1.0)
    )

    @property
    def highest(self) -> float:
        """The largest magnitude that a symmetric scale maps to."""
        if self.floating:
            return E4M3_MAX if self.bits == 8 else E2M1_MAX
        return 2.0 ** (self.bits - 1) - 1

    def rounded(self, x: Array) -> Array:
        """The nearest codes, ties to even, what lies beyond the grid clipped; int8, or float8 (E4M3 holds E2M1)."""
        if not self.floating:
            return jnp.clip(jnp.round(x), -self.highest - 1, self.highest).astype(jnp.int8)
        mantissa, lowest = (3, -6) if self.bits == 8 else (1, 0)
        x = jnp.clip(x, -self.highest, self.highest)
        # By hand: some of XLA's conversions go by way of float16 or bfloat16, and 3.499 became 3.5 and then 4.
        exponent = jnp.maximum(jnp.frexp(x)[1] - 1, lowest)
        step = jnp.ldexp(jnp.ones_like(x), exponent - mantissa)
        return (jnp.round(x / step) * step).astype(jnp.float8_e4m3fn)

    def __str__(self) -> str:
        return f"int{self.bits}" if not self.floating else "E4M3" if self.bits == 8 else "E2M1"


class Codes(NamedTuple):
    """Codes int8 or float8, and what turns them back: values = scale * (codes - zero_point)."""

    codes: Array
    scale: Float[Array, "..."]
    zero_point: Float[Array, ""] | float = 0.0

    def values(self) -> Float[Array, "..."]:
        """The tensor after rounding, in float32."""
        return (self.codes.astype(jnp.float32) - self.zero_point) * self.scale


def _nonzero(scale: Array) -> Array:
    """A scale for a tensor that is all zero; NaN stays."""
    return jnp.where(scale == 0, 1.0, scale)


def _finite_or_nan(scale: Array, x: Array, axes: tuple[int, ...] | None) -> Array:
    """NaN where what a scale serves holds inf or NaN, which no code can say."""
    finite = jnp.isfinite(x).all(axis=axes, keepdims=axes is not None)
    return jnp.where(finite, scale, jnp.nan)


def _power_of_two(largest: Array, form: Format) -> Array:
    """OCP Microscaling Formats 1.0, section 6.3: the largest power of two (E8M0) in |x|, over that of the grid."""
    exponent = jnp.frexp(largest)[1] - 1 - int(np.log2(form.highest))
    return jnp.where(jnp.isfinite(largest), jnp.ldexp(1.0, jnp.clip(exponent, -127, 127)), jnp.nan)


def _two_levels(largest: Array, form: Format, whole: Array) -> Array:
    """NVFP4: scales in E4M3 below one scale of the tensor that maps `whole`, its largest |x|, to the highest of both
    grids.
    """
    above = _nonzero(whole / (E4M3_MAX * form.highest))
    below = jnp.clip(largest / form.highest / above, 0, E4M3_MAX).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return below * above


def symmetric(
    x: Array,
    form: Format,
    axes: tuple[int, ...] | None,
    *,
    clip: float = 1.0,
    scales: str = "",
    whole: Array | None = None,
) -> Codes:
    """Min-max without a zero point: the largest |x| over `axes` (None: over all) becomes the highest code.

    Args:
      clip: the share of the largest |x| that does so in its place.
      scales: what they are rounded to: "" float32, "e8m0" powers of two, "e4m3" as NVFP4 has them.
      whole: of "e4m3", the largest |x| of the tensor.
    """
    x = x.astype(jnp.float32)
    largest = clip * jnp.abs(x).max(axis=axes, keepdims=axes is not None)
    if scales == "e8m0":
        scale = _power_of_two(largest, form)
    elif scales == "e4m3":
        scale = _two_levels(largest, form, whole)
    else:
        scale = largest / form.highest
    scale = _finite_or_nan(_nonzero(scale), x, axes)
    return Codes(form.rounded(x / scale), scale)


def symmetric_mse(x: Array, form: Format, axes: tuple[int, ...] | None) -> Codes:
    """As `symmetric`, clipped to the share i / 100 of the largest |x|, i = 1 .. 100, that has the least mean squared
    error.
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=axes, keepdims=axes is not None)

    def scale_of(i):
        return _nonzero(largest * (i / CANDIDATES) / form.highest)

    def better(i, best):
        values = form.rounded(x / scale_of(i)).astype(jnp.float32) * scale_of(i)
        error = jnp.square(values - x).mean(axis=axes, keepdims=axes is not None)
        return jnp.minimum(error, best[0]), jnp.where(error < best[0], i, best[1])

    start = jnp.full_like(largest, jnp.inf), jnp.full(largest.shape, CANDIDATES, jnp.int32)
    scale = _finite_or_nan(scale_of(lax.fori_loop(1, CANDIDATES + 1, better, start)[1]), x, axes)
    return Codes(form.rounded(x / scale), scale)


def asymmetric(x: Array, bits: int, low: Array, high: Array) -> Codes:
    """With a zero point, from a range that is widened to hold 0; unsigned codes, shifted by half so that 8 bits fit
    int8.
    """
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    half, steps = 2.0 ** (bits - 1), 2.0**bits - 1
    scale = _finite_or_nan(_nonzero((high - low) / steps), x, None)
    zero_point = jnp.clip(jnp.round(-low / scale), 0, steps)
    codes = jnp.clip(jnp.round(x.astype(jnp.float32) / scale) + zero_point, 0, steps)
    return Codes((codes - half).astype(jnp.int8), scale, zero_point - half)


# Matrix products


def as_matrices(equation: str, x: Array, weight: Array) -> tuple[Array, Array, tuple[int, ...]]:
    """An einsum of x and weight as rows [R, D] times [D, M], and the shape of its result.

    The result's letters have to be those that only x has, in x's order, and then those that only the weight has.
    """
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    shared = [c for c in left if c in right]
    rows, columns = [c for c in left if c not in shared], [c for c in right if c not in shared]
    if "".join(rows + columns) != output:
        raise ValueError(f"as_matrices: {equation!r} is not rows times columns")
    x = x.transpose([left.index(c) for c in rows + shared])
    weight = weight.transpose([right.index(c) for c in shared + columns])
    shape = x.shape[: len(rows)] + weight.shape[len(shared) :]
    size = int(np.prod(weight.shape[: len(shared)]))
    return x.reshape(-1, size), weight.reshape(size, -1), shape


def grouped(x: Array, axis: int, group: int) -> Array:
    """Splits the contraction into groups of `group` (0: one group of all); the last is filled up with zeros, which
    round to zero.
    """
    size = x.shape[axis]
    group = min(group or size, size)
    count = -(-size // group)
    x = jnp.pad(x, [(0, count * group - size if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], count, group, *x.shape[axis + 1 :])


def product(x: Float[Array, "R G g"], weight: Float[Array, "G g M"]) -> Float[Array, "R M"]:
    """The simulated product: float32, of values that may have been rounded. One product over all groups."""
    return jnp.matmul(x.reshape(len(x), -1), weight.reshape(-1, weight.shape[-1]), precision=lax.Precision.HIGHEST)


def integer_product(x: Codes, weight: Codes) -> Float[Array, "R M"]:
    """The same product on the codes: int8 with int32 sums, E4M3 with float32 sums, one matrix product a
    group, scaled after it.
    """
    total = jnp.float32 if x.codes.dtype == jnp.float8_e4m3fn else jnp.int32
    rows, groups, _ = x.codes.shape

    def add(sum_so_far, part):
        codes, x_scale, weights, scale = part
        dot = lax.dot_general(codes, weights, (((1,), (0,)), ((), ())), preferred_element_type=total).astype(
            jnp.float32
        )
        # sum (c - z) w = sum c w - z sum w
        dot -= x.zero_point * weights.astype(total).sum(0).astype(jnp.float32)
        return sum_so_far + dot * x_scale * scale, None

    x_scale = jnp.broadcast_to(x.scale, (rows, groups, 1)).swapaxes(0, 1)
    scale = jnp.broadcast_to(weight.scale, (groups, 1, weight.codes.shape[2]))
    parts = (x.codes.swapaxes(0, 1), x_scale, weight.codes, scale)
    return lax.scan(add, jnp.zeros((rows, weight.codes.shape[2]), jnp.float32), parts)[0]
