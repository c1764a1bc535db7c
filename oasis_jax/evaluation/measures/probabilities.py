"""What attention rows tell beyond the first token, at any length: tiles of queries, never a T x T array.

A tile of queries computes its probabilities against the keys that its mask can reach, p = exp(s - lse) for the
normalizers of the fused operator, and is reduced at once: along the keys to the row's maximum and entropy, along the
queries into the column sums. Where positions are split over devices, every device takes rows of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.scipy.special import xlogy
from jaxtyping import Array, Bool, Float, Int

from oasis_jax.config import AttentionConfig
from oasis_jax.model.context import Context
from oasis_jax.model.masks import allowed_keys, scores
from oasis_jax.model.normalizers import DENSE_NORMALIZERS
from oasis_jax.model.statistics import AttentionStatistics

PREFIX = 4  # tokens of the sink set "prefix_4" (OASIS, arXiv 2605.17887, appendix D.4)
ATTENDING = 1e-4  # rows with less mass than this on tokens say nothing about where that mass lies, in float32

_GROUPS = 8  # of tiles, each against the keys that its last tile reaches: few programs, little work above the diagonal
_NO_CONTEXT = Context()


class Probabilities(NamedTuple):
    """What one layer's attention probabilities p were reduced to; N query heads, T queries that are the keys too.

    token_mass: sum of p over keys.
    max_probability: largest p of the row.
    negative_entropy: sum of p log p over keys, in nats, without the null.
    prefix_mass: sum of p over the first PREFIX tokens of the query's document.
    column_sums: sum of p over queries, per key.
    conditional_column_sums: sum of p / (1 - omega) over the queries that attend; see `per_mass`.
    """

    token_mass: Float[Array, "B N T"]
    max_probability: Float[Array, "B N T"]
    negative_entropy: Float[Array, "B N T"]
    prefix_mass: Float[Array, "B N T"]
    column_sums: Float[Array, "B N T"]
    conditional_column_sums: Float[Array, "B N T"]


class _Group(NamedTuple):
    """`count` tiles of `rows` queries of every device's part, from `first` on, against the keys [low, high)."""

    first: int
    rows: int
    count: int
    low: int
    high: int


def conditional_mass(mass: Float[Array, "*rows"], null_mass: Float[Array, "*rows"]) -> tuple[Array, Array]:
    """p / (1 - omega) where at least ATTENDING of the mass is on tokens, 0 elsewhere; and whether it is."""
    attending = 1 - null_mass > ATTENDING
    return jnp.where(attending, mass / jnp.where(attending, 1 - null_mass, 1.0), 0.0), attending


def per_mass(value: Array | float, token_mass: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """`value` over the row's mass on tokens 1 - omega, summed without the cancellation of 1 - omega; 0 up to
    ATTENDING.
    """
    attending = token_mass > ATTENDING
    return jnp.where(attending, value / jnp.where(attending, token_mass, 1.0), 0.0)


def probabilities(
    layer: AttentionStatistics, context: Context = _NO_CONTEXT, place: Int[Array, "#B T"] | None = None
) -> Probabilities:
    """Reads one layer's attention probabilities tile by tile; memory linear in T (but for the clipped, entmax, ...
    baselines).

    Args:
      layer: statistics of a causal self-attention layer that say how it normalizes (`static`).
      context: as the layer got it.
      place: of every token in its own document; None: the tokens' own order.
    """
    batch, length, heads, _ = layer.query.shape
    ways, config = context.placement.ways("length"), layer.static.config
    key = context.constrain(layer.key, "batch", None, "kv_heads", None) if ways > 1 else layer.key
    row_statistics, columns = [], jnp.zeros((batch, heads, ways, 2, length), layer.null_mass.dtype)
    # The dense normalizers may depend on the number of keys, and a split sequence need not lie in order.
    for group in _groups(length // ways, length, config, whole=ways > 1 or config.normalizer in DENSE_NORMALIZERS):
        tile = _tile(layer, key, group, context, place)
        sums = jnp.zeros((*columns.shape[:-1], group.high - group.low), columns.dtype)
        sums = context.constrain(sums, "batch", "heads", "length", None, None)
        if group.count == 1:
            sums, rows = tile(sums, jnp.asarray(group.first))
        else:
            sums, rows = lax.scan(tile, sums, group.first + group.rows * jnp.arange(group.count))
            rows = jnp.moveaxis(rows, 0, 4).reshape(*rows.shape[1:5], -1)
        columns = columns.at[..., group.low : group.high].add(sums)
        row_statistics.append(rows)
    rows = jnp.concatenate(row_statistics, -1).reshape(4, batch, heads, length)
    columns = columns.sum(2)
    return Probabilities(*rows, columns[:, :, 0], columns[:, :, 1])


def _groups(part: int, length: int, config: AttentionConfig, *, whole: bool) -> list[_Group]:
    """Of a device's `part` of the queries; `whole`: every tile against all keys."""
    rows = min(part, 32 if part <= 256 else 64 if part <= 1024 else 128)
    tiles, rest = divmod(part, rows)
    per_group = tiles if whole else max(1, -(-tiles // _GROUPS))

    def group(first: int, rows: int, count: int) -> _Group:
        if whole:
            return _Group(first, rows, count, 0, length)
        low = max(0, first - config.window + 1) if config.window else 0
        return _Group(first, rows, count, low, first + rows * count)

    groups = [group(start * rows, rows, min(per_group, tiles - start)) for start in range(0, tiles, per_group)]
    return groups + ([group(part - rest, rest, 1)] if rest else [])


def _tile(
    layer: AttentionStatistics,
    key: Float[Array, "B T K H"],
    group: _Group,
    context: Context,
    place: Int[Array, "#B T"] | None,
) -> Callable:
    """tile(column sums [B, N, ways, 2, keys], first row) -> column sums, [4, B, N, ways, rows] of the tile's rows."""
    config, keys = layer.static.config, slice(group.low, group.high)
    batch, length, heads, _ = layer.query.shape
    ways, order, segments = context.placement.ways("length"), context.order(length), context.segment_ids
    split = (batch, heads, -1, ways, group.rows)

    def tile(sums, first):
        def rows(x, axis=1):
            parts = x.reshape(*x.shape[:axis], ways, length // ways, *x.shape[axis + 1 :])
            parts = lax.dynamic_slice_in_dim(parts, first, group.rows, axis + 1)
            return parts.reshape(*x.shape[:axis], ways * group.rows, *x.shape[axis + 1 :])

        ids = {} if segments is None else dict(query_segments=rows(segments), key_segments=segments[:, keys])
        allowed = allowed_keys(rows(order), order[:, keys], window=config.window, **ids)
        logits = scores(rows(layer.query), key[:, keys], config, precision=lax.Precision.HIGHEST)
        if config.normalizer in DENSE_NORMALIZERS:
            p = DENSE_NORMALIZERS[config.normalizer](logits, allowed, config)
            largest, negative_entropy = p.max(-1), xlogy(p, p).sum(-1)
        else:
            p, largest, negative_entropy = _from_lse(logits, allowed, rows(layer.lse, 2))
        mass = p.sum(-1)
        prefix = p[..., : max(0, PREFIX - group.low)]
        if place is not None:
            prefix = jnp.where(place[:, None, None, keys] < PREFIX, p, 0.0)
        weights = jnp.stack([jnp.ones_like(mass), per_mass(1.0, mass)], 2).reshape(split).swapaxes(2, 3)
        # In this order of dimensions, the sums over queries are one matrix product; as a transposed one a CPU took
        # twice the time.
        by_part = p.reshape(batch, heads, ways, group.rows, -1)
        sums += jnp.matmul(weights, by_part, precision=lax.Precision.HIGHEST)
        found = jnp.stack([mass, largest, negative_entropy, prefix.sum(-1)])
        return sums, found.reshape(4, batch, heads, ways, group.rows)

    return tile


def _from_lse(
    logits: Float[Array, "B N t S"], allowed: Bool[Array, "#B 1 t S"], lse: Float[Array, "B N t"]
) -> tuple[Array, Array, Array]:
    """p = exp(s - lse), its largest and sum p log p = E_p[s] - lse sum p. Every query sees its own key, so lse is
    finite.
    """
    logs = jnp.where(allowed, logits - lse[..., None], -jnp.inf)
    p = jnp.exp(logs)
    return p, jnp.exp(logs.max(-1)), jnp.where(p > 0, p * logs, 0.0).sum(-1)
