"""Attention with a null in plain XLA under masks, biases, offsets and lengths, and against a cache: tiles of queries
against tiles of keys.

Keys and values are read where they lie, a tile at a time, and never copied, padded or turned as a whole. The loop over
the keys ends at the last live key that a tile of queries can reach and begins at the first: both may be traced. A last
tile that would reach over the end begins earlier, and what it has in common with the tile before is masked.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import target_device
from pallas_kernels.null_attention.base import (
    Masks,
    NullAttention,
    Options,
    allowed_keys,
    grouped,
    heads_first,
    heads_last,
    scaled,
    visible_only,
    wide_dtype,
)
from pallas_kernels.null_attention.vjp import differentiable
from pallas_kernels.sharding import varying_alike

_ROWS, _COLUMNS = 64, 512  # a tile's queries and keys: measured on CPUs
# Few rows a key head, on a CPU: values are added up so many at once, vector by vector of so many numbers. They lie
# K * H numbers apart, often a multiple of 4 KiB, of which a first-level cache holds 8. Of so many keys the products are
# one program of XLA: more of them take several times longer.
_AT_ONCE, _VECTOR, _SPAN = 8, 16, 64
# The partial products of a tile of keys are written down once. More bytes of them are too many for a second-level
# cache, and half as many keys at once took 0.7 to 0.8 of the time (9 query and 3 key heads of 64).
_PARTIAL = 2**18


class _Grid(NamedTuple):
    """Sizes of a call and of its tiles: a tile has `rows` of `length` queries and `columns` of `keys`. With `few` rows
    a key head, products are written element by element.
    """

    length: int
    keys: int
    heads: int
    key_heads: int
    rows: int
    columns: int
    few: bool = False

    @staticmethod
    def of(query, key) -> "_Grid":
        (_, length, heads, _), (_, keys, key_heads, _) = query.shape, key.shape
        return _Grid(length, keys, heads, key_heads, min(length, _ROWS), min(keys, _COLUMNS))

    @staticmethod
    def of_forward(query, key) -> "_Grid":
        """The same for the forward pass, `few` where a CPU reads keys faster than its matrix product packs them."""
        grid, size = _Grid.of(query, key), query.shape[3]
        few = grid.length * grid.heads // grid.key_heads <= size // 16 and target_device().platform == "cpu"
        if not few or grid.columns % _AT_ONCE or size % _VECTOR:
            return grid
        of_a_key = query.shape[0] * grid.length * grid.heads * _lanes(size) * wide_dtype(query.dtype).itemsize
        columns = _COLUMNS if of_a_key * _COLUMNS <= _PARTIAL else _COLUMNS // 2
        return grid._replace(few=True, columns=min(grid.columns, columns))


class _Tile(NamedTuple):
    """Of a tile of queries and keys: where it begins, the keys (None for few rows), the masked scores, the derivative
    of the soft cap (None without one), and who sees whom.
    """

    first: Array
    start: Array
    key: Float[Array, "B s K H"] | None
    scores: Float[Array, "B K G t s"]
    slope: Float[Array, "B K G t s"] | None
    allowed: Bool[Array, "#B #K #G t s"]


def _reach(options: Options, grid: _Grid, masks: Masks, first) -> tuple[Array, Array]:
    """The first tile of keys that the queries from `first` on may see, and the one after the last."""
    low, high, offset = jnp.int32(0), jnp.int32(grid.keys), masks.first_place(grid.length, grid.keys)
    if masks.kv_lengths is not None:
        high = jnp.minimum(high, masks.kv_lengths.max())
    if options.causal or options.window is not None:
        high = jnp.minimum(high, offset.max() + first + grid.rows)
    if options.window is not None:
        low = jnp.maximum(low, offset.min() + first - options.window + 1)
    return low // grid.columns, (jnp.maximum(high, 0) + grid.columns - 1) // grid.columns


def _cut(x: Float[Array, "#B #N #T #S"], grid: _Grid, first, start) -> Float[Array, "#B #K #G #t #s"]:
    """The part of a mask or bias that belongs to a tile."""
    for axis, at, count, full in ((2, first, grid.rows, grid.length), (3, start, grid.columns, grid.keys)):
        if x.shape[axis] == full:
            x = lax.dynamic_slice_in_dim(x, at, count, axis)
    return grouped(x, grid.heads, grid.key_heads)


def _tile(options: Options, grid: _Grid, masks: Masks, q, key, i, j, *, once: bool) -> _Tile:
    """Tile j of the keys [B, S, K, H] against q [B, K, G, t, H], tile i of the queries; with `once`, rows that the tile
    before has too see nothing.
    """
    first, start = jnp.minimum(i * grid.rows, grid.length - grid.rows), _start(grid, j)
    rows, columns = first + jnp.arange(grid.rows), start + jnp.arange(grid.columns)
    segments = masks.segments
    if segments is not None:
        segments = (
            lax.dynamic_slice_in_dim(segments[0], first, grid.rows, 1),
            lax.dynamic_slice_in_dim(segments[1], start, grid.columns, 1),
        )
    places = masks.first_place(grid.length, grid.keys)[:, None] + rows[None]
    allowed = allowed_keys(places, columns, segments, causal=options.causal, window=options.window)
    new = (columns >= j * grid.columns)[None, None]
    if once:
        new &= (rows >= i * grid.rows)[None, :, None]
    allowed = jnp.broadcast_to(new, (1, grid.rows, grid.columns)) if allowed is None else allowed & new
    if masks.kv_lengths is not None:
        allowed &= (columns[None] < masks.kv_lengths[:, None])[:, None]
    allowed = allowed[:, None, None]
    if masks.mask is not None:
        allowed &= _cut(masks.mask, grid, first, start)
    if grid.few:  # a masked key reaches no other score than its own
        k, products = None, _few_products(grid, q, key, start)
    else:
        k = visible_only(lax.dynamic_slice_in_dim(key, start, grid.columns, 1), allowed)
        products = _products(grid, q, k)
    scores = scaled(products, options.scale, options.softcap)
    slope = None if options.softcap is None else 1.0 - (scores / options.softcap) ** 2
    if masks.bias is not None:
        scores = scores + _cut(masks.bias, grid, first, start)
    return _Tile(first, start, k, jnp.where(allowed, scores, -jnp.inf), slope, allowed)


def _one_head_at_a_time(grid: _Grid) -> bool:
    """With few rows a CPU would spend most of its time on turning tiles of keys around, heads first."""
    return grid.rows * grid.heads // grid.key_heads <= 16 and target_device().platform == "cpu"


def _products(grid: _Grid, q: Float[Array, "B K G t H"], k: Float[Array, "B s K H"]) -> Float[Array, "B K G t s"]:
    wide = wide_dtype(q.dtype)
    if not _one_head_at_a_time(grid):
        return jnp.einsum("BKGTH,BSKH->BKGTS", q, k, preferred_element_type=wide)
    rows = q.reshape(*q.shape[:2], -1, q.shape[4])
    parts = [jnp.einsum("BRH,BSH->BRS", rows[:, h], k[:, :, h], preferred_element_type=wide) for h in range(k.shape[2])]
    return jnp.stack(parts, axis=1).reshape(*q.shape[:4], -1)


def _weighted(grid: _Grid, e: Float[Array, "B K G t s"], v: Float[Array, "B s K H"]) -> Float[Array, "B K G t H"]:
    wide, e = wide_dtype(v.dtype), e.astype(v.dtype)
    if not _one_head_at_a_time(grid):
        return jnp.einsum("BKGTS,BSKH->BKGTH", e, v, preferred_element_type=wide)
    rows = e.reshape(*e.shape[:2], -1, e.shape[4])
    parts = [jnp.einsum("BRS,BSH->BRH", rows[:, h], v[:, :, h], preferred_element_type=wide) for h in range(v.shape[2])]
    return jnp.stack(parts, axis=1).reshape(*e.shape[:4], -1)


def _lanes(size: int) -> int:
    """How many sums there are of each product. Of small heads 32: sums of four or fewer terms took three times as
    long.
    """
    return 2 * _VECTOR if size <= 64 and size % (2 * _VECTOR) == 0 else _VECTOR


def _few_products(grid: _Grid, q: Float[Array, "B K G t H"], key, start) -> Float[Array, "B K G t s"]:
    """_products of few rows with a tile of keys, which are read where they lie: sums over every 16th or 32nd
    number, which XLA writes as vectors where it would write the sum over all as one number after the other, and then
    their sum.
    """
    (batch, key_heads, *_, size), wide = q.shape, wide_dtype(q.dtype)
    rows = q.reshape(batch, 1, key_heads, -1, size).astype(wide)
    lanes, partial = _lanes(size), 0.0
    for i in range(0, size, lanes):
        k = _piece(key, (0, start, 0, i), (batch, grid.columns, key_heads, lanes))
        partial = partial + k[:, :, :, None].astype(wide) * rows[..., i : i + lanes]
    sums = jnp.einsum("BSKRL,L->BSKR", lax.optimization_barrier(partial), jnp.ones(lanes, wide))
    return sums.transpose(0, 2, 3, 1).reshape(*q.shape[:4], grid.columns)


def _piece(x: Float[Array, "B S K H"], first: tuple, sizes: tuple[int, ...]) -> Float[Array, "b s k h"]:
    """x[first : first + sizes] in every dimension."""
    return lax.dynamic_slice(x, [jnp.asarray(i, jnp.int32) for i in first], sizes)


def _few_weighted(grid: _Grid, partial: Float[Array, "B P K h R l"], shrink, e, value, tile: _Tile):
    """shrink * partial + _weighted of few rows, values read where they lie: P partial sums, the p-th of the tile's keys
    p, p + P, ..., each of H numbers as h times l, so that a value is in the nearest cache for all rows; a matrix
    product would first copy the values of every head.
    """
    batch, parts, key_heads, blocks, rows, lanes = partial.shape
    seen = tile.allowed.any(axis=(2, 3)).swapaxes(1, 2)
    seen = jnp.broadcast_to(seen, (batch, grid.columns, key_heads))
    e = e.reshape(batch, key_heads, rows, grid.columns).transpose(0, 3, 1, 2)
    span = math.gcd(grid.columns, _SPAN)

    def add(n, partial):
        weights, visible = (lax.dynamic_slice_in_dim(x, n * span, span, 1) for x in (e, seen))
        for i in range(0, span, parts):
            first = (0, tile.start + n * span + i, 0, 0)
            v = _piece(value, first, (batch, parts, key_heads, blocks * lanes)).astype(partial.dtype)
            v = jnp.where(visible[:, i : i + parts, :, None], v, 0.0)
            v = v.reshape(batch, parts, key_heads, blocks, 1, lanes)
            partial = partial + weights[:, i : i + parts, :, None, :, None] * v
        return partial

    partial = partial * shrink.reshape(batch, 1, key_heads, 1, rows, 1)
    return lax.fori_loop(jnp.int32(0), jnp.int32(grid.columns // span), add, partial)


def _start(grid: _Grid, j):
    return jnp.minimum(j * grid.columns, grid.keys - grid.columns)


def _weighted_shape(grid: _Grid, rows: Float[Array, "B K G t H"]) -> tuple[int, ...]:
    batch, key_heads, group, length, size = rows.shape
    if not grid.few:
        return rows.shape
    return (batch, _AT_ONCE, key_heads, size // _VECTOR, group * length, _VECTOR)


def _over_rows(grid: _Grid, body, carry, like):
    """body(i, carry) for every tile of queries."""
    tiles, carry = -(-grid.length // grid.rows), varying_alike(carry, like)
    if tiles == 1:
        return body(jnp.int32(0), carry)
    return lax.fori_loop(jnp.int32(0), jnp.int32(tiles), body, carry)


def _forward(options: Options, query, key, value, null_logit, masks: Masks):
    """See `vjp.differentiable`."""
    grid, wide = _Grid.of_forward(query, key), wide_dtype(query.dtype)
    like = (query, key, value, null_logit, masks)
    q, b = heads_first(query, grid.key_heads), null_logit.reshape(1, grid.key_heads, -1, 1)
    lowest = float(jnp.finfo(wide).min)  # finite, so that no difference of two infinities arises

    def attend(i, results):
        first = jnp.minimum(i * grid.rows, grid.length - grid.rows)
        rows = lax.dynamic_slice_in_dim(q, first, grid.rows, 3)

        def step(j, carry):
            top, total, weighted = carry
            tile = _tile(options, grid, masks, rows, key, i, j, once=False)
            higher = jnp.maximum(top, tile.scores.max(-1))
            e, shrink = jnp.exp(tile.scores - higher[..., None]), jnp.exp(top - higher)
            if grid.few:
                weighted = _few_weighted(grid, weighted, shrink, e, value, tile)
            else:
                v = visible_only(lax.dynamic_slice_in_dim(value, tile.start, grid.columns, 1), tile.allowed)
                weighted = weighted * shrink[..., None] + _weighted(grid, e, v)
            return higher, total * shrink + e.sum(-1), weighted

        top = jnp.broadcast_to(jnp.maximum(b, lowest), rows.shape[:-1])
        start = varying_alike((top, jnp.zeros_like(top), jnp.zeros(_weighted_shape(grid, rows), wide)), like)
        top, total, weighted = lax.fori_loop(*_reach(options, grid, masks, first), step, start)
        weighted = weighted.sum(1).swapaxes(2, 3).reshape(rows.shape) if grid.few else weighted
        null = jnp.exp(b - top)
        empty = total + null == 0.0
        z = jnp.where(empty, 1.0, total + null)
        # log(z) without losing a small total where the null is the largest term and exp(b - top) = 1
        lse = top + jnp.log1p(jnp.where(empty, 0.0, total + jnp.expm1(b - top)))
        found = (weighted / z[..., None]).astype(query.dtype), null / z, jnp.where(empty, -jnp.inf, lse), total / z
        return tuple(lax.dynamic_update_slice_in_dim(x, new, first, 3) for x, new in zip(results, found))

    statistic = jnp.zeros(q.shape[:-1], wide)
    output, *statistics = _over_rows(grid, attend, (jnp.zeros_like(q), *(statistic,) * 3), like)
    null_mass, lse, mass = (x.reshape(query.shape[0], grid.heads, grid.length) for x in statistics)
    return NullAttention(heads_last(output), null_mass, lse), mass


def _backward(options: Options, query, key, value, masks: Masks, lse, delta, d_output):
    """See `vjp.differentiable`: dS = P * (dP - delta), tile by tile."""
    grid, wide, like = _Grid.of(query, key), wide_dtype(query.dtype), (query, key, value, masks, lse, delta, d_output)
    q, d_o = heads_first(query, grid.key_heads), heads_first(d_output, grid.key_heads)
    lse, delta = (x.reshape(q.shape[:4]) for x in (lse, delta))

    def of_rows(i, carry):
        first = jnp.minimum(i * grid.rows, grid.length - grid.rows)
        rows, d_rows, lse_rows, delta_rows = (
            lax.dynamic_slice_in_dim(x, first, grid.rows, 3) for x in (q, d_o, lse, delta)
        )

        def step(j, carry):
            d_q, d_k, d_v, *d_bias = carry
            tile = _tile(options, grid, masks, rows, key, i, j, once=True)
            v = visible_only(lax.dynamic_slice_in_dim(value, tile.start, grid.columns, 1), tile.allowed)
            p = jnp.exp(tile.scores - lse_rows[..., None])
            d_p = jnp.einsum("BKGTH,BSKH->BKGTS", d_rows, v, preferred_element_type=wide)
            d_s = p * (d_p - delta_rows[..., None])
            if d_bias:
                d_bias = [_add_bias(d_bias[0], d_s, grid, tile)]
            d_s = d_s * (options.scale if tile.slope is None else options.scale * tile.slope)
            d_s = d_s.astype(query.dtype)
            d_q = d_q + jnp.einsum("BKGTS,BSKH->BKGTH", d_s, tile.key, preferred_element_type=wide)
            d_k = _add(d_k, jnp.einsum("BKGTS,BKGTH->BSKH", d_s, rows, preferred_element_type=wide), tile.start)
            p = p.astype(d_rows.dtype)
            d_v = _add(d_v, jnp.einsum("BKGTS,BKGTH->BSKH", p, d_rows, preferred_element_type=wide), tile.start)
            return d_q, d_k, d_v, *d_bias

        d_q, *rest = carry
        reach = _reach(options, grid, masks, first)
        d_rows_q, *rest = lax.fori_loop(*reach, step, (varying_alike(jnp.zeros(rows.shape, wide), like), *rest))
        before = lax.dynamic_slice_in_dim(d_q, first, grid.rows, 3)
        return lax.dynamic_update_slice_in_dim(d_q, before + d_rows_q, first, 3), *rest

    start = [jnp.zeros(x.shape, wide) for x in (q, key, value)]
    start += [] if masks.bias is None else [jnp.zeros_like(masks.bias)]
    d_q, d_k, d_v, *d_bias = _over_rows(grid, of_rows, tuple(start), like)
    return heads_last(d_q).astype(query.dtype), d_k.astype(key.dtype), d_v.astype(value.dtype), *d_bias


def _add(x: Float[Array, "B S K H"], part: Float[Array, "B s K H"], start) -> Float[Array, "B S K H"]:
    before = lax.dynamic_slice_in_dim(x, start, part.shape[1], 1)
    return lax.dynamic_update_slice_in_dim(x, before + part, start, 1)


def _add_bias(d_bias: Float[Array, "#B #N #T #S"], d_s, grid: _Grid, tile: _Tile) -> Float[Array, "#B #N #T #S"]:
    """The gradient of a tile's scores, summed over what the bias has only one of."""
    part = d_s.reshape(d_s.shape[0], grid.heads, grid.rows, grid.columns)
    part = part.sum([axis for axis in range(4) if d_bias.shape[axis] == 1], keepdims=True)
    zero = jnp.int32(0)
    at = [zero, zero, tile.first if d_bias.shape[2] > 1 else zero, tile.start if d_bias.shape[3] > 1 else zero]
    before = lax.dynamic_slice(d_bias, at, part.shape)
    return lax.dynamic_update_slice(d_bias, before + part.astype(d_bias.dtype), at)


null_attention_masked = differentiable(_forward, _backward)
null_attention_masked.__doc__ = "The contract of `null_attention`, tiles of queries against tiles of keys."
