"""What attention rows tell beyond the first token, at any length: tiles of queries, never a T x T array.

A tile of queries computes its probabilities against the keys that its mask can reach, p = exp(s - lse) for the
normalizers of the fused operator, and is reduced at once: along the keys to the row's maximum and entropy, along the
queries into the column sums.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.scipy.special import xlogy
from jaxtyping import Array, Bool, Float, Int

from oasis_jax.config import AttentionConfig
from oasis_jax.model.normalizers import DENSE_NORMALIZERS
from oasis_jax.model.statistics import AttentionStatistics

PREFIX = 4  # tokens of the sink set "prefix_4" (OASIS, arXiv 2605.17887, appendix D.4)
ATTENDING = 1e-4  # rows with less mass than this on tokens say nothing about where that mass lies, in float32

# Normalizers whose probabilities over tokens may sum to less than one.
WITH_NULL = ("softmax1", "learned_sink", "clipped", "softpick")

_GROUPS = 8  # of tiles, each against the keys that its last tile reaches: few programs, little work above the diagonal


class Probabilities(NamedTuple):
    """What one layer's attention probabilities p were reduced to; N query heads, T queries that are the keys too.

    token_mass: sum of p over keys.
    max_probability: largest p of the row.
    negative_entropy: sum of p log p over keys, in nats, without the null.
    prefix_mass: sum of p over the first PREFIX keys.
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
    """`count` tiles of `rows` queries from `first` on, against the keys [low, high)."""

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


def has_null(layers: list[AttentionStatistics]) -> bool:
    """Whether a layer's normalizer may leave mass to a null."""
    return any(layer.static is not None and layer.static.config.normalizer in WITH_NULL for layer in layers)


def probabilities(layer: AttentionStatistics, segment_ids: Int[Array, "B T"] | None = None) -> Probabilities:
    """Reads one layer's attention probabilities block by block; memory linear in T (but for the clipped, entmax, ...
    baselines).

    Args:
      layer: statistics of a causal self-attention layer that say how it normalizes (`static`).
      segment_ids: [B, T]; as the layer got them.
    """
    batch, length, heads, size = layer.query.shape
    key_heads = layer.key.shape[2]
    query = layer.query.reshape(batch, length, key_heads, -1, size).transpose(0, 2, 3, 1, 4)
    key = layer.key.transpose(0, 2, 3, 1)
    row_statistics, columns = [], jnp.zeros((batch, heads, 2, length), layer.null_mass.dtype)
    for group in _groups(length, layer.static.config):
        sums = jnp.zeros((*columns.shape[:3], group.high - group.low), columns.dtype)
        tile = _tile(layer, query, key, group, segment_ids)
        if group.count == 1:
            sums, rows = tile(sums, jnp.asarray(group.first))
        else:
            sums, rows = lax.scan(tile, sums, group.first + group.rows * jnp.arange(group.count))
            rows = jnp.moveaxis(rows, 0, 3).reshape(*rows.shape[1:4], -1)
        columns = columns.at[..., group.low : group.high].add(sums)
        row_statistics.append(rows)
    mass, largest, negative_entropy, prefix = jnp.concatenate(row_statistics, -1)
    return Probabilities(mass, largest, negative_entropy, prefix, columns[:, :, 0], columns[:, :, 1])


def _groups(length: int, config: AttentionConfig) -> list[_Group]:
    rows = min(length, 32 if length <= 256 else 64 if length <= 1024 else 128)
    tiles, rest = divmod(length, rows)
    whole = config.normalizer in DENSE_NORMALIZERS  # these may depend on the number of keys
    per_group = tiles if whole else max(1, -(-tiles // _GROUPS))

    def group(first: int, rows: int, count: int) -> _Group:
        high = length if whole else first + rows * count
        return _Group(first, rows, count, max(0, first - config.window + 1) if config.window and not whole else 0, high)

    groups = [group(start * rows, rows, min(per_group, tiles - start)) for start in range(0, tiles, per_group)]
    return groups + ([group(length - rest, rest, 1)] if rest else [])


def _tile(
    layer: AttentionStatistics,
    query: Float[Array, "B K G T H"],
    key: Float[Array, "B K H T"],
    group: _Group,
    segment_ids: Int[Array, "B T"] | None,
) -> Callable:
    """tile(column sums [B, N, 2, keys], first row) -> column sums, [4, B, N, rows] of the tile's rows."""
    config, key = layer.static.config, key[..., group.low : group.high]
    columns = group.low + jnp.arange(group.high - group.low)

    def tile(sums, first):
        def rows(x, axis):
            return lax.dynamic_slice_in_dim(x, first, group.rows, axis)

        distance = (first + jnp.arange(group.rows))[:, None] - columns
        allowed = (distance >= 0) & ((distance < config.window) if config.window else True)
        allowed = allowed[None, None]
        if segment_ids is not None:
            allowed &= rows(segment_ids, 1)[:, None, :, None] == segment_ids[:, None, None, group.low : group.high]
        scores = _scores(rows(query, 3), key, config)
        if config.normalizer in DENSE_NORMALIZERS:
            p = DENSE_NORMALIZERS[config.normalizer](scores, allowed, config)
            largest, negative_entropy = p.max(-1), xlogy(p, p).sum(-1)
        else:
            p, largest, negative_entropy = _from_lse(scores, allowed, rows(layer.lse, 2))
        mass = p.sum(-1)
        weights = jnp.stack([jnp.ones_like(mass), per_mass(1.0, mass)], 2)
        # In this order of dimensions, the sums over queries are one matrix product; as a transposed one a CPU took
        # twice the time.
        sums += jnp.matmul(weights, p, precision=lax.Precision.HIGHEST)
        return sums, jnp.stack([mass, largest, negative_entropy, p[..., : max(0, PREFIX - group.low)].sum(-1)])

    return tile


def _scores(
    query: Float[Array, "B K G t H"], key: Float[Array, "B K H S"], config: AttentionConfig
) -> Float[Array, "B N t S"]:
    batch, key_heads, group, length, size = query.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = (
        jnp.einsum("BKGTH,BKHS->BKGTS", query, key, precision=lax.Precision.HIGHEST, preferred_element_type=wide)
        * size**-0.5
    )
    if config.logit_softcap:
        scores = config.logit_softcap * jnp.tanh(scores / config.logit_softcap)
    return scores.reshape(batch, key_heads * group, length, key.shape[3])


def _from_lse(
    scores: Float[Array, "B N t S"], allowed: Bool[Array, "#B 1 t S"], lse: Float[Array, "B N t"]
) -> tuple[Array, Array, Array]:
    """p = exp(s - lse), its largest and sum p log p = E_p[s] - lse sum p. Every query sees its own key, so lse is
    finite.
    """
    logs = jnp.where(allowed, scores - lse[..., None], -jnp.inf)
    p = jnp.exp(logs)
    return p, jnp.exp(logs.max(-1)), jnp.where(p > 0, p * logs, 0.0).sum(-1)
