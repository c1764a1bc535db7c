"""A block of tokens of the depth router's Mosaic GPU kernels: how its rows lie in registers, are loaded and stored."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.depth_route.mosaic_gpu import LANES, WARPS, tile_rows


def by_part(function, *rows):
    """function of every part of rows."""
    return jax.tree.map(function, *rows)


class _Part(NamedTuple):
    """Columns that lie evenly in the registers of a row's warps: `columns` from `first` on, of which those before `new`
    belong to the part before, too.
    """

    first: int
    columns: int
    new: int
    layout: plgpu.Layout


class Tile:
    """A block of `rows` tokens. Rows are tuples of their parts, [rows, columns], or [columns] of one token; one number
    a token is [rows], or a scalar.
    """

    def __init__(self, tokens: int, width: int):
        possible = [rows for rows in tile_rows(width) if rows <= tokens]
        self.rows = next((rows for rows in possible if tokens % rows == 0), possible[0])
        self.whole, self.blocks = tokens // self.rows, pl.cdiv(tokens, self.rows)
        self.ragged, self.last = self.whole < self.blocks, tokens - self.rows
        self.shape = (width,) if self.rows == 1 else (self.rows, width)
        unit = WARPS // self.rows * LANES
        even = width - width % unit
        self.parts = [_Part(0, even, 0, self._layout(even))]
        if even < width:
            self.parts.append(_Part(width - unit, unit, unit - width % unit, self._layout(unit)))

    def _layout(self, columns: int):
        warps = WARPS // self.rows
        # neighbouring elements of a thread: with 4, half precision and float32 alike are read from shared memory
        # without bank conflicts
        vector = next(n for n in (4, 2, 1) if columns % (warps * LANES * n) == 0)
        chunk = LANES * vector
        outer = (warps * chunk,) if self.rows == 1 else (self.rows, warps * chunk)
        tiling = [outer, *([(chunk,)] if warps > 1 else []), (vector,)]
        across = {4: (-3,), 2: (-4, -3), 1: (-3,)}[self.rows]
        return plgpu.Layout.TILED(plgpu.Tiling(tuple(tiling)), across, (-2,), -1)

    def _shape(self, part: _Part) -> tuple[int, ...]:
        return (*self.shape[:-1], part.columns)

    def tokens(self, block):
        """The index of a block's tokens in [tokens, width]. Where they do not come out even, the last block begins
        among the tokens of the one before, and the same program writes both.
        """
        if self.rows == 1:
            return block
        first = block * self.rows
        return pl.ds(jnp.minimum(first, self.last) if self.ragged else first, self.rows)

    def _columns(self, part: _Part) -> tuple:
        return (pl.ds(part.first, part.columns),) if len(self.parts) > 1 else ()

    def load(self, ref):
        """Rows as float32; a static query [width] is repeated for every token."""
        of_tokens = ref.shape == self.shape

        def load(part):
            layout = part.layout if of_tokens else part.layout.reduce(0)
            every_row = (slice(None),) * (len(ref.shape) - 1)
            here = ref.at[*every_row, *self._columns(part)] if len(self.parts) > 1 else ref
            row = plgpu.load(here, layout=layout).astype(jnp.float32)
            return row if of_tokens else self._spread(part, row, 1)

        return tuple(map(load, self.parts))

    def _spread(self, part: _Part, x, axis: int):
        return plgpu.layout_cast(lax.broadcast_in_dim(x, self._shape(part), (axis,)), part.layout)

    def store(self, ref, at, rows) -> None:
        """Stores rows at an index of [..., width]; columns of two parts twice, the same in both."""
        for part, x in zip(self.parts, rows):
            store(ref.at[at, *self._columns(part)], x)

    def dot(self, a, b):
        """The scalar product of rows, one number a token."""
        total = None
        for part, x, y in zip(self.parts, a, b):
            product = x * y
            if part.new:
                column = plgpu.broadcasted_iota(jnp.int32, product.shape, len(product.shape) - 1, layout=part.layout)
                product = jnp.where(column >= part.new, product, 0.0)
            one = product.sum(-1)
            if total is not None and self.rows > 1:
                one = plgpu.layout_cast(one, self.parts[0].layout.reduce(1))
            total = one if total is None else total + one
        return total

    def load_each(self, ref):
        """One number a token."""
        return ref[...] if self.rows == 1 else plgpu.load(ref, layout=self.parts[0].layout.reduce(1), optimized=False)

    def along(self, number):
        """One number a token, for every element of its row."""

        def along(part):
            if self.rows == 1:
                return number
            one = plgpu.layout_cast(number, part.layout.reduce(1)) if part.first else number
            return self._spread(part, one, 0)

        return tuple(map(along, self.parts))

    def zeros(self):
        zeros = lambda part: plgpu.layout_cast(jnp.zeros(self._shape(part), jnp.float32), part.layout)
        return tuple(map(zeros, self.parts))

    def zeros_each(self):
        if self.rows == 1:
            return jnp.float32(0.0)
        return plgpu.layout_cast(jnp.zeros((self.rows,), jnp.float32), self.parts[0].layout.reduce(1))


def store(ref, x):
    """Stores rows or one number a token; the latter touch less than a memory sector, which has to be allowed by name
    from jax 0.12 on.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x
