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
    options: Options, rows: Int[Array, " t"], columns: Int[Array, " s"], segments: Segments | None
) -> Bool[Array, "#B 1 1 t s"] | None:
    """Which of some keys some queries may see, or None for all.

    Args:
      options: the static arguments.
      rows: the queries' positions counted in keys, i + S - T: the last query sits on the last key.
      columns: the keys' positions.
      segments: ids of those queries [B, t] and keys [B, s].
    """
    allowed = None
    if options.causal or options.window is not None:
        distance = rows[:, None] - columns[None, :]
        allowed = (distance >= 0)[None, None, None]
        if options.window is not None:
            allowed &= distance < options.window
    if segments is not None:
        same = (segments[0][:, :, None] == segments[1][:, None, :])[:, None, None]
        allowed = same if allowed is None else allowed & same
    return allowed
