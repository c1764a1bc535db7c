"""The forward kernel: online softmax over key tiles, the null entering once as the first maximum and in the last
denominator.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.null_attention.mosaic_gpu import tiles
from pallas_kernels.null_attention.mosaic_gpu.tiles import LOG2E, ROWS, WGMMA, Problem

# Head size -> (keys a tile, slots of the ring): 128 KiB of key and value tiles beside up to 64 KiB of queries, of 227
# KiB. A thread holds H / 2 floats of the output and half as many of scores as the tile has keys, of 232 registers.
TILES = {64: (128, 4), 96: (128, 3), 128: (128, 2), 192: (64, 3), 256: (64, 2)}
LOWEST = -1e30  # the first maximum of a row without a null; finite, so that no difference of two infinities arises


def forward_kernel(problem: Problem, splits: int, query, key, value, null_logit, segments):
    """Attention of all rows, its keys cut into `splits` parts that are not merged.

    Args:
      query: [B, R, N, H], R = problem.rows.
      key, value: [B, S, K, H].
      null_logit: [B, N] float32; -inf leaves the null out.
      segments: ([B, R], [B, S]) int32, or () without.

    Returns:
      output [B * splits, R, N, H], normalized; maxima of the scores and the null, and sums of exp(score - maximum)
      without the null, [B * splits, N, R] float32. A part's index is its batch entry's times `splits` plus its own.
    """
    query, key, value = map(tiles.whole_groups, (query, key, value))
    batch, rows, heads, size = query.shape
    tile, stages = TILES[size]
    columns = tiles.swizzled(size, tile)
    warpgroups = 1 if rows <= ROWS else 2
    grid = (heads, pl.cdiv(rows, warpgroups * ROWS), batch * splits)
    padded = grid[1] * warpgroups * ROWS  # rows of statistics: whole tiles, as copies want multiples of 16 bytes
    segments = _pad_segments(segments, padded, pl.cdiv(key.shape[1], tile) * tile)
    statistics = jax.ShapeDtypeStruct((batch * splits, heads, padded), jnp.float32)
    scratch = dict(
        q=tiles.half_tile(query.dtype, columns, warpgroups, ROWS, size),
        k=tiles.half_tile(query.dtype, columns, stages, tile, size),
        v=tiles.half_tile(query.dtype, columns, stages, tile, size),
        rows=plgpu.SMEM((warpgroups, 2, ROWS), jnp.float32),
        q_arrived=plgpu.Barrier(num_barriers=warpgroups, num_arrivals=1 + problem.segmented),
        k_arrived=plgpu.Barrier(num_barriers=stages, num_arrivals=1 + problem.segmented),
        v_arrived=plgpu.Barrier(num_barriers=stages),
        k_consumed=plgpu.Barrier(num_barriers=stages, num_arrivals=warpgroups),
        v_consumed=plgpu.Barrier(num_barriers=stages, num_arrivals=warpgroups),
    )
    if problem.segmented:
        scratch |= dict(q_ids=plgpu.SMEM((warpgroups, ROWS), jnp.int32), k_ids=plgpu.SMEM((stages, tile), jnp.int32))
    output, maxima, sums = tiles.launch(
        functools.partial(_body, problem, splits, warpgroups, heads // key.shape[2]),
        "null_attention_forward",
        problem,
        (query, key, value, null_logit, *segments),
        grid=grid,
        warpgroups=warpgroups,
        out_type=(jax.ShapeDtypeStruct((batch * splits, *query.shape[1:]), query.dtype), statistics, statistics),
        scratch=scratch,
    )
    return output[:, : problem.rows], maxima[..., : problem.rows] * (1.0 / LOG2E), sums[..., : problem.rows]


def _pad_segments(segments, rows: int, keys: int):
    return tuple(jnp.pad(ids, ((0, 0), (0, length - ids.shape[1]))) for ids, length in zip(segments, (rows, keys)))


def _body(problem: Problem, splits: int, warpgroups: int, group: int, query, key, value, null_logit, *refs):
    *segments, output, maxima, sums, s = refs
    head, part = lax.axis_index("head"), lax.axis_index("batch")
    batch, share = lax.div(part, jnp.int32(splits)), lax.rem(part, jnp.int32(splits))
    key_head = lax.div(head, jnp.int32(group))
    stages, tile, size = s["k"].shape
    # causal programs run from the longest to the shortest, so that the last to start are short
    first_row = (lax.axis_size("tile") - 1 - lax.axis_index("tile")) * (warpgroups * ROWS)
    sweep = tiles.key_sweep(problem, first_row, warpgroups * ROWS, tile, share, splits)

    def compute(warpgroup):
        q, start = s["q"].at[warpgroup], first_row + warpgroup * ROWS
        copies = [(query.at[batch, pl.ds(start, ROWS), head], q)]
        if problem.segmented:
            copies.append((segments[0].at[batch, pl.ds(start, ROWS)], s["q_ids"].at[warpgroup]))
        tiles.load_rows(copies, s["q_arrived"].at[warpgroup])
        q_ids = plgpu.load(s["q_ids"].at[warpgroup], layout=WGMMA.reduce(1)) if problem.segmented else None

        def step(masked, j, carry):
            accumulator, top, total = carry
            slot = lax.rem(j - sweep.first, jnp.int32(stages))
            plgpu.barrier_wait(s["k_arrived"].at[slot])
            scores, _ = tiles.base2_scores(problem.options, tiles.product((ROWS, tile), q, s["k"].at[slot].T))
            if masked:
                ids = (q_ids, *tiles.read_vectors((s["k_ids"].at[slot], 1))) if problem.segmented else None
                allowed = tiles.mask(problem, (ROWS, tile), start, j * tile, ids, key_axis=1)
                scores = jnp.where(allowed, scores, -jnp.inf)
            plgpu.barrier_arrive(s["k_consumed"].at[slot])
            new_top = jnp.maximum(top, scores.max(axis=1))
            shrink = jnp.exp2(top - new_top)
            e = jnp.exp2(scores - tiles.along(new_top, scores.shape, 0))
            total = total * shrink + e.sum(axis=1)
            plgpu.barrier_wait(s["v_arrived"].at[slot])
            accumulator = accumulator * tiles.along(shrink, accumulator.shape, 0)
            accumulator = tiles.add_product(problem, accumulator, e.astype(q.dtype), s["v"].at[slot])
            plgpu.barrier_arrive(s["v_consumed"].at[slot])
            return accumulator, new_top, total

        b = null_logit[batch, head] * LOG2E
        row = lambda x: plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), WGMMA.reduce(1))
        accumulator, top, total = sweep.run(
            step, (tiles.zeros((ROWS, size)), row(lax.max(b, jnp.float32(LOWEST))), row(0.0))
        )

        denominator = total + jnp.exp2(row(b) - top)
        empty = denominator == 0.0  # neither a key nor a null
        accumulator = accumulator * tiles.along(1.0 / jnp.where(empty, 1.0, denominator), accumulator.shape, 0)
        q[...] = accumulator.astype(q.dtype)
        s["rows"][warpgroup, 0] = top
        s["rows"][warpgroup, 1] = total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, output.at[part, pl.ds(start, ROWS), head])
        for i, statistic in enumerate((maxima, sums)):
            plgpu.copy_smem_to_gmem(s["rows"].at[warpgroup, i], statistic.at[part, head, pl.ds(start, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    def copy():
        def keys(step):
            columns = pl.ds((sweep.first + step) * tile, tile)
            ids = [(segments[1].at[batch, columns], s["k_ids"])] if problem.segmented else []
            return [(key.at[batch, columns, key_head], s["k"]), *ids]

        def values(step):
            return [(value.at[batch, pl.ds((sweep.first + step) * tile, tile), key_head], s["v"])]

        groups = (s["k_consumed"], s["k_arrived"], keys), (s["v_consumed"], s["v_arrived"], values)
        tiles.copy_ahead(sweep.stop - sweep.first, stages, groups)

    tiles.split_threads(warpgroups, compute, copy)
