"""The plain definition of attention with a null, differentiated by JAX."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from pallas_kernels.null_attention.base import (
    AttentionInputs,
    NullAttention,
    allowed_keys,
    attention_scores,
    grouped,
    heads_first,
    visible_only,
    wide_dtype,
)
from pallas_kernels.null_attention.outside import add_null


def null_attention_reference(inputs: AttentionInputs) -> NullAttention:
    """Attention with a null in float32 or better, all T x S scores at once. In plain JAX, for N = K and every key
    allowed:

        scores = scale * jnp.einsum("BTNH,BSNH->BNTS", query, key)
        total = jnp.exp(null_logit)[:, None] + jnp.exp(scores).sum(-1)
        output = jnp.einsum("BNTS,BSNH->BTNH", jnp.exp(scores) / total[..., None], value)
        null_mass = jnp.exp(null_logit)[:, None] / total
        lse = jnp.log(total)

    The code below subtracts the maximum first, spares rows without a key the division by zero and keeps what no query
    may see out of every product.
    """
    query, options = inputs.query, inputs.options
    if inputs.null_logit.ndim == 3:  # joined, so that the derivative keeps an attention mass next to nothing
        no_null = jnp.full(query.shape[2], -jnp.inf, inputs.null_logit.dtype)
        return add_null(null_attention_reference(inputs._replace(null_logit=no_null)), inputs.null_logit)[0]
    dtype, wide = query.dtype, wide_dtype(query.dtype)
    batch, length, heads, _ = query.shape
    key_heads = inputs.key.shape[2]
    allowed = _allowed(inputs)
    q, k, v = (x.astype(wide) for x in (query, inputs.key, inputs.value))
    k, v = visible_only(k, allowed), visible_only(v, allowed)
    q = heads_first(q, key_heads)
    scores = attention_scores(
        q, k.swapaxes(1, 2), scale=options.scale, softcap=options.softcap, precision=lax.Precision.HIGHEST
    )
    if inputs.masks.bias is not None:
        scores = scores + grouped(inputs.masks.bias, heads, key_heads)
    allowed = jnp.broadcast_to(allowed, scores.shape)

    b = inputs.null_logit.reshape(1, key_heads, -1, 1)
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


def _allowed(inputs: AttentionInputs) -> Bool[Array, "#B #K #G T S"]:
    """Which keys every query may see."""
    (length, heads), (keys, key_heads) = inputs.query.shape[1:3], inputs.key.shape[1:3]
    masks, options = inputs.masks, inputs.options
    rows, columns = masks.first_place(length, keys)[:, None] + jnp.arange(length)[None], jnp.arange(keys)
    allowed = allowed_keys(rows, columns, masks.segments, causal=options.causal, window=options.window)
    allowed = jnp.ones((1, length, keys), bool) if allowed is None else allowed
    if masks.kv_lengths is not None:
        allowed &= (columns[None] < masks.kv_lengths[:, None])[:, None]
    allowed = allowed[:, None, None]
    return allowed if masks.mask is None else allowed & grouped(masks.mask, heads, key_heads)
