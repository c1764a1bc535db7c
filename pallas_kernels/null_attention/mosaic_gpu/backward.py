"""The backward kernels: FlashAttention's, given lse and delta. One sums over keys for the query's gradient, one over
query rows for the keys'.

With P = exp(scores - lse): dV = P^T dO, dP = dO V^T, dS = P * (dP - delta), dQ = scale * dS K and dK = scale * dS^T Q.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.null_attention.mosaic_gpu import tiles
from pallas_kernels.null_attention.mosaic_gpu.tiles import LOG2E, ROWS, WGMMA, Problem

# Head size -> rows of a tile of the walked-over axis, in a ring of 2. A thread holds H / 2 floats an accumulator and
# half as many each of scores and dP as the tile has rows, of 240 registers. Above head size 128 one accumulator fits:
# dK and dV come from two kernels. At 256 tiles of 64 rows would neither fit into registers nor, for two computing
# warpgroups, into shared memory.
TILES = {64: 64, 96: 64, 128: 64, 192: 64, 256: 32}
ONE_ACCUMULATOR = (192, 256)
WARPGROUPS = 2
STAGES = 2
BEYOND = 1e30  # lse of rows beyond the last: their probabilities are 0


def backward_kernels(problem: Problem, query, key, value, segments, lse, delta, d_output):
    """Gradients of query [B, T, N, H], key and value [B, S, K, H]; segments ([B, T], [B, S]) or (), lse and
    delta [B, N, T] float32.
    """
    query, key, value, d_output = map(tiles.whole_groups, (query, key, value, d_output))
    block = WARPGROUPS * ROWS
    rows, keys = (pl.cdiv(length, block) * block for length in (query.shape[1], key.shape[1]))
    pad = lambda x, length, value: jnp.pad(
        x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])], constant_values=value
    )
    segments = tuple(pad(ids, length, 0) for ids, length in zip(segments, (rows, keys)))
    lse, delta = pad(lse.astype(jnp.float32) * LOG2E, rows, BEYOND), pad(delta.astype(jnp.float32), rows, 0.0)
    operands = (query, key, value, d_output, lse, delta, *segments)
    d_query = _query_gradient(problem, operands)
    if query.shape[3] in ONE_ACCUMULATOR:
        (d_key,), (d_value,) = (_key_gradients(problem, operands, (wanted,)) for wanted in ("dk", "dv"))
    else:
        d_key, d_value = _key_gradients(problem, operands, ("dk", "dv"))
    return d_query[:, : problem.rows], d_key[:, : problem.keys], d_value[:, : problem.keys]


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _scratch(problem: Problem, dtype, size: int, own: tuple[str, ...], ring: tuple[str, ...], rows_in_ring: bool):
    """Buffers and barriers: two tiles of a warpgroup's own and two rings, lse and delta in the ring or beside
    the own tiles.
    """
    barrier, tile = functools.partial(plgpu.Barrier, num_barriers=STAGES), TILES[size]
    columns = tiles.swizzled(size, tile)
    rows = plgpu.SMEM((STAGES, tile) if rows_in_ring else (WARPGROUPS, ROWS), jnp.float32)
    scratch = {name: tiles.half_tile(dtype, columns, WARPGROUPS, ROWS, size) for name in own}
    scratch |= {name: tiles.half_tile(dtype, columns, STAGES, tile, size) for name in ring}
    scratch |= {"lse": rows, "delta": rows}
    own_copies = len(own) + (0 if rows_in_ring else 2) + problem.segmented
    scratch["own_arrived"] = plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=own_copies)
    for i, name in enumerate(ring):
        copies = 1 + rows_in_ring + (problem.segmented and i == 0)
        scratch[f"{name}_arrived"] = barrier(num_arrivals=copies)
        scratch[f"{name}_consumed"] = barrier(num_arrivals=WARPGROUPS)
    if problem.segmented:
        scratch |= dict(
            own_ids=plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32), ring_ids=plgpu.SMEM((STAGES, tile), jnp.int32)
        )
    return scratch


def _query_gradient(problem: Problem, operands):
    query, key = operands[:2]
    batch, rows, heads, size = query.shape
    return tiles.launch(
        functools.partial(_query_body, problem, heads // key.shape[2]),
        "null_attention_backward_query",
        problem,
        operands,
        grid=(heads, pl.cdiv(rows, WARPGROUPS * ROWS), batch),
        warpgroups=WARPGROUPS,
        out_type=_like(query),
        scratch=_scratch(problem, query.dtype, size, ("q", "do"), ("k", "v"), rows_in_ring=False),
    )


def _query_body(problem: Problem, group: int, query, key, value, d_output, lse, delta, *refs):
    *segments, d_query, s = refs
    head, batch = lax.axis_index("head"), lax.axis_index("batch")
    key_head = lax.div(head, jnp.int32(group))
    size, tile = query.shape[-1], TILES[query.shape[-1]]
    # causal programs run from the longest to the shortest, so that the last to start are short
    first_row = (lax.axis_size("tile") - 1 - lax.axis_index("tile")) * (WARPGROUPS * ROWS)
    sweep = tiles.key_sweep(problem, first_row, WARPGROUPS * ROWS, tile)

    def compute(warpgroup):
        q, do = s["q"].at[warpgroup], s["do"].at[warpgroup]
        start = first_row + warpgroup * ROWS
        rows = pl.ds(start, ROWS)
        copies = [(query.at[batch, rows, head], q), (d_output.at[batch, rows, head], do)]
        copies += [(x.at[batch, head, rows], s[name].at[warpgroup]) for x, name in ((lse, "lse"), (delta, "delta"))]
        if problem.segmented:
            copies.append((segments[0].at[batch, rows], s["own_ids"].at[warpgroup]))
        tiles.load_rows(copies, s["own_arrived"].at[warpgroup])
        row = lambda name: plgpu.load(s[name].at[warpgroup], layout=WGMMA.reduce(1))
        row_lse, row_delta, ids = row("lse"), row("delta"), row("own_ids") if problem.segmented else None

        def step(masked, j, gradient):
            slot = lax.rem(j - sweep.first, jnp.int32(STAGES))
            k, v, shape = s["k"].at[slot], s["v"].at[slot], (ROWS, tile)
            q, do = (s[name].at[tiles.own(warpgroup)] for name in ("q", "do"))
            plgpu.barrier_wait(s["k_arrived"].at[slot])
            scores, slope = tiles.base2_scores(problem.options, tiles.product(shape, q, k.T))
            if masked:
                pair = (ids, *tiles.read_vectors((s["ring_ids"].at[slot], 1))) if problem.segmented else None
                scores = jnp.where(tiles.mask(problem, shape, start, j * tile, pair, key_axis=1), scores, -jnp.inf)
            p = jnp.exp2(scores - tiles.along(row_lse, shape, 0))
            p = p if slope is None else p * slope
            plgpu.barrier_wait(s["v_arrived"].at[slot])
            d_s = p * tiles.product_from(problem, tiles.along(-row_delta, shape, 0), do, v.T)
            plgpu.barrier_arrive(s["v_consumed"].at[slot])
            gradient = tiles.add_product(problem, gradient, d_s.astype(q.dtype), k)
            plgpu.barrier_arrive(s["k_consumed"].at[slot])
            return gradient

        gradient = sweep.run(step, tiles.zeros((ROWS, size)))
        q[...] = (gradient * problem.options.scale).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, d_query.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    def copy():
        columns = lambda step: pl.ds((sweep.first + step) * tile, tile)

        def keys(step):
            ids = [(segments[1].at[batch, columns(step)], s["ring_ids"])] if problem.segmented else []
            return [(key.at[batch, columns(step), key_head], s["k"]), *ids]

        def values(step):
            return [(value.at[batch, columns(step), key_head], s["v"])]

        groups = (s["k_consumed"], s["k_arrived"], keys), (s["v_consumed"], s["v_arrived"], values)
        tiles.copy_ahead(sweep.stop - sweep.first, STAGES, groups)

    tiles.split_threads(WARPGROUPS, compute, copy)


def _key_gradients(problem: Problem, operands, wanted: tuple[str, ...]):
    query, key = operands[:2]
    batch, keys, key_heads, size = key.shape
    return tiles.launch(
        functools.partial(_key_body, problem, query.shape[2] // key_heads, wanted),
        "null_attention_backward_" + ("key_value" if len(wanted) == 2 else {"dk": "key", "dv": "value"}[wanted[0]]),
        problem,
        operands,
        grid=(key_heads, pl.cdiv(keys, WARPGROUPS * ROWS), batch),
        warpgroups=WARPGROUPS,
        out_type=tuple(_like(key) for _ in wanted),
        scratch=_scratch(problem, query.dtype, size, ("k", "v"), ("q", "do"), rows_in_ring=True),
    )


def _key_body(problem: Problem, group: int, wanted, query, key, value, d_output, lse, delta, *refs):
    gradients, s = refs[-1 - len(wanted) : -1], refs[-1]
    segments = refs[: 2 * problem.segmented]
    key_head, batch = lax.axis_index("head"), lax.axis_index("batch")
    size, tile = key.shape[-1], TILES[key.shape[-1]]
    first_key = lax.axis_index("tile") * (WARPGROUPS * ROWS)
    sweep = tiles.query_sweep(problem, first_key, WARPGROUPS * ROWS, tile)
    count = sweep.stop - sweep.first

    def compute(warpgroup):
        k, v, start = s["k"].at[warpgroup], s["v"].at[warpgroup], first_key + warpgroup * ROWS
        columns = pl.ds(start, ROWS)
        copies = [(key.at[batch, columns, key_head], k), (value.at[batch, columns, key_head], v)]
        if problem.segmented:
            copies.append((segments[1].at[batch, columns], s["own_ids"].at[warpgroup]))
        tiles.load_rows(copies, s["own_arrived"].at[warpgroup])
        ids = plgpu.load(s["own_ids"].at[warpgroup], layout=WGMMA.reduce(1)) if problem.segmented else None

        def step(member, masked, i, carry):
            slot = lax.rem(member * count + i - sweep.first, jnp.int32(STAGES))
            q, do, shape = s["q"].at[slot], s["do"].at[slot], (ROWS, tile)
            k, v = (s[name].at[tiles.own(warpgroup)] for name in ("k", "v"))
            plgpu.barrier_wait(s["q_arrived"].at[slot])
            scores, slope = tiles.base2_scores(problem.options, tiles.product(shape, k, q.T))
            if masked:
                pair = (*tiles.read_vectors((s["ring_ids"].at[slot], 1)), ids) if problem.segmented else None
                scores = jnp.where(tiles.mask(problem, shape, i * tile, start, pair, key_axis=0), scores, -jnp.inf)
            (row_lse,) = tiles.read_vectors((s["lse"].at[slot], 1))
            p = jnp.exp2(scores - tiles.along(row_lse, shape, 1))
            plgpu.barrier_wait(s["do_arrived"].at[slot])
            carry = dict(carry)
            if "dv" in wanted:
                carry["dv"] = tiles.add_product(problem, carry["dv"], p.astype(q.dtype), do)
            if "dk" in wanted:
                p = p if slope is None else p * slope
                (row_delta,) = tiles.read_vectors((s["delta"].at[slot], 1))
                d_s = p * tiles.product_from(problem, tiles.along(-row_delta, shape, 1), v, do.T)
                plgpu.barrier_arrive(s["do_consumed"].at[slot])
                carry["dk"] = tiles.add_product(problem, carry["dk"], d_s.astype(q.dtype), q)
            else:
                plgpu.barrier_arrive(s["do_consumed"].at[slot])
            plgpu.barrier_arrive(s["q_consumed"].at[slot])
            return carry

        carry = {name: tiles.zeros((ROWS, size)) for name in wanted}
        carry = lax.fori_loop(0, group, lambda member, carry: sweep.run(functools.partial(step, member), carry), carry)
        for name, buffer, gradient in zip(wanted, (k, v), gradients):
            buffer[...] = (carry[name] * (problem.options.scale if name == "dk" else 1.0)).astype(k.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, gradient.at[batch, columns, key_head])
        plgpu.wait_smem_to_gmem(0)

    def copy():
        def at(step):
            tiles_each = jnp.maximum(count, jnp.int32(1))
            member, place = lax.div(step, tiles_each), lax.rem(step, tiles_each)
            return key_head * group + member, pl.ds((sweep.first + place) * tile, tile)

        def queries(step):
            head, rows = at(step)
            ids = [(segments[0].at[batch, rows], s["ring_ids"])] if problem.segmented else []
            return [(query.at[batch, rows, head], s["q"]), (lse.at[batch, head, rows], s["lse"]), *ids]

        def gradients_of_output(step):
            head, rows = at(step)
            return [(d_output.at[batch, rows, head], s["do"]), (delta.at[batch, head, rows], s["delta"])]

        groups = (s["q_consumed"], s["q_arrived"], queries), (s["do_consumed"], s["do_arrived"], gradients_of_output)
        tiles.copy_ahead(count * group, STAGES, groups)

    tiles.split_threads(WARPGROUPS, compute, copy)
