"""From the operator's arrays to those of the kernels and back: heads before rows, groups folded, sizes padded with
zeros.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.null_attention.mosaic_tpu.tiles import LANES, Shape, round_up


def pad(x: jax.Array, **sizes: int) -> jax.Array:
    """x with its axes (axis1=..., axis2=...) padded with zeros up to these sizes."""
    widths = [(0, 0)] * x.ndim
    for axis, size in sizes.items():
        i = int(axis.removeprefix("axis"))
        widths[i] = (0, size - x.shape[i])
    return jnp.pad(x, widths)


def padded_size(size: int) -> int:
    return round_up(size, 64) if size <= 64 else round_up(size, LANES)


def to_rows(x: jax.Array, shape: Shape, key_heads: int) -> jax.Array:
    """[B, T, N, H] -> [B, heads, rows, H], padded."""
    if shape.folded:  # head by head within a group, so that positions repeat after `length`
        batch, length, _, size = x.shape
        x = x.reshape(batch, length, key_heads, -1, size).transpose(0, 2, 3, 1, 4).reshape(batch, key_heads, -1, size)
    else:
        x = x.transpose(0, 2, 1, 3)
    return pad(x, axis2=shape.rows, axis3=padded_size(x.shape[3]))


def from_rows(x: jax.Array, like, shape: Shape, key_heads: int) -> jax.Array:
    """[B, heads, H, rows] -> [B, T, N, H], without the padding."""
    batch, length, heads, size = like.shape
    if shape.folded:
        x = x[:, :, :size, : length * heads // key_heads].reshape(batch, key_heads, size, -1, length)
        return x.transpose(0, 4, 1, 3, 2).reshape(like.shape)
    return x[:, :, :size, :length].transpose(0, 3, 1, 2)


def to_keys(x: jax.Array, shape: Shape) -> jax.Array:
    """[B, S, K, H] -> [B, K, keys, H], padded."""
    return pad(x.transpose(0, 2, 1, 3), axis2=shape.keys, axis3=padded_size(x.shape[3]))


def statistic(x: jax.Array, shape: Shape, key_heads: int) -> jax.Array:
    """[B, N, T] -> [B, heads, 1, rows], padded with zeros."""
    batch, heads = x.shape[:2]
    x = x.reshape(batch, key_heads if shape.folded else heads, 1, -1)
    return pad(x, axis3=shape.rows)


def segment_inputs(segments, shape: Shape) -> dict[str, jax.Array]:
    if segments is None:
        return {}
    rows, keys = (x.astype(jnp.int32) for x in segments)
    rows = jnp.tile(rows, (1, -(-shape.rows // rows.shape[1]))) if shape.folded else rows
    return {
        "row_segment": pad(rows[:, : shape.rows], axis1=shape.rows)[:, None],
        "key_segment": pad(keys, axis1=shape.keys)[..., None],
    }
