"""Which keys a query sees and how it scores them: one definition for training, dense normalizers and measures.

Masks count tokens by their place in the row (`Context.order`), not by their positions, which restart with every
document.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from oasis_jax.config import AttentionConfig
from oasis_jax.model.context import Context
from pallas_kernels.null_attention import allowed_keys as operator_mask
from pallas_kernels.null_attention import attention_scores


def allowed_keys(
    query_order: Int[Array, "#B t"],
    key_order: Int[Array, "#B s"],
    *,
    window: int,
    query_segments: Int[Array, "B t"] | None = None,
    key_segments: Int[Array, "B s"] | None = None,
    causal: bool = True,
) -> Bool[Array, "#B 1 t s"]:
    """Which keys each query may see, for all heads.

    Args:
      query_order, key_order: places of queries and keys in their row; the two may be parts of it, in any order.
      window: keys with 0 <= i - j < window; 0: all.
      query_segments, key_segments: a query sees keys of its own segment only.
      causal: a query sees keys up to its own place.
    """
    segments = None if query_segments is None else (query_segments, key_segments)
    allowed = operator_mask(query_order, key_order, segments, causal=causal, window=window or None)
    if allowed is None:
        allowed = jnp.ones((1, query_order.shape[-1], key_order.shape[-1]), bool)
    return allowed[:, None]


def scores(
    query: Float[Array, "B t N H"], key: Float[Array, "B s K H"], config: AttentionConfig, precision=None
) -> Float[Array, "B N t s"]:
    """Scaled, soft-capped scores, not masked, in float32 or better; N // K consecutive query heads share a key head."""
    batch, length, heads, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, size).transpose(0, 2, 3, 1, 4)
    found = attention_scores(
        grouped,
        key.swapaxes(1, 2),
        scale=config.score_scale,
        softcap=config.logit_softcap or None,
        precision=precision,
    )
    return found.reshape(batch, heads, length, key.shape[1])


def context_mask(context: Context, config: AttentionConfig, length: int) -> Bool[Array, "#B 1 T S"]:
    """Which keys, the cached ones first, each of a pass's own queries may see, in the order in which they lie on the
    devices. The places of a cache that hold no token are later than any query's.
    """
    return allowed_keys(
        context.order(length),
        context.key_order(length),
        window=config.window,
        query_segments=context.segment_ids,
        key_segments=context.key_segments,
    )


def first_in_document(context: Context, length: int) -> Int[Array, "#B T"]:
    """Where the first key of each query's own document lies: an index into the keys as they lie on the devices."""
    if context.segment_ids is None:
        return jnp.zeros((1, length), jnp.int32)  # the row's first token comes first in every order
    order = context.key_order(length)[0]
    index_of = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype))
    ids = jnp.asarray(context.key_segments)[:, index_of]  # in the order of the text
    starts = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    first = index_of[lax.cummax(jnp.where(starts, jnp.arange(order.shape[0]), 0), axis=1)]
    return jnp.take_along_axis(first, jnp.broadcast_to(context.order(length), (len(first), length)), axis=1)


def first_keys(
    context: Context, config: AttentionConfig, length: int
) -> tuple[Int[Array, "#B T"], Bool[Array, "#B T"]]:
    """`first_in_document`, and whether the window of each query reaches it."""
    first, order = first_in_document(context, length), context.order(length)
    # Without segments it is the row's first token, of which a ring may hold nothing any more.
    distance = order if context.segment_ids is None else order - context.key_order(length)[0][first]
    return first, distance < config.window if config.window else jnp.ones_like(first, bool)


def first_of_segment(
    query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The first key with each query's id, and whether there is one."""
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return same.argmax(-1), same.any(-1)


def scores_at(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], at: Int[Array, "#B T"] | None, config: AttentionConfig
) -> Float[Array, "B N T"]:
    """Each query's score of one key of its own; None: of the first."""
    if at is None:
        return scores(query, key[:, :1], config)[..., 0]
    keys = jnp.take_along_axis(key, at[..., None, None], axis=1)  # [B, T, K, H], one for each query
    flat = lambda x: x.reshape(-1, 1, *x.shape[2:])
    found = scores(flat(query), flat(keys), config)[..., 0, 0]
    return found.reshape(*query.shape[:3]).swapaxes(1, 2)
