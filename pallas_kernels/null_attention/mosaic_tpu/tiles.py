"""How attention is cut into tiles on a TPU: sizes, which tiles reach which, and the blocks that a grid's indices
choose.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.null_attention.base import Options

LANES = 128
TILE = 512  # queries and keys of a tile: a score tile of 1 MiB in float32, and 4 of them at most are alive at a time


class Shape(NamedTuple):
    """Sizes after folding and padding. Rows are queries, or queries of all heads of a group where those are folded.

    rows, keys: of a head, padded to multiples of row_tile and key_tile. live_keys: without the padding. offset:
      position of query 0 in keys.
    length: queries of a head, which is what positions repeat after. heads_per_key: query heads, as the kernels see
    them, that share a key head.
    """

    rows: int
    keys: int
    live_keys: int
    row_tile: int
    key_tile: int
    offset: int
    length: int
    heads_per_key: int
    folded: bool

    @classmethod
    def of(cls, query, key) -> "Shape":
        (_, length, heads, _), (_, keys, key_heads, _) = query.shape, key.shape
        group = heads // key_heads
        folded = group > 1 and length * group <= LANES
        rows = length * group if folded else length
        row_tile = min(TILE, round_up(rows, LANES))
        key_tile = min(TILE, max(LANES, round_up(keys, LANES)))
        return cls(
            round_up(rows, row_tile),
            max(round_up(keys, key_tile), key_tile),
            keys,
            row_tile,
            key_tile,
            keys - length,
            length,
            1 if folded else group,
            folded,
        )

    @property
    def row_tiles(self) -> int:
        return self.rows // self.row_tile

    @property
    def key_tiles(self) -> int:
        return self.keys // self.key_tile


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def key_range(options: Options, shape: Shape, row_tile):
    """(first, last) key tile that a tile of rows can reach; last < first where it reaches none. For Python
    and traced numbers.
    """
    first, last = row_tile * 0, row_tile * 0 + shape.key_tiles - 1
    low, high = _positions(shape, row_tile)
    if options.causal or options.window is not None:
        last = _least(_floor(high, shape.key_tile), last)
    if options.window is not None:
        first = _most(_floor(low - options.window + 1, shape.key_tile), first)
    return first, last


def row_range(options: Options, shape: Shape, key_tile):
    """(first, last) tile of rows that can reach a tile of keys."""
    first, last = key_tile * 0, key_tile * 0 + shape.row_tiles - 1
    if shape.folded:  # one tile
        return first, last
    if options.causal or options.window is not None:
        first = _most(_floor(key_tile * shape.key_tile - shape.offset, shape.row_tile), first)
    if options.window is not None:
        newest = (key_tile + 1) * shape.key_tile - 1 + options.window - 1 - shape.offset
        last = _least(_floor(newest, shape.row_tile), last)
    return first, last


def wholly_visible(options: Options, shape: Shape, row_tile, key_tile):
    """Whether every row of a tile may see every key of a tile, as far as positions tell. A bool where that is
    the same for all tiles.
    """
    if not options.causal and options.window is None:
        return True if shape.keys == shape.live_keys else key_tile < shape.key_tiles - 1
    low, high = _positions(shape, row_tile)
    visible = low >= (key_tile + 1) * shape.key_tile - 1
    return visible if options.window is None else visible & (high - key_tile * shape.key_tile < options.window)


def _positions(shape: Shape, row_tile):
    """(lowest, highest) position of a tile of rows, counted in keys."""
    if shape.folded:
        return row_tile * 0 + shape.offset, row_tile * 0 + shape.offset + shape.length - 1
    return row_tile * shape.row_tile + shape.offset, (row_tile + 1) * shape.row_tile - 1 + shape.offset


def _floor(x, divisor: int):
    """Floor division; traced numbers have no negative results in use, where both divisions of an integer core agree
    after clamping to -1.
    """
    return x // divisor if isinstance(x, int) else jnp.where(x < 0, -1, lax.div(x, jnp.int32(divisor)))


def _least(x, y):
    return min(x, y) if isinstance(x, int) else jnp.minimum(x, y)


def _most(x, y):
    return max(x, y) if isinstance(x, int) else jnp.maximum(x, y)


def longest_run(reach: Callable, tiles: int) -> int:
    """The longest run of tiles that any of `tiles` reaches, at least 1."""
    return max(1, *(last - first + 1 for first, last in map(reach, range(tiles))))


class Blocks(NamedTuple):
    """How the grid's indices (batch, head, tile, step) choose the blocks: row(b, h, i, j) -> (head, tile of
    rows), key -> (head, tile of keys).
    """

    shape: Shape
    size: int
    row: Callable
    key: Callable

    def rows(self) -> pl.BlockSpec:
        """[B, heads, rows, H]"""
        return pl.BlockSpec((None, None, self.shape.row_tile, self.size), lambda b, *i: (b, *self.row(*i), 0))

    def rows_transposed(self) -> pl.BlockSpec:
        """[B, heads, H, rows]"""
        return pl.BlockSpec(
            (None, None, self.size, self.shape.row_tile), lambda b, *i: (b, self.row(*i)[0], 0, self.row(*i)[1])
        )

    def keys(self) -> pl.BlockSpec:
        """[B, heads, keys, H]"""
        return pl.BlockSpec((None, None, self.shape.key_tile, self.size), lambda b, *i: (b, *self.key(*i), 0))

    def keys_transposed(self) -> pl.BlockSpec:
        """[B, heads, H, keys]"""
        return pl.BlockSpec(
            (None, None, self.size, self.shape.key_tile), lambda b, *i: (b, self.key(*i)[0], 0, self.key(*i)[1])
        )

    def per_row(self) -> pl.BlockSpec:
        """[B, heads, 1, rows]"""
        return pl.BlockSpec(
            (None, None, 1, self.shape.row_tile), lambda b, *i: (b, self.row(*i)[0], 0, self.row(*i)[1])
        )

    def null(self) -> pl.BlockSpec:
        """[heads, 1, rows]"""
        return pl.BlockSpec((None, 1, self.shape.row_tile), lambda b, *i: (self.row(*i)[0], 0, self.row(*i)[1]))

    def segments(self) -> dict[str, pl.BlockSpec]:
        """[B, 1, rows] and [B, keys, 1]"""
        return {
            "row_segment": pl.BlockSpec((None, 1, self.shape.row_tile), lambda b, *i: (b, 0, self.row(*i)[1])),
            "key_segment": pl.BlockSpec((None, self.shape.key_tile, 1), lambda b, *i: (b, self.key(*i)[1], 0)),
        }


def by_rows(options: Options, shape: Shape, size: int) -> Blocks:
    """The forward kernel's and the query gradients' order: a tile of rows, then the key tiles that it reaches."""

    def key(h, i, j):
        first, last = key_range(options, shape, i)
        tile = jnp.clip(jnp.minimum(first + j, last), 0, shape.key_tiles - 1)
        return lax.div(h, jnp.int32(shape.heads_per_key)), tile

    return Blocks(shape, size, lambda h, i, j: (h, i), key)


def by_keys(options: Options, shape: Shape, size: int, steps: int) -> Blocks:
    """The key gradients' order: a tile of keys, then head by head the tiles of rows that reach it."""

    def row(h, i, j):
        first, last = row_range(options, shape, i)
        tile = jnp.clip(jnp.minimum(first + lax.rem(j, jnp.int32(steps)), last), 0, shape.row_tiles - 1)
        return h * shape.heads_per_key + lax.div(j, jnp.int32(steps)), tile

    return Blocks(shape, size, row, lambda h, i, j: (h, i))
