"""Merging attention over shards of the keys: the null joins once, at the end."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.null_attention.base import NullAttention, wide_dtype


def merge_partials(
    outputs: Sequence[Float[Array, "B T N H"]],
    lses: Sequence[Float[Array, "B N T"]],
    *,
    null_logit: float | Float[Array, "#N"] = 0.0,
) -> NullAttention:
    """Joins attention over disjoint shards of the keys into attention over all of them, and adds the null.

    The partial results must be free of a null, that is from `null_attention(..., null_logit=-inf)`: the null belongs
    into the denominator once, not once per shard. This is how ring attention and split-key decoding put their parts
    together.

    Args:
      outputs: one [B, T, N, H] a shard.
      lses: one [B, N, T] a shard; -inf where a query sees no key of the shard.
      null_logit: as in `null_attention`.

    Returns:
      What `null_attention` returns for all keys, with this null logit.
    """
    wide = wide_dtype(outputs[0].dtype)
    lse = jnp.stack(lses).astype(wide)
    b = jnp.reshape(jnp.asarray(null_logit, wide), (1, -1, 1))
    top = jnp.maximum(lse.max(0), b)
    top = lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    seen = lse > -jnp.inf
    masses = jnp.where(seen, jnp.exp(jnp.where(seen, lse - top[None], 0.0)), 0.0)
    attended, null = masses.sum(0), jnp.exp(b - top)
    empty = attended + null == 0.0
    total = jnp.where(empty, 1.0, attended + null)
    shares = jnp.swapaxes(masses / total[None], -1, -2)[..., None]
    output = sum(share * output.astype(wide) for share, output in zip(shares, outputs))
    merged = top + jnp.log1p(jnp.where(empty, 0.0, attended + jnp.expm1(b - top)))
    return NullAttention(output.astype(outputs[0].dtype), null / total, jnp.where(empty, -jnp.inf, merged))
