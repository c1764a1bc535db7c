"""Depth routing as Mosaic GPU kernels for Hopper: memory-bound, so every live source crosses the memory bus once.

A program is one warpgroup (four warps) and owns `rows` tokens: a warp a token up to width 2048, two warps a token up to
4096, four up to 8192, so that a thread never holds more than 64 elements of the output it accumulates in float32
registers. The tokens' rows of a source lie together in memory; one bulk copy (cp.async.bulk) brings them into a ring of
shared memory, several sources ahead of the one in use. A row is reduced inside its warp by shuffles, which is why a
token gets a warp where its width allows. Where tokens do not come out even, the last program owns two blocks that
overlap; with fewer tokens than a program's, zeros are added to them.

Forward, per source: u.v and |v|^2, the clamped score g, e = exp(g - max(b, 0)), then acc += e v and z += e. Scores lie
in [-50, 50], so float32 needs no running maximum: exp(50) times any number of sources is far below its largest value
and exp(-50) far above its smallest, and a null logit b above 0 takes the part of the maximum. The kernel writes e; XLA
divides by z where it lays out the weights for the caller. Backward, per source: the dots with u, dO and itself in one
pass over the row on chip, then dv in a second, written once; du stays in registers. A static query is shared by all
tokens: a program walks several blocks of tokens and writes one partial sum.

The number of live sources is read from memory and bounds the loops: a dead source is neither copied nor scored. Sources
in a tuple stay where they are: a branch on the source's number chooses the reference to copy from, so the arithmetic is
not unrolled.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.depth_route.base import KEY_NORM_EPSILON, MAX_SCORE
from pallas_kernels.depth_route.mosaic_gpu import LANES, WARPS, tile_rows
from pallas_kernels.dispatch import interpreting

_RING_BYTES = (
    48 * 1024
)  # of sources in flight; with the query and dO beside it, two programs of half precision share a multiprocessor
_MAX_STAGES = 4
_BLOCKS_PER_PARTIAL = 4  # blocks of tokens whose gradient of a static query is summed on chip


class _Tile:
    """How a block of `rows` tokens lies in registers: [rows, width], or [width] and scalars for one token."""

    def __init__(self, tokens: int, width: int):
        possible = [rows for rows in tile_rows(width) if rows <= tokens]
        self.rows = next((rows for rows in possible if tokens % rows == 0), possible[0])
        warps = WARPS // self.rows
        # neighbouring elements of a thread: with 4, half precision and float32 alike are read from shared memory
        # without bank conflicts
        vector = next(n for n in (4, 2, 1) if width % (warps * LANES * n) == 0)
        chunk = LANES * vector
        self.whole, self.blocks = tokens // self.rows, pl.cdiv(tokens, self.rows)
        self.ragged, self.last = self.whole < self.blocks, tokens - self.rows
        self.shape = (width,) if self.rows == 1 else (self.rows, width)
        outer = (warps * chunk,) if self.rows == 1 else (self.rows, warps * chunk)
        tiling = [outer, *([(chunk,)] if warps > 1 else []), (vector,)]
        across = {4: (-3,), 2: (-4, -3), 1: (-3,)}[self.rows]
        self.layout = plgpu.Layout.TILED(plgpu.Tiling(tuple(tiling)), across, (-2,), -1)

    def tokens(self, block):
        """The index of a block's tokens in [tokens, width]. Where they do not come out even, the last block begins
        among the tokens of the one before, and the same program writes both.
        """
        if self.rows == 1:
            return block
        first = block * self.rows
        return pl.ds(jnp.minimum(first, self.last) if self.ragged else first, self.rows)

    def load(self, ref):
        """Rows as float32; a static query [width] is repeated for every token."""
        if ref.shape == self.shape:
            return plgpu.load(ref, layout=self.layout).astype(jnp.float32)
        row = plgpu.load(ref, layout=self.layout.reduce(0)).astype(jnp.float32)
        return plgpu.layout_cast(lax.broadcast_in_dim(row, self.shape, (1,)), self.layout)

    def load_each(self, ref):
        """One number a token."""
        return ref[...] if self.rows == 1 else plgpu.load(ref, layout=self.layout.reduce(1), optimized=False)

    def along(self, each):
        """One number a token, for every element of its row."""
        if self.rows == 1:
            return each
        return plgpu.layout_cast(lax.broadcast_in_dim(each, self.shape, (0,)), self.layout)

    def zeros(self):
        return plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), self.layout)

    def zeros_each(self):
        return (
            jnp.float32(0.0)
            if self.rows == 1
            else plgpu.layout_cast(jnp.zeros((self.rows,), jnp.float32), self.layout.reduce(1))
        )


class _Route:
    """What both kernels know of a call: shapes, the ring of sources in flight, scores."""

    def __init__(self, options, sources, query):
        self.options, self.stacked, self.count = options, not isinstance(sources, tuple), len(sources)
        batch, length, self.width = sources[0].shape
        self.tokens, self.dtype = batch * length, sources[0].dtype
        self.tile = _Tile(self.tokens, self.width)
        self.per_token = query.ndim == 3
        block_bytes = self.tile.rows * self.width * self.dtype.itemsize
        self.stages = min(max(_RING_BYTES // block_bytes, 2), _MAX_STAGES)
        self.ring = [plgpu.SMEM((self.stages, *self.tile.shape), self.dtype), plgpu.Barrier(num_barriers=self.stages)]
        query_shape = self.tile.shape if self.per_token else (self.width,)
        self.query = [plgpu.SMEM(query_shape, jnp.float32), plgpu.Barrier()]

    def flat(self, x):
        """[..., B, T, D] as [..., tokens, D]; so is a tuple of them. A static query stays."""
        return jax.tree.map(lambda x: x.reshape(*x.shape[:-3], self.tokens, self.width) if x.ndim >= 3 else x, x)

    def of_source(self, refs, i, use):
        """use(reference of source i), for a number i known on the device."""
        if self.stacked:
            use(refs.at[i])
        else:
            lax.switch(i, [functools.partial(use, ref) for ref in refs])

    def fetch(self, sources, i, at, ring, arrived):
        slot = lax.rem(i, jnp.int32(self.stages))
        self.of_source(sources, i, lambda source: _copy(source.at[at], ring.at[slot], arrived.at[slot]))

    def fetch_first(self, sources, live, at, ring, arrived):
        for i in range(min(self.stages, self.count)):

            @pl.when(i < live)
            def _(i=i):
                self.fetch(sources, jnp.int32(i), at, ring, arrived)

    def next_row(self, sources, i, live, at, ring, arrived):
        """Source i's rows; their place in the ring goes to the source `stages` further on."""
        slot = lax.rem(i, jnp.int32(self.stages))
        plgpu.barrier_wait(arrived.at[slot])
        value = self.tile.load(ring.at[slot])

        @pl.when(i + self.stages < live)
        def _():
            plgpu.commit_smem()  # orders the reads above before the copy's writes
            self.fetch(sources, i + self.stages, at, ring, arrived)

        return value

    def score(self, value, query, shift):
        """(the score before it is clamped, u.v, the reciprocal root mean square of a normalized key or 1)."""
        dot, inverse_rms = (value * query).sum(-1), 1.0
        if self.options.normalize:
            inverse_rms = lax.rsqrt((value * value).sum(-1) * (1 / self.width) + KEY_NORM_EPSILON)
        return dot * (inverse_rms * self.options.score_scale) + shift, dot, inverse_rms

    def call(self, body, name, out_type, programs, scratch):
        return plgpu.kernel(
            body,
            out_type=out_type,
            grid=(programs,),
            grid_names=("program",),
            scratch_types=scratch,
            kernel_name=name,
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=plgpu.InterpretGPUParams(detect_races=True) if interpreting() else None,
        )


def _store(ref, x):
    """Stores rows or one number a token; the latter touch less than a memory sector, which has to be allowed by name
    from jax 0.12 on.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def _copy(source, target, arrived):
    """Starts a copy of neighbouring bytes. They are in bounds, which spares the kernel a tensor map."""
    plgpu.copy_gmem_to_smem(source, target, arrived, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def _live(num_sources, count: int):
    return jnp.full((1,), count if num_sources is None else jnp.clip(num_sources, 0, count), jnp.int32)


def _missing(sources) -> int:
    """How many positions a call with fewer tokens than a program's lacks."""
    batch, length, width = sources[0].shape
    return max(pl.cdiv(tile_rows(width)[-1], batch) - length, 0)


def _lengthened(x, by: int):
    """[..., B, T, D] with zeros for `by` more positions; so is a tuple of them. A static query stays."""
    pad = lambda x: jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, by), (0, 0)]) if x.ndim > 1 else x
    return jax.tree.map(pad, x)


def forward(options, sources, query, shift, null_logit, num_sources):
    """The forward kernel of `differentiable` (vjp.py)."""
    if by := _missing(sources):
        longer = (*_lengthened((sources, query), by), _lengthened(shift[..., None], by)[..., 0])
        output, weights, null_mass = forward(options, *longer, null_logit, num_sources)
        return output[:, :-by], weights[..., :-by], null_mass[:, :-by]
    route = _Route(options, sources, query)
    tile = route.tile

    def body(
        sources, query, shift, top, null, live, output, exponentials, total, ring, arrived, query_here, query_arrived
    ):
        live = live[0]

        def block(b, _):
            at = tile.tokens(b)
            if tile.ragged:
                plgpu.commit_smem()  # orders the last block's reads before the copies' writes
            route.fetch_first(sources, live, at, ring, arrived)
            _copy(query.at[at] if route.per_token else query, query_here, query_arrived)
            plgpu.barrier_wait(query_arrived)

            def step(i, carry):
                accumulated, z, shift_now = carry
                shift_next = tile.load_each(shift.at[jnp.minimum(i + 1, route.count - 1), at])
                value = route.next_row(sources, i, live, at, ring, arrived)
                raw, _, _ = route.score(value, tile.load(query_here), shift_now)
                e = jnp.exp(jnp.clip(raw, -MAX_SCORE, MAX_SCORE) - top[0])
                _store(exponentials.at[i, at], e)
                return accumulated + value * tile.along(e), z + e, shift_next

            start = tile.zeros(), tile.zeros_each(), tile.load_each(shift.at[0, at])
            accumulated, z, _ = lax.fori_loop(0, live, step, start)
            z = z + null[0]
            _store(total.at[at], z)
            inverse = 1.0 / jnp.where(z == 0.0, 1.0, z)  # neither a live source nor a null
            _store(output.at[at], (accumulated * tile.along(inverse)).astype(route.dtype))

        program = lax.axis_index("program")
        if tile.ragged:
            lax.fori_loop(program, program + jnp.where(program == tile.whole - 1, 2, 1), block, None)
        else:
            block(program, None)

    count, tokens = route.count, route.tokens
    each = jax.ShapeDtypeStruct((tokens,), jnp.float32)
    out_type = (
        jax.ShapeDtypeStruct((tokens, route.width), route.dtype),
        jax.ShapeDtypeStruct((count, tokens), jnp.float32),
        each,
    )
    top = jnp.maximum(null_logit, 0.0)
    null = jnp.exp(jnp.minimum(null_logit, 0.0))
    output, exponentials, z = route.call(body, "depth_route_forward", out_type, tile.whole, route.ring + route.query)(
        route.flat(sources),
        route.flat(query),
        shift.reshape(count, tokens),
        top[None],
        null[None],
        _live(num_sources, count),
    )
    z = jnp.where(z == 0.0, 1.0, z)
    weights = exponentials / z[None]
    if num_sources is not None:
        weights = jnp.where(jnp.arange(count)[:, None] < num_sources, weights, 0.0)
    shape = sources[0].shape
    return output.reshape(shape), weights.reshape(shift.shape), (null / z).reshape(shape[:2])


def backward(options, sources, query, shift, num_sources, weights, delta, d_output, d_weights):
    """The backward kernel of `differentiable` (vjp.py)."""
    if by := _missing(sources):
        sources, query, d_output = _lengthened((sources, query, d_output), by)
        each = (x[..., 0] for x in _lengthened([x[..., None] for x in (shift, weights, delta, d_weights)], by))
        shift, weights, delta, d_weights = each
        d_sources, d_query, d_shift = backward(
            options, sources, query, shift, num_sources, weights, delta, d_output, d_weights
        )
        cut = lambda x: x[..., :-by, :] if x.ndim > 1 else x
        return jax.tree.map(cut, d_sources), cut(d_query), d_shift[..., :-by]
    route = _Route(options, sources, query)
    tile, count, tokens = route.tile, route.count, route.tokens
    blocks_each = 1 if route.per_token else _BLOCKS_PER_PARTIAL
    programs = pl.cdiv(tile.whole, blocks_each)

    def body(
        sources, query, shift, weights, lift, d_output, fresh, live, d_sources, d_query, d_shift,
        ring, arrived, query_here, query_arrived, d_output_here, d_output_arrived,
    ):  # fmt: skip
        program, live = lax.axis_index("program"), live[0]
        if not route.per_token:
            _copy(query, query_here, query_arrived)
            plgpu.barrier_wait(query_arrived)

        def block(b, d_query_sum):
            at = tile.tokens(b)
            plgpu.commit_smem()  # orders the last block's reads before the copies' writes
            _copy(d_output.at[at], d_output_here, d_output_arrived)
            if route.per_token:
                _copy(query.at[at], query_here, query_arrived)
                plgpu.barrier_wait(query_arrived)
            route.fetch_first(sources, live, at, ring, arrived)
            plgpu.barrier_wait(d_output_arrived)
            # a sum over all tokens counts each of them once
            new = None
            if tile.ragged and not route.per_token:
                new = tile.load_each(fresh.at[pl.ds(jnp.where(b == tile.blocks - 1, tile.rows, 0), tile.rows)])

            def given(i):
                return tuple(tile.load_each(x.at[i, at]) for x in (shift, weights, lift))

            def step(i, carry):
                d_query_sum, (shift_i, weight, lift_i) = carry
                following = given(jnp.minimum(i + 1, count - 1))
                value = route.next_row(sources, i, live, at, ring, arrived)
                raw, dot, inverse_rms = route.score(value, tile.load(query_here), shift_i)
                through_output = (value * tile.load(d_output_here)).sum(-1)
                d_score = jnp.where(jnp.abs(raw) < MAX_SCORE, weight * (through_output + lift_i), 0.0)
                _store(d_shift.at[i, at], d_score)
                along_query = d_score * (inverse_rms * options.score_scale)
                d_value = tile.along(weight) * tile.load(d_output_here) + tile.along(along_query) * tile.load(
                    query_here
                )
                if options.normalize:
                    d_value = d_value - tile.along(along_query * dot * inverse_rms * inverse_rms / route.width) * value
                d_value = d_value.astype(route.dtype)
                route.of_source(d_sources, i, lambda ref: _store(ref.at[at], d_value))
                if new is not None:
                    along_query = along_query * new
                return d_query_sum + tile.along(along_query) * value, following

            start = tile.zeros() if route.per_token else d_query_sum
            d_query_sum, _ = lax.fori_loop(0, live, step, (start, given(0)))
            if route.per_token:
                _store(d_query.at[at], d_query_sum)

            def dead(i, _):
                route.of_source(d_sources, i, lambda ref: _store(ref.at[at], tile.zeros().astype(route.dtype)))

            lax.fori_loop(live, count, dead, None)
            return None if route.per_token else d_query_sum

        first = program * blocks_each
        stop = jnp.where(program == programs - 1, tile.blocks, first + blocks_each)
        d_query_sum = lax.fori_loop(first, stop, block, None if route.per_token else tile.zeros())
        if not route.per_token:
            _store(d_query.at[program], d_query_sum if tile.rows == 1 else d_query_sum.sum(0))

    one = jax.ShapeDtypeStruct((tokens, route.width), route.dtype)
    out_type = (
        jax.ShapeDtypeStruct((count, *one.shape), route.dtype) if route.stacked else (one,) * count,
        jax.ShapeDtypeStruct((tokens if route.per_token else programs, route.width), jnp.float32),
        jax.ShapeDtypeStruct((count, tokens), jnp.float32),
    )
    scratch = [*route.ring, *route.query, plgpu.SMEM(tile.shape, route.dtype), plgpu.Barrier()]
    # of any block but the last, and of the last: which tokens no other block has
    fresh = jnp.arange(2 * tile.rows) % tile.rows + tile.last >= (tile.blocks - 1) * tile.rows
    fresh = jnp.where(jnp.arange(2 * tile.rows) < tile.rows, 1.0, fresh).astype(jnp.float32)
    each = [x.reshape(count, tokens) for x in (shift, weights, d_weights - delta[None])]
    d_sources, d_query, d_shift = route.call(body, "depth_route_backward", out_type, programs, scratch)(
        route.flat(sources), route.flat(query), *each, route.flat(d_output), fresh, _live(num_sources, count)
    )
    d_sources = jax.tree.map(lambda new, old: new.reshape(old.shape), d_sources, sources)
    d_query = d_query.reshape(query.shape) if route.per_token else d_query.sum(0)
    if num_sources is not None:
        d_shift = jnp.where(jnp.arange(count)[:, None] < num_sources, d_shift, 0.0)
    return d_sources, d_query, d_shift.reshape(shift.shape)
