"""The public null_attention: its contract, the check of its arguments and the table of its backends."""

import operator

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import dispatch, target_mesh
from pallas_kernels.null_attention.base import NullAttention, Options, Segments, wide_dtype
from pallas_kernels.null_attention.cudnn import null_attention_cudnn
from pallas_kernels.null_attention.mosaic_gpu import null_attention_mosaic_gpu
from pallas_kernels.null_attention.mosaic_tpu import null_attention_mosaic_tpu
from pallas_kernels.null_attention.reference import null_attention_reference
from pallas_kernels.null_attention.sharded import check_sharding, in_sequence_order
from pallas_kernels.null_attention.xla import null_attention_xla
from pallas_kernels.sharding import OperatorSharding

# Fastest first. A backend takes (query, key, value, null_logit [N], segments, options) and raises Unavailable where it
# cannot serve.
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
    null_logit: float | Float[Array, ""] | Float[Array, " N"] = 0.0,
    is_causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    logit_softcap: float | None = None,
    scale: float | None = None,
    sharding: OperatorSharding | None = None,
    implementation: str | None = None,
) -> NullAttention:
    """Attention over the keys and one null key, whose score is `null_logit` and whose value is zero.

    With scores s_j = scale * q.k_j, probabilities are p_j = exp(s_j) / (exp(b) + sum_k exp(s_k)), the output is sum_j
    p_j v_j and the null mass omega = exp(b) / (exp(b) + sum_k exp(s_k)). b = 0 is Softmax1 (OASIS, arXiv 2605.17887), b
    = -inf is softmax, a learned b per head is the learnable sink (arXiv 2601.22966). A query without any key has output
    0 and null mass 1 (0 for b = -inf), and zero gradients. Statistics are float32 or better, whatever the inputs.

    Args:
      query: N query heads of size H; N is a multiple of K: N // K consecutive query heads share a key head.
      key: S keys.
      value: their values.
      null_logit: b, for all heads or one per query head; -inf leaves the null out. Differentiable, never soft-capped.
      is_causal: a query sees keys up to its own position. With T != S the last query sits on the last key, as in
        decoding against a cache.
      window: keep only keys with 0 <= i - j < window. This holds for is_causal=False too: a window looks back.
      segment_ids: attend only within equal ids; one array for queries and keys (T = S), or a pair (queries, keys). A
        pair also hides the dead part of a preallocated cache: ids 0 for queries and live keys, 1 for the rest, with
        is_causal=False.
      logit_softcap: scores become cap * tanh(s / cap).
      scale: factor of the scores; H ** -0.5 where not given.
      sharding: how the arrays are split over a mesh; the kernels then run inside `jax.shard_map`, with the keys passed
        around the sequence axis. Without it the arrays lie on one device, or are one device's part inside the caller's
        own shard_map, or are partitioned by XLA, which backends of plain JAX operations allow.
      implementation: a name of `pallas_kernels.implementations("null_attention")`; None: the fastest that can serve.

    Returns:
      NullAttention(output [B, T, N, H], null_mass [B, N, T], lse [B, N, T]); all differentiable in all float arguments.

    Raises:
      ValueError: an argument does not fit, or the named implementation does not exist or cannot serve.
    """
    _check_arrays(query, key, value)
    segments = _check_segments(segment_ids, query, key)
    options = _check_options(query, is_causal, window, logit_softcap, scale)
    b = _check_null_logit(null_logit, query)
    serve = dispatch("null_attention", IMPLEMENTATIONS, implementation)
    if sharding is None:
        return serve(query, key, value, b, segments, options)
    options = options._replace(sharding=sharding)
    check_sharding(query, key, options)
    copies = max(
        1, sharding.ways("heads") // key.shape[2]
    )  # fewer key heads than devices: each device gets a copy of its own
    key, value = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (key, value))
    with target_mesh(sharding.mesh):
        return serve(query, key, value, b, segments, options)


def _check_arrays(query, key, value) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if jnp.ndim(x) != 4:
            raise ValueError(f"{name}: must be [batch, length, heads, head size], got shape {jnp.shape(x)}")
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != query.dtype:
            raise ValueError(
                f"{name}: query, key and value must share one floating-point dtype, got {x.dtype} (query: "
                f"{query.dtype})"
            )
    if key.shape != value.shape:
        raise ValueError(f"value: must have the shape of key {key.shape}, got {value.shape}")
    if (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]):
        raise ValueError(f"key: must have query's batch and head size {query.shape}, got shape {key.shape}")
    if 0 in (*query.shape, key.shape[2]):
        raise ValueError(f"query: all dimensions must be at least 1, got {query.shape} with {key.shape[2]} key heads")
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"key: the number of query heads {query.shape[2]} must be a multiple of key heads, got shape {key.shape}"
        )


def _check_segments(segment_ids, query, key) -> Segments | None:
    if segment_ids is None:
        return None
    pair = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
    if len(pair) != 2:
        raise ValueError(f"segment_ids: must be one array or a pair (queries, keys), got {len(pair)} arrays")
    for ids, owner, wanted in zip(pair, ("queries", "keys"), (query.shape[:2], key.shape[:2])):
        if jnp.shape(ids) != wanted or not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
            raise ValueError(
                f"segment_ids: those of the {owner} must be integers of shape {wanted}, got {jnp.result_type(ids)} "
                f"{jnp.shape(ids)}"
            )
    return jnp.asarray(pair[0]), jnp.asarray(pair[1])


def _check_options(query, is_causal, window, logit_softcap, scale) -> Options:
    if not isinstance(is_causal, bool):
        raise ValueError(f"is_causal: must be True or False, got {is_causal!r}")
    if window is not None and (
        isinstance(window, bool) or not hasattr(window, "__index__") or operator.index(window) < 1
    ):
        raise ValueError(f"window: must be None or a whole number of at least 1, got {window!r}")
    for name, number in (("logit_softcap", logit_softcap), ("scale", scale)):
        if number is not None and not isinstance(number, int | float):
            raise ValueError(f"{name}: must be None or a Python number, got {number!r}")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap: must be None or greater than 0, got {logit_softcap!r}")
    return Options(
        causal=is_causal,
        window=None if window is None else operator.index(window),
        softcap=None if logit_softcap is None else float(logit_softcap),
        scale=query.shape[3] ** -0.5 if scale is None else float(scale),
    )


def _check_null_logit(null_logit, query) -> Float[Array, " N"]:
    heads = query.shape[2]
    if jnp.shape(null_logit) not in ((), (heads,)) or jnp.iscomplexobj(null_logit):
        raise ValueError(
            f"null_logit: must be a real number or one per query head ({heads},), got shape {jnp.shape(null_logit)}"
        )
    return jnp.broadcast_to(jnp.asarray(null_logit, wide_dtype(query.dtype)), (heads,))
