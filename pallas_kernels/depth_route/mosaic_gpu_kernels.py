"""Depth routing as Mosaic GPU kernels for Hopper: memory-bound, so every live source crosses the memory bus once.

A program is one warpgroup (four warps) and owns `rows` tokens: a warp a token up to width 2048, two warps a token up to
4096, four up to 8192, so that a thread never holds more than 64 elements of the output it accumulates in float32
registers. The tokens' rows of a source lie together in memory; one bulk copy (cp.async.bulk) brings them into a ring of
shared memory, several sources ahead of the one in use. A row is reduced inside its warp by shuffles, which is why a
token gets a warp where its width allows. Where tokens do not come out even, the last program owns two blocks that
overlap; with fewer tokens than a program's, zeros are added to them. Where a row does not come out even for its warps,
as many columns as they take at once, the last ones, are held a second time: of those only the new ones count in sums.

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
from pallas_kernels.depth_route.mosaic_gpu import tile_rows
from pallas_kernels.depth_route.mosaic_gpu_tile import Tile, by_part, store
from pallas_kernels.dispatch import interpreting

_RING_BYTES = (
    48 * 1024
)  # of sources in flight; with the query and dO beside it, two programs of half precision share a multiprocessor
_MAX_STAGES = 4
_BLOCKS_PER_PARTIAL = 4  # blocks of tokens whose gradient of a static query is summed on chip


class _Route:
    """What both kernels know of a call: shapes, the ring of sources in flight, scores."""

    def __init__(self, options, sources, query):
        self.options, self.stacked, self.count = options, not isinstance(sources, tuple), len(sources)
        batch, length, self.width = sources[0].shape
        self.tokens, self.dtype = batch * length, sources[0].dtype
        self.tile = Tile(self.tokens, self.width)
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
        dot, inverse_rms = self.tile.dot(value, query), 1.0
        if self.options.normalize:
            inverse_rms = lax.rsqrt(self.tile.dot(value, value) * (1 / self.width) + KEY_NORM_EPSILON)
        return dot * (inverse_rms * self.options.score_scale) + shift, dot, inverse_rms

    def along(self, d_score, dot, inverse_rms):
        """What the gradient of a score adds to the source's: so much of u, less so much of v, of a normalized key."""
        along_query = d_score * (inverse_rms * self.options.score_scale)
        if not self.options.normalize:
            return along_query, None
        return along_query, along_query * dot * inverse_rms * inverse_rms / self.width

    def source_gradient(self, weight, d_output, along_query, query, along_value, value):
        """weight * dO + along_query * u - along_value * v, by rows, in the sources' dtype."""
        tile = self.tile
        d_value = by_part(
            lambda w, d_o, a, u: w * d_o + a * u,
            tile.along(weight), tile.load(d_output), tile.along(along_query), tile.load(query),
        )  # fmt: skip
        if along_value is not None:
            d_value = by_part(lambda d, a, v: d - a * v, d_value, tile.along(along_value), value)
        return by_part(lambda x: x.astype(self.dtype), d_value)

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
                store(exponentials.at[i, at], e)
                accumulated = by_part(lambda sums, v, e: sums + v * e, accumulated, value, tile.along(e))
                return accumulated, z + e, shift_next

            start = tile.zeros(), tile.zeros_each(), tile.load_each(shift.at[0, at])
            accumulated, z, _ = lax.fori_loop(0, live, step, start)
            z = z + null[0]
            store(total.at[at], z)
            inverse = 1.0 / jnp.where(z == 0.0, 1.0, z)  # neither a live source nor a null
            result = by_part(
                lambda sums, inverse: (sums * inverse).astype(route.dtype), accumulated, tile.along(inverse)
            )
            tile.store(output, at, result)

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
        return _lengthened_backward(
            by, options, sources, query, shift, num_sources, weights, delta, d_output, d_weights
        )
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
                through_output = tile.dot(value, tile.load(d_output_here))
                d_score = jnp.where(jnp.abs(raw) < MAX_SCORE, weight * (through_output + lift_i), 0.0)
                store(d_shift.at[i, at], d_score)
                along_query, along_value = route.along(d_score, dot, inverse_rms)
                d_value = route.source_gradient(weight, d_output_here, along_query, query_here, along_value, value)
                route.of_source(d_sources, i, lambda ref: tile.store(ref, at, d_value))
                if new is not None:
                    along_query = along_query * new
                return by_part(lambda sums, a, v: sums + a * v, d_query_sum, tile.along(along_query), value), following

            start = tile.zeros() if route.per_token else d_query_sum
            d_query_sum, _ = lax.fori_loop(0, live, step, (start, given(0)))
            if route.per_token:
                tile.store(d_query, at, d_query_sum)

            def dead(i, _):
                zeros = by_part(lambda x: x.astype(route.dtype), tile.zeros())
                route.of_source(d_sources, i, lambda ref: tile.store(ref, at, zeros))

            lax.fori_loop(live, count, dead, None)
            return None if route.per_token else d_query_sum

        first = program * blocks_each
        stop = jnp.where(program == programs - 1, tile.blocks, first + blocks_each)
        d_query_sum = lax.fori_loop(first, stop, block, None if route.per_token else tile.zeros())
        if not route.per_token:
            tile.store(d_query, program, by_part(lambda x: x if tile.rows == 1 else x.sum(0), d_query_sum))

    scratch = [*route.ring, *route.query, plgpu.SMEM(tile.shape, route.dtype), plgpu.Barrier()]
    each = [x.reshape(count, tokens) for x in (shift, weights, d_weights - delta[None])]
    run = route.call(body, "depth_route_backward", _gradient_types(route, programs), programs, scratch)
    d_sources, d_query, d_shift = run(
        route.flat(sources), route.flat(query), *each, route.flat(d_output), _fresh(tile), _live(num_sources, count)
    )
    d_sources = jax.tree.map(lambda new, old: new.reshape(old.shape), d_sources, sources)
    d_query = d_query.reshape(query.shape) if route.per_token else d_query.sum(0)
    if num_sources is not None:
        d_shift = jnp.where(jnp.arange(count)[:, None] < num_sources, d_shift, 0.0)
    return d_sources, d_query, d_shift.reshape(shift.shape)


def _lengthened_backward(by, options, sources, query, shift, num_sources, weights, delta, d_output, d_weights):
    """The backward kernel over `by` more positions of zeros, which are cut off again."""
    sources, query, d_output = _lengthened((sources, query, d_output), by)
    shift, weights, delta, d_weights = (
        x[..., 0] for x in _lengthened([x[..., None] for x in (shift, weights, delta, d_weights)], by)
    )
    d_sources, d_query, d_shift = backward(
        options, sources, query, shift, num_sources, weights, delta, d_output, d_weights
    )
    cut = lambda x: x[..., :-by, :] if x.ndim > 1 else x
    return jax.tree.map(cut, d_sources), cut(d_query), d_shift[..., :-by]


def _gradient_types(route: _Route, programs: int):
    """What the backward kernel writes: dv, du of every token or its sum over each program's, d_shift."""
    count, tokens, width = route.count, route.tokens, route.width
    one = jax.ShapeDtypeStruct((tokens, width), route.dtype)
    return (
        jax.ShapeDtypeStruct((count, *one.shape), route.dtype) if route.stacked else (one,) * count,
        jax.ShapeDtypeStruct((tokens if route.per_token else programs, width), jnp.float32),
        jax.ShapeDtypeStruct((count, tokens), jnp.float32),
    )


def _fresh(tile: Tile):
    """1 for the tokens of a block that no block before it has: of any block but the last, then of the last [2 rows]."""
    fresh = jnp.arange(2 * tile.rows) % tile.rows + tile.last >= (tile.blocks - 1) * tile.rows
    return jnp.where(jnp.arange(2 * tile.rows) < tile.rows, 1.0, fresh).astype(jnp.float32)
