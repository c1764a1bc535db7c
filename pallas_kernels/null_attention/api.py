"""The public null_attention: its contract, the check of its arguments and the table of its backends."""

import contextlib
import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import dispatch, target_mesh
from pallas_kernels.null_attention.arguments import Null, check_arguments
from pallas_kernels.null_attention.base import AttentionInputs, NullAttention, Segments
from pallas_kernels.null_attention.cudnn import null_attention_cudnn
from pallas_kernels.null_attention.mosaic_gpu import null_attention_mosaic_gpu
from pallas_kernels.null_attention.mosaic_tpu import null_attention_mosaic_tpu
from pallas_kernels.null_attention.outside import add_null_value, null_scores
from pallas_kernels.null_attention.reference import null_attention_reference
from pallas_kernels.null_attention.sharded import check_sharding, in_sequence_order
from pallas_kernels.null_attention.xla import null_attention_xla
from pallas_kernels.sharding import OperatorSharding, mesh_of

# Fastest first. A backend takes AttentionInputs and raises Unavailable where it cannot serve.
IMPLEMENTATIONS = {
    "cudnn": null_attention_cudnn,
    "mosaic_gpu": null_attention_mosaic_gpu,
    "mosaic_tpu": null_attention_mosaic_tpu,
    "xla": null_attention_xla,
    "reference": in_sequence_order(null_attention_reference),
}


def null_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    null_logit: float | Float[Array, ""] | Float[Array, " N"] | Float[Array, "B T N"] = 0.0,
    null_key: Float[Array, "K H"] | Float[Array, "P K H"] | None = None,
    null_value: Float[Array, "K H"] | Float[Array, "P K H"] | None = None,
    is_causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    query_offset: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    kv_lengths: Int[Array, " B"] | None = None,
    logit_softcap: float | None = None,
    scale: float | None = None,
    sharding: OperatorSharding | None = None,
    implementation: str | None = None,
) -> NullAttention:
    """Attention over the keys and a null, which no mask hides; its value is zero unless one is given.

    With scores s_j = scale * q.k_j, probabilities are p_j = exp(s_j) / (exp(b) + sum_k exp(s_k)), the null mass is
    omega = exp(b) / (exp(b) + sum_k exp(s_k)) and the output sum_j p_j v_j + omega v_0. b = 0 is Softmax1 (OASIS, arXiv
    2605.17887), b = -inf is softmax, a learned b per head is the learnable sink (arXiv 2601.22966), a null key is a key
    bias (arXiv 2410.10781). A query without any key has null mass 1, output v_0 or 0 and lse b; for b = -inf null mass
    and output 0, lse -inf and zero gradients. Statistics are float32 or better, whatever the inputs.

    A key or value that no query of its head may see reaches neither a result nor a gradient, whatever it holds.
    Derivatives are for reverse mode: forward mode (`jax.jvp`, `jax.jacfwd`) needs implementation="reference", second
    derivatives (`jax.hessian`) that or "xla".

    Args:
      query: N query heads of size H; N is a multiple of K: N // K consecutive query heads share a key head.
      key: S keys.
      value: their values.
      null_logit: b for all heads, one per query head or one per query and head; -inf leaves the null out, +inf gives it
        everything. Never soft-capped.
      null_key: null keys k_p, scored as every key, soft cap included: b = null_logit + logsumexp_p(scale * q.k_p).
      null_value: as many values, v_0 their mean weighted by softmax_p(scale * q.k_p).
      is_causal: a query sees keys up to its own position. With T != S the last query sits on the last live key, as in
        decoding against a cache, unless query_offset says otherwise.
      window: keep only keys with 0 <= i - j < window. This holds for is_causal=False too: a window looks back.
      segment_ids: attend only within equal ids; one array for queries and keys (T = S), or a pair (queries, keys).
      mask: True where a query may see a key; each dimension 1 or full, so that [B, 1, 1, S] is padding.
      bias: added to the soft-capped scores; each dimension 1 or full.
      query_offset: the position of the first query among the keys, one for all or one per row.
      kv_lengths: how many keys of each row are live; the rest of a preallocated cache is not read. Concrete values must
        lie in 0..S, traced ones count as the nearest end.
      logit_softcap: scores become cap * tanh(s / cap).
      scale: factor of the scores; H ** -0.5 where not given.
      sharding: how the arrays are split over a mesh; the kernels then run inside `jax.shard_map`, with the keys passed
        around the sequence axis. Without it the arrays lie on one device, or are one device's part inside the caller's
        own shard_map, or are partitioned by XLA, which backends of plain JAX operations allow.
      implementation: a name of `pallas_kernels.implementations("null_attention")`; None: the fastest that can serve.
        mask, bias, query_offset and kv_lengths are served by "xla" and "reference", without a sequence axis.

    Returns:
      NullAttention(output [B, T, N, H], null_mass [B, N, T], lse [B, N, T]); all differentiable in query, key, value,
      null_logit, null_key, null_value and bias.

    Raises:
      ValueError: an argument does not fit, or the named implementation does not exist or cannot serve.
    """
    inputs, null = check_arguments(
        query,
        key,
        value,
        null_logit=null_logit,
        null_key=null_key,
        null_value=null_value,
        is_causal=is_causal,
        window=window,
        segment_ids=segment_ids,
        mask=mask,
        bias=bias,
        query_offset=query_offset,
        kv_lengths=kv_lengths,
        logit_softcap=logit_softcap,
        scale=scale,
    )
    serve = dispatch("null_attention", IMPLEMENTATIONS, implementation)
    if sharding is not None:
        inputs = _split(inputs, sharding)
    mesh = mesh_of(inputs.query) if sharding is None else sharding.mesh
    with contextlib.nullcontext() if mesh is None else target_mesh(mesh):
        return _with_null(serve, inputs, null)


def _split(inputs: AttentionInputs, sharding: OperatorSharding) -> AttentionInputs:
    """The inputs of a call over a mesh."""
    check_sharding(inputs.query, inputs.key, inputs.options._replace(sharding=sharding))
    if sharding.sequence and sharding.ways("sequence") == 1:
        sharding = dataclasses.replace(sharding, sequence=None, layout="contiguous")
    options = inputs.options._replace(sharding=sharding)
    # fewer key heads than devices: each device gets a copy of its own
    copies = max(1, sharding.ways("heads") // inputs.key.shape[2])
    key, value = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (inputs.key, inputs.value))
    return inputs._replace(key=key, value=value, options=options)


def _with_null(serve: Callable, inputs: AttentionInputs, null: Null) -> NullAttention:
    """The backend's result with the null, whose logit is one per head or one per query, and its value."""
    if null.key is None and null.logit.ndim == 1:
        # an infinite b would meet an infinite maximum in the kernels; beside a score, this one is as large
        largest = float(jnp.finfo(null.logit.dtype).max) / 2
        result, shares = serve(inputs._replace(null_logit=jnp.minimum(null.logit, largest))), None
        b = null.logit[None, :, None]
        result = result._replace(lse=jnp.where(b > largest, b, result.lse))
    else:
        options = inputs.options
        b, shares = null_scores(inputs.query, null.logit, null.key, scale=options.scale, softcap=options.softcap)
        result = serve(inputs._replace(null_logit=b))
    return result if null.value is None else add_null_value(result, null.value, shares)
