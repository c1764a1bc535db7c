"""The derivative that all backends of null_attention share.

With delta = rowsum(dO * O) + omega * d_omega - d_lse the backward pass is the one of FlashAttention, dS = P * (dP -
delta): the cotangents of null mass and lse only shift delta. A backend is two functions, and its backward kernel is an
ordinary one that takes lse and delta. Both run inside `jax.shard_map` where the call has a sharding; the derivative is
outside, on the whole arrays.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import differentiated_once
from pallas_kernels.null_attention.base import AttentionInputs, Masks, NullAttention, wide_dtype
from pallas_kernels.null_attention.outside import add_null
from pallas_kernels.null_attention.sharded import sharded_backward, sharded_forward
from pallas_kernels.reverse_mode import reverse_mode_only
from pallas_kernels.sharding import varying_alike


def differentiable(forward: Callable, backward: Callable, kernels: str | None = None) -> Callable:
    """Joins two kernels into a differentiable backend.

    Args:
      forward: forward(options, query, key, value, null_logit [N], masks) -> (NullAttention, attention mass [B, N, T]).
        The attention mass is sum_j p_j, which 1 - null_mass would lose where the null takes nearly everything; null
        mass and lse follow the contract of `null_attention` for rows without a key.
      backward: backward(options, query, key, value, masks, lse [B, N, T], delta [B, N, T], d_output [B, T, N, H]) ->
        gradients of query, key and value in their dtypes and, where there is a bias, of the bias. lse is finite: rows
        without key and null carry 0, and all their scores are masked.
      kernels: name of a backend whose functions JAX cannot differentiate: a second derivative is refused.

    Returns:
      serve(AttentionInputs) -> NullAttention.
    """
    forward, backward = sharded_forward(forward), sharded_backward(backward)
    if kernels is not None:
        forward, backward = (differentiated_once("null_attention", kernels, f) for f in (forward, backward))

    def with_null(options, query, key, value, null_logit, masks):
        if null_logit.ndim == 1:
            return forward(options, query, key, value, null_logit, masks)
        no_null = jnp.full(query.shape[2], -jnp.inf, null_logit.dtype)
        return add_null(forward(options, query, key, value, no_null, masks)[0], null_logit)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attention(options, query, key, value, null_logit, masks):
        return with_null(options, query, key, value, null_logit, masks)[0]

    def attention_forward(options, query, key, value, null_logit, masks):
        result, mass = with_null(options, query, key, value, null_logit, masks)
        return result, (query, key, value, masks, result, mass, null_logit)

    def attention_backward(options, saved, cotangents):
        query, key, value, masks, result, mass, null_logit = saved
        lse, delta, d_null_logit = _rows(result, mass, cotangents)
        d_null_logit = d_null_logit.sum((0, 2)) if null_logit.ndim == 1 else d_null_logit
        d_query, d_key, d_value, *d_bias = backward(options, query, key, value, masks, lse, delta, cotangents.output)
        return d_query, d_key, d_value, d_null_logit, Masks(bias=d_bias[0] if d_bias else None)

    attention.defvjp(attention_forward, attention_backward)

    def serve(inputs: AttentionInputs) -> NullAttention:
        arrays = inputs[:-1]
        return attention(inputs.options, *reverse_mode_only("null_attention", varying_alike(arrays, arrays)))

    return serve


def _rows(result: NullAttention, mass: Float[Array, "B N T"], cotangents: NullAttention):
    """What a backward kernel needs of every row, lse and delta, and the gradient of the row's null logit."""
    wide = wide_dtype(result.output.dtype)
    through_output = jnp.einsum("BTNH,BTNH->BNT", result.output.astype(wide), cotangents.output.astype(wide))
    delta = through_output + result.null_mass * cotangents.null_mass - cotangents.lse
    # -omega * (delta - d_omega) with 1 - omega written as the attention mass, which stays exact when omega is nearly 1
    d_null_logit = -result.null_mass * (through_output - mass * cotangents.null_mass - cotangents.lse)
    return jnp.where(result.lse == -jnp.inf, 0.0, result.lse), delta, d_null_logit
