"""Depth routing on TPUs: one Pallas kernel forward, one backward, each of which reads every live source once.

The operator is bound by memory, so the tiling serves the traffic. A program owns a block of tokens, all of the width D,
and goes through the sources. Clamped scores lie in [-50, 50], hence exp(score - max(null_logit, 0)) neither overflows
nor loses precision in float32: the weighted sum accumulates as the sources pass, without a running maximum and without
rescaling, and is divided once at the end. Backward, delta is known, so a source is finished when it has been read: its
score is recomputed from the block in VMEM and its gradient is written once.

Sources in one array [L, B, T, D]: the grid is (batch, block of tokens, source), blocks of about 1 MiB. Dead sources
repeat the block index of the last live one, which is not copied once more. Sources in a tuple: L buffers, never
stacked; a program holds the same tokens of all of them, so 2 L blocks (double buffering) must fit in VMEM, and a dead
source costs one block in all. Scores, weights and their gradients have a source a lane, [tokens, L].

Lengths that are not whole blocks: the rows beyond the end hold anything, and only the sum over rows for a static query
has to leave them out.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.depth_route.base import KEY_NORM_EPSILON, MAX_SCORE, DepthRoute, RouteInputs
from pallas_kernels.depth_route.vjp import RouteOptions, differentiable, sharded_backward
from pallas_kernels.dispatch import Unavailable, check_axes, interpreting, target_device
from pallas_kernels.sharding import unmapped_axes

MIB = 2**20
ROW_TILE = 16  # rows of a bfloat16 tile: blocks are made of them, and computed one by one
SUM_ROWS = 8  # rows of a float32 tile: sums over tokens keep so many until the block is done
STACKED_BLOCK, TUPLE_STEP = MIB, 4 * MIB  # bytes of sources that one step of the grid reads
SPILLED_TILES = 8  # float32 tiles of rows that the compiler may keep in VMEM instead of registers
INTERPRETED_VMEM = 64 * MIB  # v5p's and tpu7x's, the smallest of those that are compiled for


class Plan(NamedTuple):
    """What a kernel is compiled for, all static.

    options: RouteOptions. stacked: the sources are one array [L, batch, length, width], else L arrays. per_token: the
      query is.
    masked: only the first `live` sources count. adds: gradients of stacked sources are added to an array. rows: tokens
    of a block.
    """

    options: RouteOptions
    stacked: bool
    per_token: bool
    masked: bool
    adds: bool
    count: int
    batch: int
    length: int
    width: int
    rows: int
    vmem: int

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.batch, pl.cdiv(self.length, self.rows)) + ((self.count,) if self.stacked else ())


def _plan(options, sources, query, num_sources, backward: bool, adds: bool = False) -> Plan:
    stacked = not isinstance(sources, tuple)
    count, (batch, length, width), dtype = len(sources), sources[0].shape, sources[0].dtype
    if length % ROW_TILE == 0 or length < ROW_TILE:  # no relayout, or of little data that would fill its blocks badly
        batch, length = 1, batch * length
    lanes = pl.cdiv(width, 128) * 128
    row = lanes * dtype.itemsize
    rows = STACKED_BLOCK // row if stacked else TUPLE_STEP // (row * count)
    rows = min(max(rows // ROW_TILE, 1) * ROW_TILE, 512)
    rows = min(rows, pl.cdiv(length, ROW_TILE) * ROW_TILE)

    per_token = query.ndim == 3
    blocks = (1 if stacked else count) * (1 + backward + adds) + 1
    statistics = (4 if backward else 2) * pl.cdiv(count + 1, 128) * 512
    wide = lanes * 4 * (1 + (2 + 2 * backward if per_token else 0))  # the sums, the queries and their gradients
    vmem = rows * (2 * blocks * row + 2 * statistics + wide) + SPILLED_TILES * ROW_TILE * lanes * 4 + MIB
    capacity = INTERPRETED_VMEM if interpreting() else pltpu.get_tpu_info().vmem_capacity_bytes
    if vmem > capacity:
        raise Unavailable(
            f"{count} sources of width {width} {dtype} need {vmem / MIB:.0f} MiB of VMEM, {target_device().kind} "
            f"has {capacity / MIB:.0f}" + ("" if stacked else "; one array of sources needs less than a list")
        )
    return Plan(options, stacked, per_token, num_sources is not None, adds, count, batch, length, width, rows, vmem)


def _tiles(plan: Plan, function: Callable) -> None:
    """Calls function(slice) for every tile of rows of a block: what is computed at a time then fits in registers."""
    run = lambda r, _: function(pl.ds(pl.multiple_of(r * ROW_TILE, ROW_TILE), ROW_TILE))
    lax.fori_loop(jnp.int32(0), jnp.int32(plan.rows // ROW_TILE), run, None)


def _lane(tile, i):
    """Column i of [rows, L], as [rows, 1]."""
    lanes = lax.broadcasted_iota(jnp.int32, tile.shape, 1)
    return jnp.sum(jnp.where(lanes == i, tile, 0.0), axis=1, keepdims=True)


def _put(ref, rows, i, column) -> None:
    tile = ref[rows, :]
    lanes = lax.broadcasted_iota(jnp.int32, tile.shape, 1)
    ref[rows, :] = jnp.where(lanes == i, column, tile)


def _over_sources(plan: Plan, live_ref, start: Callable, live: Callable, dead: Callable, finish: Callable) -> None:
    """Calls start(), live(i) or dead(i) for every source i, and finish(): stacked sources are steps of the grid."""

    def each(
        i,
    ):  # also where all are live: what a branch computes is not mixed with the next one's, which would spill registers
        pl.when(i < live_ref[0])(lambda: live(i))
        if plan.masked:
            pl.when(i >= live_ref[0])(lambda: dead(i))

    if plan.stacked:
        i = pl.program_id(2)
        pl.when(i == 0)(start)
        each(i)
        pl.when(i == plan.count - 1)(finish)
    else:
        start()
        for i in range(plan.count):
            each(i)
        finish()


def _dot_and_inverse_rms(plan: Plan, value, query):
    """u.v and r of the values [rows, D], each [rows, 1]; r is 1 without key norm."""
    dot = jnp.sum(value * query, axis=1, keepdims=True)
    if not plan.options.normalize:
        return dot, 1.0
    return dot, lax.rsqrt(jnp.sum(value * value, axis=1, keepdims=True) / plan.width + KEY_NORM_EPSILON)


def _forward_kernel(plan: Plan, live_ref, null_ref, *refs):
    sources, (query_ref, shift_ref, output_ref, mass_ref, sum_ref) = refs[:-5], refs[-5:]
    null = jnp.full((ROW_TILE, 1), null_ref[0])
    top = jnp.maximum(null, 0.0)

    def start():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        mass_ref[...] = jnp.zeros_like(mass_ref)

    def add(i):
        source_ref = sources[0 if plan.stacked else i]

        def tile(rows):
            value = source_ref[rows, :].astype(jnp.float32)
            dot, inverse_rms = _dot_and_inverse_rms(plan, value, _query(plan, query_ref, rows))
            score = dot * inverse_rms * plan.options.score_scale + _lane(shift_ref[rows, :], i)
            e = jnp.exp(jnp.clip(score, -MAX_SCORE, MAX_SCORE) - top)
            sum_ref[rows, :] += e * value
            _put(mass_ref, rows, i, e)

        _tiles(plan, tile)

    def finish():
        def tile(rows):
            _put(mass_ref, rows, plan.count, jnp.exp(null - top))
            total = jnp.sum(mass_ref[rows, :], axis=1, keepdims=True)
            inverse = 1.0 / jnp.where(total == 0.0, 1.0, total)  # neither a live source nor a null
            mass_ref[rows, :] *= inverse
            output_ref[rows, :] = (sum_ref[rows, :] * inverse).astype(output_ref.dtype)

        _tiles(plan, tile)

    _over_sources(plan, live_ref, start, add, lambda i: None, finish)


def _backward_kernel(plan: Plan, live_ref, *refs):
    each = 1 if plan.stacked else plan.count
    sources, (query_ref, shift_ref, weights_ref, bonus_ref, d_output_ref) = refs[:each], refs[each : each + 5]
    into_ref, refs = refs[each + 5], (refs[: each + 5] + refs[each + 6 :]) if plan.adds else refs
    d_sources, (d_query_ref, d_shift_ref, *scratch) = refs[each + 5 : 2 * each + 5], refs[2 * each + 5 :]

    def start():
        d_shift_ref[...] = jnp.zeros_like(d_shift_ref)
        for ref in scratch or [d_query_ref]:
            ref[...] = jnp.zeros_like(ref)

    def add(i):
        at = 0 if plan.stacked else i

        def tile(rows):
            value, d_output = sources[at][rows, :].astype(jnp.float32), d_output_ref[rows, :].astype(jnp.float32)
            query, weight = _query(plan, query_ref, rows), _lane(weights_ref[rows, :], i)
            dot, inverse_rms = _dot_and_inverse_rms(plan, value, query)
            score = dot * inverse_rms * plan.options.score_scale + _lane(shift_ref[rows, :], i)
            d_score = weight * (jnp.sum(value * d_output, axis=1, keepdims=True) + _lane(bonus_ref[rows, :], i))
            d_score = jnp.where(jnp.abs(score) < MAX_SCORE, d_score, 0.0)
            along_query = d_score * inverse_rms * plan.options.score_scale
            d_value = weight * d_output + along_query * query
            if plan.options.normalize:
                d_value -= (along_query * dot * inverse_rms * inverse_rms / plan.width) * value
            if plan.adds:
                d_value += into_ref[rows, :].astype(jnp.float32)
            d_sources[at][rows, :] = d_value.astype(d_sources[at].dtype)
            _put(d_shift_ref, rows, i, d_score)
            if plan.per_token:
                d_query_ref[rows, :] += along_query * value
            else:
                part = _before_the_end(plan, rows, along_query * value)
                scratch[0][...] += part.reshape(-1, SUM_ROWS, plan.width).sum(0)

        _tiles(plan, tile)

    def dead(i):
        if plan.adds:  # what is there stays
            return
        ref = d_sources[0 if plan.stacked else i]
        ref[...] = jnp.zeros_like(ref)

    def finish():
        if not plan.per_token:
            d_query_ref[...] = jnp.sum(scratch[0][...], axis=0, keepdims=True)

    _over_sources(plan, live_ref, start, add, dead, finish)


def _query(plan: Plan, query_ref, rows):
    return query_ref[rows, :] if plan.per_token else query_ref[...]


def _before_the_end(plan: Plan, rows, x):
    """A tile of a block, with zeros in the rows beyond the end."""
    if plan.length % plan.rows == 0:
        return x
    row = lax.broadcasted_iota(jnp.int32, (ROW_TILE, 1), 0) + pl.program_id(1) * plan.rows + rows.start
    return jnp.where(row < plan.length, x, 0.0)


def _specs(plan: Plan):
    """Block specifications: sources, their gradients, [batch, length, width], [batch, length, L], a static query."""

    def tokens(lanes):
        return pl.BlockSpec((None, plan.rows, lanes), lambda g, t, *_: (g, t, 0))

    def live_tokens(i):
        return pl.BlockSpec(
            (None, plan.rows, plan.width),
            lambda g, t, live: (jnp.where(i < live[0], g, 0), jnp.where(i < live[0], t, 0), 0),
        )

    if plan.stacked:
        block = (None, None, plan.rows, plan.width)
        sources = [pl.BlockSpec(block, lambda g, t, i, live: (jnp.minimum(i, jnp.maximum(live[0] - 1, 0)), g, t, 0))]
        d_sources = sources if plan.adds else [pl.BlockSpec(block, lambda g, t, i, live: (i, g, t, 0))]
    else:
        sources = [live_tokens(i) if plan.masked else tokens(plan.width) for i in range(plan.count)]
        d_sources = [tokens(plan.width)] * plan.count
    static_query = pl.BlockSpec((1, plan.width), lambda *_: (0, 0))
    return sources, d_sources, tokens, tokens(plan.width) if plan.per_token else static_query


def _call(plan: Plan, kernel, name, in_specs, out_specs, out_shapes, scratch, *arguments):
    vary = jax.typeof(arguments[-1]).manual_axis_type
    elements = plan.count * plan.batch * plan.length * plan.width
    cost = pl.CostEstimate(
        flops=(14 if len(out_specs) > 2 else 6) * elements,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arguments)
        + sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in out_shapes),
        transcendentals=2 * elements // plan.width,
    )
    order = ("parallel", "parallel") + (("arbitrary",) if plan.stacked else ())
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=plan.grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=vary) for shape, dtype in out_shapes],
        # The interpreter takes no order of the axes together with vmap.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=None if interpreting() else order, vmem_limit_bytes=plan.vmem
        ),
        cost_estimate=cost,
        input_output_aliases={len(arguments) - 1: 0} if plan.adds else {},
        interpret=pltpu.InterpretParams(detect_races=True) if interpreting() else False,
        name=name,
    )(*arguments)


def _folded(plan: Plan, sources, query, num_sources):
    """The sources as a list of operands, the query with two or three axes, and the number of live sources [1]."""
    tokens = (plan.batch, plan.length, plan.width)
    flat = [sources.reshape(plan.count, *tokens)] if plan.stacked else [source.reshape(tokens) for source in sources]
    live = jnp.full((1,), plan.count, jnp.int32) if num_sources is None else num_sources.reshape(1)
    return live, flat, query.reshape(tokens if plan.per_token else (1, plan.width))


def _lanes_last(plan: Plan, x):
    """[L, B, T] as the kernel's [batch, length, L]."""
    return jnp.moveaxis(x, 0, -1).reshape(plan.batch, plan.length, plan.count)


def _forward(options, sources, query, shift, null_logit, num_sources):
    plan = _plan(options, sources, query, num_sources, backward=False)
    shape = sources[0].shape
    live, flat, query = _folded(plan, sources, query, num_sources)
    source_specs, _, tokens, query_spec = _specs(plan)
    output, mass = _call(
        plan,
        _forward_kernel,
        "depth_route_forward",
        [pl.BlockSpec(memory_space=pltpu.SMEM), *source_specs, query_spec, tokens(plan.count)],
        [tokens(plan.width), tokens(plan.count + 1)],
        [
            ((plan.batch, plan.length, plan.width), sources[0].dtype),
            ((plan.batch, plan.length, plan.count + 1), jnp.float32),
        ],
        [pltpu.VMEM((plan.rows, plan.width), jnp.float32)],
        live,
        null_logit.reshape(1),
        *flat,
        query,
        _lanes_last(plan, shift),
    )
    mass = mass.reshape(*shape[:2], -1)
    return output.reshape(shape), jnp.moveaxis(mass[..., :-1], -1, 0), mass[..., -1]


def _backward(options, sources, query, shift, num_sources, weights, delta, d_output, d_weights, into=None):
    plan = _plan(options, sources, query, num_sources, backward=True, adds=into is not None)
    live, flat, flat_query = _folded(plan, sources, query, num_sources)
    source_specs, d_source_specs, tokens, query_spec = _specs(plan)
    by_source, by_token = tokens(plan.count), tokens(plan.width)
    added = [(into.reshape(flat[0].shape), d_source_specs[0])] if plan.adds else []
    statistics = (plan.batch, plan.length, plan.count)
    d_query_shape = flat_query.shape if plan.per_token else (*plan.grid[:2], 1, plan.width)
    d_query_spec = (
        query_spec if plan.per_token else pl.BlockSpec((None, None, 1, plan.width), lambda g, t, *_: (g, t, 0, 0))
    )
    *d_sources, d_query, d_shift = _call(
        plan,
        _backward_kernel,
        "depth_route_backward",
        [*source_specs, query_spec, by_source, by_source, by_source, by_token, *(spec for _, spec in added)],
        [*d_source_specs, d_query_spec, by_source],
        [
            *((x.shape, x.dtype) for x in ([into for into, _ in added] or flat)),
            (d_query_shape, jnp.float32),
            (statistics, jnp.float32),
        ],
        [] if plan.per_token else [pltpu.VMEM((SUM_ROWS, plan.width), jnp.float32)],
        live,
        *flat,
        flat_query,
        *(_lanes_last(plan, x) for x in (shift, weights, d_weights - delta[None])),
        d_output.reshape(plan.batch, plan.length, plan.width),
        *(into for into, _ in added),
    )
    d_query = d_query.reshape(query.shape) if plan.per_token else d_query.sum((0, 1, 2))
    d_sources = (
        d_sources[0].reshape(sources.shape)
        if plan.stacked
        else tuple(d.reshape(s.shape) for d, s in zip(d_sources, sources))
    )
    return d_sources, d_query, jnp.moveaxis(d_shift.reshape(*sources[0].shape[:2], plan.count), -1, 0)


_serve = differentiable(_forward, _backward, kernels="mosaic_tpu")
_sharded_backward = sharded_backward(_backward)


def depth_route_mosaic_tpu(inputs: RouteInputs) -> DepthRoute:
    """The contract of `depth_route`, for sources in float32 or bfloat16; the kernels compute in float32.

    A traced number of live sources saves the traffic of the dead ones. Raises Unavailable where the call is not
    compiled for a TPU.
    """
    _check(inputs)
    return _serve(inputs)


def backward_mosaic_tpu(inputs: RouteInputs) -> Callable:
    """The backward function of `vjp.sharded_backward` for a call; added to an array, it leaves what is there
    for dead sources unread.
    """
    _check(inputs)
    return _sharded_backward


def _check(inputs: RouteInputs) -> None:
    device = target_device()
    if device.platform != "tpu" and not interpreting():
        raise Unavailable(f"runs on TPUs only, the call is compiled for {device.platform}")
    check_axes(inputs.sources, inputs.query)
    axes = unmapped_axes(inputs.sharding, inputs.sources, inputs.query)
    if axes:
        raise Unavailable(
            f"XLA cannot partition it over the mesh axes {', '.join(axes)}; call it inside jax.shard_map over them"
        )
    if inputs.dtype not in (jnp.float32, jnp.bfloat16):
        raise Unavailable(f"takes sources of float32 and bfloat16, got {inputs.dtype}")
