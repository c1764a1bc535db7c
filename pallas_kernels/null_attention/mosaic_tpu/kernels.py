"""The arithmetic of a tile, and the three kernels that run it: forward, query gradients, key and value gradients.

A kernel gets its buffers by name. What belongs to rows [1, rows] lies along the lanes, scores are [keys, rows].
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.null_attention.base import Options
from pallas_kernels.null_attention.mosaic_tpu.tiles import Shape, key_range, row_range, wholly_visible

_LOWEST = -1e30  # where a row's maximum starts without a null; finite, so that -inf - -inf never happens


def _dot(x, y, contract: tuple[int, int]):
    """A product of two tiles in float32, contracted over these dimensions; exact to float32 for float32 inputs."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x, y, (((contract[0],), (contract[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _allowed(options: Options, shape: Shape, refs, row_tile, key_tile):
    """Which keys the rows of a tile may see, [keys, rows]; None where nothing can mask one. What padded rows
    see is of no consequence.
    """
    tile = shape.key_tile, shape.row_tile
    key = key_tile * shape.key_tile + lax.broadcasted_iota(jnp.int32, (shape.key_tile, 1), 0)
    allowed = None
    if options.causal or options.window is not None:  # padded keys are later than any row
        row = row_tile * shape.row_tile + lax.broadcasted_iota(jnp.int32, (1, shape.row_tile), 1)
        distance = (lax.rem(row, jnp.int32(shape.length)) if shape.folded else row) + shape.offset - key
        allowed = distance >= 0
        if options.window is not None:
            allowed &= distance < options.window
    elif shape.keys > shape.live_keys:
        allowed = jnp.broadcast_to(key, tile) < shape.live_keys
    if "row_segment" in refs:
        same = refs["key_segment"][...] == refs["row_segment"][...]
        allowed = same if allowed is None else allowed & same
    return allowed


def _score_tile(options: Options, shape: Shape, refs, row_tile, key_tile, masked: bool):
    """Scores [keys, rows] of a tile, -inf where a key may not be seen, and the slope of the soft cap (None without
    one).
    """
    scores = _dot(refs["key"][...], refs["query"][...], (1, 1)) * options.scale
    slope = None
    if options.softcap is not None:
        capped = jnp.tanh(scores / options.softcap)
        slope, scores = 1.0 - capped * capped, options.softcap * capped
    allowed = _allowed(options, shape, refs, row_tile, key_tile) if masked else None
    return scores if allowed is None else jnp.where(allowed, scores, -jnp.inf), slope


def _compute(options: Options, shape: Shape, refs, reached, row_tile, key_tile, tile: Callable) -> None:
    """Runs tile(masked) where a tile is reached: without a mask where every row may see every key."""
    if "row_segment" in refs:
        pl.when(reached)(lambda: tile(True))
        return
    visible = wholly_visible(options, shape, row_tile, key_tile)
    if isinstance(visible, bool):
        pl.when(reached)(lambda: tile(not visible))
        return
    pl.when(reached & visible)(lambda: tile(False))
    pl.when(reached & ~visible)(lambda: tile(True))


def forward_kernel(options: Options, shape: Shape, names, *refs):
    refs = dict(zip(names, refs))
    row_tile, step = pl.program_id(2), pl.program_id(3)
    first, last = key_range(options, shape, row_tile)
    top, total, weighted = refs["top"], refs["total"], refs["weighted"]

    @pl.when(step == 0)
    def start():
        b = refs["null_logit"][...]
        top[...] = jnp.where(b == -jnp.inf, _LOWEST, b)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    def attend(masked: bool):
        scores, _ = _score_tile(options, shape, refs, row_tile, first + step, masked)
        higher = jnp.maximum(top[...], scores.max(0, keepdims=True))
        shrink, e = jnp.exp(top[...] - higher), jnp.exp(scores - higher)
        top[...] = higher
        total[...] = total[...] * shrink + e.sum(0, keepdims=True)
        weighted[...] = weighted[...] * shrink + _dot(refs["value"][...], e.astype(refs["value"].dtype), (1, 0))

    _compute(options, shape, refs, first + step <= last, row_tile, first + step, attend)

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        z = total[...] + jnp.exp(refs["null_logit"][...] - top[...])
        refs["output"][...] = (weighted[...] / jnp.where(z == 0.0, 1.0, z)).astype(refs["output"].dtype)
        refs["top_out"][...] = top[...]
        refs["total_out"][...] = total[...]


def _gradient_tile(options: Options, shape: Shape, refs, row_tile, key_tile, masked: bool):
    """P and dS = P * (dP - delta), the factor of the scores included, of a tile [keys, rows]."""
    scores, slope = _score_tile(options, shape, refs, row_tile, key_tile, masked)
    p = jnp.exp(scores - refs["lse"][...])
    d_p = _dot(refs["value"][...], refs["d_output"][...], (1, 1))
    d_s = p * (d_p - refs["delta"][...]) * options.scale
    return p, d_s if slope is None else d_s * slope


def query_kernel(options: Options, shape: Shape, names, *refs):
    refs = dict(zip(names, refs))
    row_tile, step = pl.program_id(2), pl.program_id(3)
    first, last = key_range(options, shape, row_tile)

    @pl.when(step == 0)
    def start():
        refs["sum"][...] = jnp.zeros_like(refs["sum"])

    def add(masked: bool):
        _, d_s = _gradient_tile(options, shape, refs, row_tile, first + step, masked)
        key = refs["key_transposed"]
        refs["sum"][...] += _dot(key[...], d_s.astype(key.dtype), (1, 0))

    _compute(options, shape, refs, first + step <= last, row_tile, first + step, add)

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        refs["d_query"][...] = refs["sum"][...].astype(refs["d_query"].dtype)


def key_kernel(options: Options, shape: Shape, steps: int, names, *refs):
    refs = dict(zip(names, refs))
    key_tile, step = pl.program_id(2), pl.program_id(3)
    first, last = row_range(options, shape, key_tile)
    row_tile = first + lax.rem(step, jnp.int32(steps))  # of the heads that share these keys, one after the other

    @pl.when(step == 0)
    def start():
        for name in ("key_sum", "value_sum"):
            refs[name][...] = jnp.zeros_like(refs[name])

    def add(masked: bool):
        p, d_s = _gradient_tile(options, shape, refs, row_tile, key_tile, masked)
        refs["value_sum"][...] += _dot(p.astype(refs["d_output"].dtype), refs["d_output"][...], (1, 0))
        refs["key_sum"][...] += _dot(d_s.astype(refs["query"].dtype), refs["query"][...], (1, 0))

    _compute(options, shape, refs, row_tile <= last, row_tile, key_tile, add)

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        refs["d_key"][...] = refs["key_sum"][...].astype(refs["d_key"].dtype)
        refs["d_value"][...] = refs["value_sum"][...].astype(refs["d_value"].dtype)
