"""Attention with a null for any platform: query tiles in plain XLA under one custom_vjp, memory linear in T.

Masks, biases, offsets, lengths and few queries against many keys are in xla_masked.py.

A tile of queries computes its scores against the keys that its mask can reach, and nothing else: causal and windowed
attention skip the rest at compile time. The backward pass recomputes the scores from the saved lse.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import check_axes
from pallas_kernels.null_attention.base import (
    AttentionInputs,
    Masks,
    NullAttention,
    Options,
    Segments,
    allowed_keys,
    attention_scores,
    heads_first,
    heads_last,
    wide_dtype,
)
from pallas_kernels.null_attention.sharded import check_sequence
from pallas_kernels.null_attention.vjp import differentiable
from pallas_kernels.null_attention.xla_masked import null_attention_masked

# Tiles of one group run one after the other in a loop against the keys that the last of them can reach: the loop keeps
# one tile of scores alive at a time (unrolled, XLA's CPU scheduler kept them all), and few groups keep the program
# small for any length.
_GROUPS = 8

# So few queries against so many keys, as in decoding, read the keys where they lie.
_FEW, _MANY = 8, 1024


class _Group(NamedTuple):
    """`count` tiles of `rows` queries from `first` on, each against `width` keys."""

    first: int
    rows: int
    count: int
    width: int


def _groups(length: int, keys: int, options: Options) -> list[_Group]:
    rows = min(length, 32 if length <= 256 else 64 if length <= 1024 else 128)  # measured on CPUs, 128 to 2048 queries
    tiles, rest = divmod(length, rows)
    backward_only = options.causal or options.window is not None
    per_group = max(2, -(-tiles // _GROUPS)) if backward_only else tiles

    def group(first: int, rows: int, count: int) -> _Group:
        reach = max(0, min(keys, first + rows * count + keys - length)) if backward_only else keys
        return _Group(first, rows, count, reach if options.window is None else min(reach, rows + options.window - 1))

    groups = [group(start * rows, rows, min(per_group, tiles - start)) for start in range(0, tiles, per_group)]
    return groups + ([group(length - rest, rest, 1)] if rest else [])


def _run(groups: list[_Group], tile: Callable, carry):
    """Runs `tile(group, carry, first row) -> carry, results` over all tiles and joins the results along the
    rows, their axis 3.
    """
    parts = []
    for group in groups:
        if group.count == 1:
            carry, results = tile(group, carry, group.first)
        else:
            starts = group.first + group.rows * jnp.arange(group.count)
            carry, results = lax.scan(functools.partial(tile, group), carry, starts)
            results = [jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, *x.shape[5:]) for x in results]
        parts.append(results)
    return carry, [jnp.concatenate(pieces, axis=3) for pieces in zip(*parts)]


class _Keys(NamedTuple):
    """Where a tile's keys lie and which its queries may see ([B, 1, s, 1], None for all that are not masked by place),
    the keys, its masked scores in wide dtype, and the derivative of the soft cap (None without one).
    """

    start: Array
    seen: Bool[Array, "B 1 s 1"] | None
    key: Float[Array, "B K s H"]
    scores: Float[Array, "B K G t s"]
    slope: Float[Array, "B K G t s"] | None

    def of(self, x: Float[Array, "B K S H"]) -> Float[Array, "B K s H"]:
        """The part of keys or values that belongs to the tile."""
        return _part(x, self.start, self.key.shape[2], self.seen)


def _part(x, start, width: int, seen):
    x = lax.dynamic_slice_in_dim(x, start, width, 2)
    return x if seen is None else jnp.where(seen, x, jnp.zeros((), x.dtype))


def _scores(options: Options, q, key, segments: Segments | None, group: _Group, first, length: int) -> _Keys:
    """Scores of the query tile q [B, K, G, t, H] that starts at row `first` against the keys [B, K, S, H] it
    can reach.
    """
    keys = key.shape[2]
    offset = first + keys - length
    start = 0 if options.window is None else jnp.clip(offset - options.window + 1, 0, keys - group.width)
    if segments is not None:
        segments = (
            lax.dynamic_slice_in_dim(segments[0], first, group.rows, 1),
            lax.dynamic_slice_in_dim(segments[1], start, group.width, 1),
        )
    rows, columns = offset + jnp.arange(group.rows), start + jnp.arange(group.width)
    allowed = allowed_keys(rows, columns, segments, causal=options.causal, window=options.window)
    # by their place alone all keys that a group reaches are seen by one of its queries
    seen = None if segments is None else allowed.any(1)[:, None, :, None]
    k = _part(key, start, group.width, seen)
    scores = attention_scores(q, k, scale=options.scale, softcap=options.softcap)
    slope = None if options.softcap is None else 1.0 - (scores / options.softcap) ** 2
    scores = scores if allowed is None else jnp.where(allowed[:, None, None], scores, -jnp.inf)
    return _Keys(start, seen, k, scores, slope)


def _forward(
    options: Options, query, key, value, null_logit, masks: Masks
) -> tuple[NullAttention, Float[Array, "B N T"]]:
    """The results and the attention mass sum_j p_j, which 1 - null_mass would lose where the null takes nearly
    everything.
    """
    (batch, length, heads, _), (_, keys, key_heads, _) = query.shape, key.shape
    wide = wide_dtype(query.dtype)
    q, k, v = heads_first(query, key_heads), key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    b = null_logit.reshape(1, key_heads, -1, 1)

    def attend(group, carry, first):
        rows = lax.dynamic_slice_in_dim(q, first, group.rows, 3)
        tile = _scores(options, rows, k, masks.segments, group, first, length)
        top = jnp.maximum(jnp.max(tile.scores, axis=-1, initial=-jnp.inf), b)
        top = jnp.where(top == -jnp.inf, 0.0, top)  # no key and no null
        e = jnp.exp(tile.scores - top[..., None])
        attended, null = e.sum(-1), jnp.exp(b - top)
        empty = attended + null == 0.0
        total = jnp.where(empty, 1.0, attended + null)
        weighted = jnp.einsum("BKGTS,BKSH->BKGTH", e.astype(v.dtype), tile.of(v), preferred_element_type=wide)
        output = (weighted / total[..., None]).astype(query.dtype)
        # log(total) without losing a small `attended` when the null is the largest term and exp(b - top) = 1
        lse = top + jnp.log1p(jnp.where(empty, 0.0, attended + jnp.expm1(b - top)))
        return carry, (output, null / total, jnp.where(empty, -jnp.inf, lse), attended / total)

    _, (output, *statistics) = _run(_groups(length, keys, options), attend, None)
    null_mass, lse, mass = (x.reshape(batch, heads, length) for x in statistics)
    return NullAttention(heads_last(output), null_mass, lse), mass


def _backward(options: Options, query, key, value, masks: Masks, lse, delta, d_output):
    """The gradients of query, key and value: dS = P * (dP - delta), tile by tile."""
    length, keys, key_heads, wide = query.shape[1], *key.shape[1:3], wide_dtype(query.dtype)
    q, d_o = heads_first(query, key_heads), heads_first(d_output, key_heads)
    k, v = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    lse, delta = (x.reshape(q.shape[:4]) for x in (lse, delta))

    def gradients(group, carry, first):
        rows = functools.partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=group.rows, axis=3)
        tile = _scores(options, rows(q), k, masks.segments, group, first, length)
        columns = functools.partial(lax.dynamic_slice_in_dim, start_index=tile.start, slice_size=group.width, axis=2)
        p = jnp.exp(tile.scores - rows(lse)[..., None])
        d_p = jnp.einsum("BKGTH,BKSH->BKGTS", rows(d_o), tile.of(v), preferred_element_type=wide)
        slope = options.scale if tile.slope is None else options.scale * tile.slope
        d_s = (p * (d_p - rows(delta)[..., None]) * slope).astype(query.dtype)
        d_q = jnp.einsum("BKGTS,BKSH->BKGTH", d_s, tile.key, preferred_element_type=wide).astype(query.dtype)
        added = (
            jnp.einsum("BKGTS,BKGTH->BKSH", d_s, rows(q), preferred_element_type=wide),
            jnp.einsum("BKGTS,BKGTH->BKSH", p.astype(d_o.dtype), rows(d_o), preferred_element_type=wide),
        )
        carry = [lax.dynamic_update_slice_in_dim(x, columns(x) + dx, tile.start, 2) for x, dx in zip(carry, added)]
        return tuple(carry), (d_q,)

    start = (jnp.zeros_like(k, wide), jnp.zeros_like(v, wide))
    (d_k, d_v), (d_q,) = _run(_groups(length, keys, options), gradients, start)
    d_k, d_v = (x.transpose(0, 2, 1, 3).astype(query.dtype) for x in (d_k, d_v))
    return heads_last(d_q), d_k, d_v


_serve = differentiable(_forward, _backward)


def null_attention_xla(inputs: AttentionInputs) -> NullAttention:
    """The contract of `null_attention`, a tile of scores at a time."""
    check_sequence(inputs)
    check_axes(inputs.query, inputs.key, inputs.value)
    query, (keys, masks) = inputs.query, (inputs.key.shape[1], inputs.masks)
    if 0 in query.shape:
        rows = jnp.zeros((query.shape[0], query.shape[2], query.shape[1]), wide_dtype(query.dtype))
        return NullAttention(jnp.zeros_like(query), rows, rows)
    if keys == 0:
        return _serve(inputs._replace(masks=Masks()))
    few = query.shape[1] <= _FEW and keys >= _MANY and inputs.options.sharding is None
    return null_attention_masked(inputs) if masks.beyond_segments or few else _serve(inputs)
