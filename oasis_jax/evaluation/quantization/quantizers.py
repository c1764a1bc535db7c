"""Rounding of tensors to few bits, and matrix products of the rounded ones: simulated in float32, or on the integers
themselves.

A `Format` is a grid: b-bit integers, or E4M3. `Codes` are a tensor on a grid, value = scale * (code - zero point).
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


class Format(NamedTuple):
    """What a number is rounded to."""

    bits: int
    floating: bool = False  # E4M3 (arXiv 2209.05433) in place of integers

    @property
    def highest(self) -> float:
        """The largest magnitude that a symmetric scale maps to."""
        return E4M3_MAX if self.floating else 2.0 ** (self.bits - 1) - 1

    def __str__(self) -> str:
        return "E4M3" if self.floating else f"int{self.bits}"


class Codes(NamedTuple):
    """Codes int8 or float8, and what turns them back: values = scale * (codes - zero_point)."""

    codes: Array
    scale: Float[Array, "..."]
    zero_point: Float[Array, ""] | float = 0.0

    def values(self) -> Float[Array, "..."]:
        """The tensor after rounding, in float32."""
        return (self.codes.astype(jnp.float32) - self.zero_point) * self.scale


def _nonzero(scale: Array) -> Array:
    """A scale for a tensor that is all zero."""
    return jnp.where(scale > 0, scale, 1.0)


def _codes(x: Array, scale: Array, form: Format) -> Codes:
    if form.floating:
        return Codes(jnp.clip(x / scale, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn), scale)
    return Codes(jnp.clip(jnp.round(x / scale), -form.highest - 1, form.highest).astype(jnp.int8), scale)


def symmetric(x: Array, form: Format, axes: tuple[int, ...] | None) -> Codes:
    """Min-max without a zero point: the largest |x| over `axes` (None: over all) becomes the highest code."""
    x = x.astype(jnp.float32)
    return _codes(x, _nonzero(jnp.abs(x).max(axis=axes, keepdims=axes is not None) / form.highest), form)


def symmetric_mse(x: Array, form: Format, axes: tuple[int, ...] | None) -> Codes:
    """As `symmetric`, clipped to the share i / 100 of the largest |x|, i = 1 .. 100, that has the least mean squared
    error.
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=axes, keepdims=axes is not None)

    def scale_of(i):
        return _nonzero(largest * (i / CANDIDATES) / form.highest)

    def better(i, best):
        error = jnp.square(_codes(x, scale_of(i), form).values() - x).mean(axis=axes, keepdims=axes is not None)
        return jnp.minimum(error, best[0]), jnp.where(error < best[0], i, best[1])

    start = jnp.full_like(largest, jnp.inf), jnp.full(largest.shape, CANDIDATES, jnp.int32)
    return _codes(x, scale_of(lax.fori_loop(1, CANDIDATES + 1, better, start)[1]), form)


def asymmetric(x: Array, bits: int, low: Array, high: Array) -> Codes:
    """With a zero point, from a range that is widened to hold 0; unsigned codes, shifted by half so that 8 bits fit
    int8.
    """
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    half, steps = 2.0 ** (bits - 1), 2.0**bits - 1
    scale = _nonzero((high - low) / steps)
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
    """The simulated product: float32, of values that may have been rounded."""
    return jnp.einsum("RGD,GDM->RM", x, weight, precision=lax.Precision.HIGHEST)


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
