"""The plain definition of attention with a null, differentiated by JAX."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.null_attention.base import (
    NullAttention,
    Options,
    Segments,
    allowed_keys,
    attention_scores,
    wide_dtype,
)


def null_attention_reference(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    null_logit: Float[Array, " N"],
    segments: Segments | None,
    options: Options,
) -> NullAttention:
    """Attention with a null in float32 or better, all T x S scores at once. In plain JAX, for N = K and every key
    allowed:

        scores = scale * jnp.einsum("BTNH,BSNH->BNTS", query, key)
        total = jnp.exp(null_logit)[:, None] + jnp.exp(scores).sum(-1)
        output = jnp.einsum("BNTS,BSNH->BTNH", jnp.exp(scores) / total[..., None], value)
        null_mass = jnp.exp(null_logit)[:, None] / total
        lse = jnp.log(total)

    The code below subtracts the maximum first and spares rows without a key the division by zero.
    """
    dtype, wide = query.dtype, wide_dtype(query.dtype)
    batch, length, heads, size = query.shape
    keys, key_heads = key.shape[1:3]
    q, k, v = (x.astype(wide) for x in (query, key, value))
    q = q.reshape(batch, length, key_heads, -1, size).transpose(0, 2, 3, 1, 4)
    scores = attention_scores(
        q, k.swapaxes(1, 2), scale=options.scale, softcap=options.softcap, precision=lax.Precision.HIGHEST
    )
    rows, columns = jnp.arange(length) + keys - length, jnp.arange(keys)
    allowed = allowed_keys(rows, columns, segments, causal=options.causal, window=options.window)
    allowed = jnp.broadcast_to(True if allowed is None else allowed[:, None, None], scores.shape)

    b = null_logit.reshape(key_heads, -1, 1)
    top = jnp.maximum(jnp.max(scores, axis=-1, initial=-jnp.inf, where=allowed), b)
    top = lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))  # -inf: no key and no null
    e = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - top[..., None], 0.0)), 0.0)
    null = jnp.exp(b - top)
    total = e.sum(-1) + null
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)

    output = jnp.einsum("BKGTS,BSKH->BTKGH", e / total[..., None], v, precision=lax.Precision.HIGHEST)
    # log(total) without losing a small e.sum when the null is the largest term and exp(b - top) = 1
    lse = top + jnp.log1p(jnp.where(empty, 0.0, e.sum(-1) + jnp.expm1(b - top)))
    lse = jnp.where(empty, -jnp.inf, lse)
    rows = (batch, heads, length)
    return NullAttention(output.reshape(query.shape).astype(dtype), (null / total).reshape(rows), lse.reshape(rows))
