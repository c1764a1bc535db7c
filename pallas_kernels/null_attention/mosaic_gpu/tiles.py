"""What the three kernels share: which tiles a program visits, masks, scores, matrix products and the copying
warpgroup.

A program is one or two computing warpgroups, 64 rows each, and one that copies tiles ahead through a ring of buffers.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.null_attention.base import Options
from pallas_kernels.sharding import varying_alike

ROWS = 64  # rows of a warpgroup: what one wgmma instruction computes
WGMMA = plgpu.Layout.WGMMA
LOG2E = math.log2(math.e)


class Problem(NamedTuple):
    """The static facts of a call.

    options: the operator's static arguments.
    rows: query rows, `fold` consecutive ones for each position: grouped heads that share a key head and, in decoding, a
      tile.
    keys: S.
    fold: query rows a position.
    segmented: whether segment ids are given.
    interpret: whether Pallas' interpreter runs the kernel.
    """

    options: Options
    rows: int
    keys: int
    fold: int
    segmented: bool
    interpret: bool

    @property
    def offset(self) -> int:
        """Position of query 0, counted in keys: the last query sits on the last key."""
        return self.keys - self.rows // self.fold

    @property
    def causal(self) -> bool:
        return self.options.causal or self.options.window is not None


class Sweep(NamedTuple):
    """Tiles first to stop, in pieces (start, stop, whether a mask is needed)."""

    first: jax.Array
    stop: jax.Array
    pieces: tuple[tuple[jax.Array, jax.Array, bool], ...]

    def run(self, step: Callable, carry):
        """carry = step(needs_mask, tile, carry) over all tiles."""
        for start, stop, masked in self.pieces:
            carry = lax.fori_loop(start, stop, functools.partial(step, masked), carry)
        return carry


def _int(x) -> jax.Array:
    return jnp.asarray(x, jnp.int32)


def _clip(x, low, high):
    return lax.max(_int(low), lax.min(_int(x), _int(high)))


def _floor(x, tile: int):
    return lax.div(lax.max(_int(x), _int(0)), _int(tile))


def _ceil(x, tile: int):
    return _floor(_int(x) + (tile - 1), tile)


def _sweep(problem: Problem, first, full, full_stop, stop, leading: bool, trailing: bool) -> Sweep:
    """Masked tiles, full ones, masked ones; pieces that are known to be empty are left out of the program."""
    if problem.segmented:
        return Sweep(first, stop, ((first, stop, True),))
    full = _clip(full, first, stop) if leading else first
    full_stop = _clip(full_stop, full, stop) if trailing else stop
    pieces = [(full, full_stop, False)]
    if leading:
        pieces.insert(0, (first, full, True))
    if trailing:
        pieces.append((full_stop, stop, True))
    return Sweep(first, stop, tuple(pieces))


def key_sweep(problem: Problem, first_row, rows: int, tile: int, share=0, shares: int = 1) -> Sweep:
    """The key tiles that query rows first_row .. first_row + rows can see, or part `share` of `shares` of them."""
    window, fold = problem.options.window, problem.fold
    low = _floor(first_row, fold) + problem.offset
    high = _floor(first_row + rows - 1, fold) + problem.offset
    first, stop = _int(0), _int(pl.cdiv(problem.keys, tile))
    full, full_stop = first, _int(problem.keys // tile)
    if problem.causal:
        stop = lax.min(stop, _ceil(high + 1, tile))
        full_stop = lax.min(full_stop, _floor(low + 1, tile))
    if window is not None:
        first = lax.min(_floor(low - window + 1, tile), stop)
        full = _ceil(high - window + 1, tile)
    if shares > 1:
        size = lax.div(stop - first + (shares - 1), _int(shares))
        first = lax.min(first + share * size, stop)
        stop = lax.min(first + size, stop)
    ragged = problem.keys % tile != 0
    return _sweep(problem, first, full, full_stop, stop, window is not None, problem.causal or ragged)


def query_sweep(problem: Problem, first_key, keys: int, tile: int) -> Sweep:
    """The query tiles that see keys first_key .. first_key + keys; rows and keys beyond the arrays need no
    mask there (fold is 1).
    """
    window, offset = problem.options.window, problem.offset
    first, stop = _int(0), _int(pl.cdiv(problem.rows, tile))
    full, full_stop = first, stop
    last_key = first_key + keys - 1
    if problem.causal:
        first = lax.min(_floor(first_key - offset, tile), stop)
        full = _ceil(last_key - offset, tile)
    if window is not None:
        stop = _clip(_ceil(last_key + window - offset, tile), first, stop)
        full_stop = _floor(first_key + window - offset, tile)
    return _sweep(problem, first, full, full_stop, stop, problem.causal, window is not None)


def mask(problem: Problem, shape: tuple[int, int], first_row, first_key, segments, key_axis: int):
    """Which scores of a tile count. `segments` are the tile's ids (queries, keys), or None."""
    # Numbers of rows and of columns, spread: those of whole tiles would not fit into the registers. They count from the
    # arrays' beginnings, so that no loop over tiles holds them all the time.
    iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, (shape[axis],), 0, layout=WGMMA.reduce(1 - axis))
    spread = lambda x, axis: plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [axis]), WGMMA)
    keys = iota(key_axis) + first_key
    allowed = spread(keys, key_axis) < problem.keys
    if problem.causal:
        key_place = spread(keys * problem.fold, key_axis)
        query_place = spread(iota(1 - key_axis) + (first_row + problem.offset * problem.fold), 1 - key_axis)
        allowed &= query_place >= key_place
        if problem.options.window is not None:
            allowed &= query_place < key_place + problem.options.window * problem.fold
    if segments is not None:
        queries, columns = (
            lax.broadcast_in_dim(x, shape, [axis]) for x, axis in zip(segments, (1 - key_axis, key_axis))
        )
        allowed &= queries == columns
    return allowed


def base2_scores(options: Options, products):
    """log2(e) times the scores, and the derivative of the soft cap (None without one)."""
    if options.softcap is None:
        return products * (options.scale * LOG2E), None
    # tanh through exp2: the hardware's tanh has 11 bits, too few for a logit
    tanh = 1.0 - 2.0 / (1.0 + jnp.exp2(products * (2.0 * LOG2E * options.scale / options.softcap)))
    return tanh * (options.softcap * LOG2E), 1.0 - tanh * tanh


def product(shape: tuple[int, int], a, b):
    """a @ b of two tiles in shared memory, float32 in registers."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def product_from(problem: Problem, start, a, b):
    """start + a @ b of two tiles in shared memory, float32 in registers: `start` takes none beside the sum."""
    if problem.interpret:  # the interpreter has no run_state
        return start + product(start.shape, a, b)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(start))


def add_product(problem: Problem, accumulator, a, b):
    """accumulator + a @ b, a in registers and b a tile in shared memory."""
    if problem.interpret:  # the interpreter has neither run_state nor operands in registers
        tile = b[...].astype(jnp.float32)
        plgpu.commit_smem()  # before the next copy into this buffer: wgmma's own reads need none
        return accumulator + a.astype(jnp.float32) @ tile
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(accumulator))


def zeros(shape: tuple[int, int]):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)


def along(vector, shape: tuple[int, int], axis: int):
    return lax.broadcast_in_dim(vector, shape, [axis])


def copy_ahead(steps, stages: int, groups: Sequence[tuple]):
    """The copying warpgroup: fills ring slots in order, each group when its previous content has been consumed.

    Args:
      steps: how many.
      stages: slots of the ring.
      groups: (consumed barriers, arrived barriers, copies), copies(step) a list of (source in global memory, ring of
        buffers).
    """

    @pl.loop(0, steps)
    def _(step):
        slot = lax.rem(step, _int(stages))
        for consumed, arrived, copies in groups:

            @pl.when(step >= stages)
            def _(consumed=consumed):
                plgpu.barrier_wait(consumed.at[slot])

            for source, ring in copies(step):
                plgpu.copy_gmem_to_smem(source, ring.at[slot], arrived.at[slot])


def own(warpgroup):
    """The place of a warpgroup's own tile, its number, as a loop over tiles reads it: behind a barrier, or else the
    compiler would compute wgmma's descriptors of all parts of the tile before the loop, and have no registers left for
    them.
    """
    return lax.optimization_barrier(warpgroup)


def load_rows(copies: Sequence[tuple], barrier):
    """Copies (source, buffer) pairs and waits; the barrier expects as many arrivals."""
    for source, buffer in copies:
        plgpu.copy_gmem_to_smem(source, buffer, barrier)
    plgpu.barrier_wait(barrier)


def read_vectors(*buffers_and_axes):
    """Vectors out of a ring's buffers, along axis 0 or 1 of a tile, fenced against the next copy into those buffers."""
    vectors = [plgpu.load(buffer, layout=WGMMA.reduce(1 - axis)) for buffer, axis in buffers_and_axes]
    if vectors:
        plgpu.commit_smem()
    return vectors


def swizzled(*sizes: int) -> int:
    """How many columns the swizzled blocks of tiles have whose rows or columns are summed over by wgmma: all tiles of a
    product must agree.
    """
    return 64 if all(size % 64 == 0 for size in sizes) else 32


def half_tile(dtype, columns: int, *shape: int):
    """A tile of half-precision numbers in shared memory, in the order that wgmma reads."""
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def whole_groups(x):
    """x [B, length, heads, H] with zero rows up to a multiple of 8: copies of `half_tile`s move groups of 8 rows."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0)))


def split_threads(warpgroups: int, compute: Callable, copy: Callable):
    """Runs compute(warpgroup) on the computing warpgroups and copy() on the last one."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < warpgroups)
    def _():
        if warpgroups == 2:  # three warpgroups start with 168 registers a thread each; two have all they can use
            plgpu.set_max_registers(240, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == warpgroups)
    def _():
        if warpgroups == 2:
            plgpu.set_max_registers(24, action="decrease")
        copy()


def launch(
    body: Callable,
    name: str,
    problem: Problem,
    operands: Sequence,
    *,
    grid: tuple[int, int, int],
    warpgroups: int,
    out_type,
    scratch,
):
    """Runs body(*operands, *results, scratch) over a grid (head, tile, batch); returns the results, of out_type."""
    results = plgpu.kernel(
        body,
        out_type=out_type,
        grid=grid,
        grid_names=("head", "tile", "batch"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[scratch],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if problem.interpret else None,
        kernel_name=name,
    )(*operands)
    return varying_alike(results, operands)
