"""Exact quantiles under jit without a sort, which costs a CPU more than the layer that is measured."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Axes = int | tuple[int, ...]


def kth_smallest(x: Float[Array, "..."], k: int, axes: Axes = -1) -> Float[Array, "..."]:
    """The k-th smallest, from 0, over `axes` of numbers >= 0, exactly; in float32.

    Numbers >= 0 order like their bits: 31 bisections of the bit pattern count how many are not above.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    low = jnp.zeros_like(bits.max(axes, keepdims=True))
    high = jnp.full_like(low, 0x7F800000)  # infinity

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = (bits <= middle).sum(axes, keepdims=True) > k
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    found = lax.fori_loop(0, 31, halve, (low, high))[1]
    return lax.bitcast_convert_type(found, jnp.float32).squeeze(axes)


def median(x: Float[Array, "..."], axes: Axes = -1) -> Float[Array, "..."]:
    """The median over `axes` of numbers >= 0: of an even number of them the mean of the two in the middle."""
    size = math.prod(x.shape[axis] for axis in ((axes,) if isinstance(axes, int) else axes))
    lower = kth_smallest(x, (size - 1) // 2, axes)
    if size % 2:
        return lower
    bound = jnp.expand_dims(lower, axes)
    above = jnp.where(x > bound, x.astype(jnp.float32), jnp.inf).min(axes)
    repeated = (x <= bound).sum(axes) > size // 2
    return (lower + jnp.where(repeated, lower, above)) / 2
