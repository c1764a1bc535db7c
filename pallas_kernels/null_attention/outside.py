"""A null that differs from query to query, and what a null contributes: added once to the results of attention without
a null, outside of the kernels. Exact, and the same for every backend; the kernels' backward pass takes the joined lse
and output as it takes its own (vjp.py), so that a null per query costs it nothing:

    b = null_logit + logsumexp_p(scale * q.k_p)      one skinny product
    lse' = logaddexp(lse, b),   output' = exp(lse - lse') output + omega v0,   omega = exp(b - lse')
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.null_attention.base import NullAttention, attention_scores, heads_first, wide_dtype
from pallas_kernels.sharding import varying_alike


def null_scores(
    query: Float[Array, "B T N H"],
    null_logit: float | Float[Array, " N"] | Float[Array, "B T N"],
    null_key: Float[Array, "P K H"] | None,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Array, "B N T"], Float[Array, "B N T P"] | None]:
    """The logit of the null of every query, and each null key's share in it (None where there is at most one)."""
    wide = wide_dtype(query.dtype)
    null_logit = jnp.asarray(null_logit, wide)
    null_logit = null_logit if null_logit.ndim else null_logit[None]
    b = null_logit.swapaxes(1, 2) if null_logit.ndim == 3 else null_logit[None, :, None]
    (batch, length, heads, size), shares = query.shape, None
    if null_key is not None:
        count, key_heads, _ = null_key.shape
        rows = heads_first(query, key_heads)
        key = jnp.broadcast_to(null_key.astype(query.dtype).swapaxes(0, 1)[None], (batch, key_heads, count, size))
        scores = attention_scores(rows, key, scale=scale, softcap=softcap, precision=lax.Precision.HIGHEST).reshape(
            batch, heads, length, count
        )
        if count == 1:
            b = b + scores[..., 0]
        else:
            b, shares = b + jax.nn.logsumexp(scores, axis=-1), jax.nn.softmax(scores, axis=-1)
    return jnp.broadcast_to(b, (batch, heads, length)), shares


def add_null(result: NullAttention, b: Float[Array, "B N T"]) -> tuple[NullAttention, Float[Array, "B N T"]]:
    """Joins a null of logit b per query to the results of attention without a null; and the attention mass left."""
    lse, share, null_mass = _join(*varying_alike((result.lse, b), (result.lse, b)))
    output = result.output.astype(share.dtype) * share.swapaxes(1, 2)[..., None]
    return NullAttention(output.astype(result.output.dtype), null_mass, lse), share


def add_null_value(
    result: NullAttention, null_value: Float[Array, "P K H"], shares: Float[Array, "B N T P"] | None
) -> NullAttention:
    """Adds what the null contributes: its mass times its value, of several the mean by their shares."""
    batch, length, heads, _ = result.output.shape
    count, key_heads, _ = null_value.shape
    mass = result.null_mass[..., None] * (1.0 if shares is None else shares)
    mass = mass.reshape(batch, key_heads, heads // key_heads, length, count)
    value = null_value.astype(result.output.dtype).astype(mass.dtype)
    added = jnp.einsum("BKGTP,PKH->BTKGH", mass, value, precision=lax.Precision.HIGHEST)
    output = result.output.astype(mass.dtype) + added.reshape(result.output.shape)
    return result._replace(output=output.astype(result.output.dtype))


@jax.custom_jvp
def _join(lse: Float[Array, "B N T"], b: Float[Array, "B N T"]) -> tuple[Array, Array, Array]:
    """log(exp(lse) + exp(b)), and the shares of the keys and of the null in it, both 0 where there is neither."""
    some_keys, some_null = lse > -jnp.inf, b > -jnp.inf
    both = some_keys & some_null & (b < jnp.inf)
    distance = jnp.where(both, lse, 0.0) - jnp.where(both, b, 0.0)
    smaller = jnp.exp(-jnp.abs(distance))
    larger = jnp.maximum(lse, b)
    joined = larger + jnp.where(both, jnp.log1p(smaller), 0.0)
    # exp(-|d|) / (1 + exp(-|d|)) keeps the smaller share where the larger is nearly 1
    big, small = 1.0 / (1.0 + smaller), smaller / (1.0 + smaller)
    keys = jnp.where(both, jnp.where(distance > 0, big, small), jnp.where(some_keys & ~some_null, 1.0, 0.0))
    null = jnp.where(both, jnp.where(distance > 0, small, big), jnp.where(some_null, 1.0, 0.0))
    return joined, keys, null


@_join.defjvp
def _join_jvp(primals, tangents):
    joined, keys, null = _join(*primals)
    d_lse, d_b = tangents
    moved = keys * null * (d_b - d_lse)  # omega * (1 - omega), with 1 - omega as the share of the keys
    return (joined, keys, null), (keys * d_lse + null * d_b, -moved, moved)
