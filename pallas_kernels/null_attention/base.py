"""What the backends of null_attention share: the result, the static options, and which keys a query may see."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.sharding import OperatorSharding

Segments = tuple[Int[Array, "B T"], Int[Array, "B S"]]


class NullAttention(NamedTuple):
    """The results of attention with a null.

    output: [B, T, N, H] in the dtype of the inputs.
    null_mass: [B, N, T], omega, the probability of the null; float32, or float64 for float64 inputs.
    lse: [B, N, T], log(exp(b) + sum_j exp(s_j)), so that log omega = b - lse; dtype as null_mass.
    """

    output: Float[Array, "B T N H"]
    null_mass: Float[Array, "B N T"]
    lse: Float[Array, "B N T"]


class Options(NamedTuple):
    """The static arguments of null_attention, checked. A window implies causality: 0 <= i - j < window.
    Kernels never see a sharding.
    """

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    sharding: OperatorSharding | None = None


def wide_dtype(dtype) -> jnp.dtype:
    """The dtype of statistics and accumulators: float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)


def allowed_keys(
    rows: Int[Array, "*#B t"],
    columns: Int[Array, "*#B s"],
    segments: tuple[Int[Array, "B t"], Int[Array, "B s"]] | None,
    *,
    causal: bool,
    window: int | None,
) -> Bool[Array, "#B t s"] | None:
    """Which of some keys some queries may see, or None for all. The one definition of every mask.

    Args:
      rows: the places of the queries, counted in keys, for all rows of a batch or for each; with T queries of S keys
        the i-th has place i + S - T, so that the last query sits on the last key.
      columns: the places of the keys, likewise.
      segments: ids of those queries and keys.
      causal: a query sees keys up to its own place.
      window: a query sees keys with 0 <= row - column < window, causal or not.
    """
    allowed = None
    if causal or window is not None:
        distance = rows[..., :, None] - columns[..., None, :]
        allowed = distance >= 0
        if window is not None:
            allowed &= distance < window
        allowed = allowed if allowed.ndim == 3 else allowed[None]
    if segments is not None:
        same = segments[0][:, :, None] == segments[1][:, None, :]
        allowed = same if allowed is None else allowed & same
    return allowed


def attention_scores(
    query: Float[Array, "B K G t H"],
    key: Float[Array, "B K s H"],
    *,
    scale: float,
    softcap: float | None,
    precision=None,
) -> Float[Array, "B K G t s"]:
    """Scores of grouped queries in float32 or better: scaled, then soft-capped, not masked."""
    scores = jnp.einsum(
        "BKGTH,BKSH->BKGTS", query, key, precision=precision, preferred_element_type=wide_dtype(query.dtype)
    )
    scores = scores * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)
