"""Affine-scaled attention (Bae et al., arXiv 2602.23057): what a query takes of the values is scaled by what it reads,
and a share of their mean keeps the sum of its weights near a running average.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MOMENTUM = 0.9  # rho of the running average (eq. 9), the paper's own


def linear_clipping(x: Array) -> Array:
    """0.1 x + 0.5, clipped to [0, 1] (eq. 11): what makes a scale of a projection."""
    return jnp.clip(0.1 * x + 0.5, 0.0, 1.0)


@jax.custom_vjp
def running_average(average: Float[Array, " N"], scale: Float[Array, "B T N"]) -> Float[Array, " N"]:
    """alpha_ma of eq. 9 as it was before this batch, a constant in it.

    Its "gradient" is alpha_ma - E[alpha], so that an update of -(1 - MOMENTUM) times it, which parameters of the role
    "running" get, is the running average's: it needs no state beside the parameters, and is one over all devices. An
    optimizer of your own has to do the same.
    """
    del scale
    return average


def _forward(average, scale):
    return average, (average, scale)


def _backward(kept, _):
    average, scale = kept
    drift = average - scale.astype(average.dtype).mean(axis=(0, 1))
    return drift, jnp.zeros_like(scale)


running_average.defvjp(_forward, _backward)


def affine_scaled(
    heads: Float[Array, "B T N H"],
    mean: Float[Array, "B T N H"],
    scale: Float[Array, "B T N"],
    average: Float[Array, " N"],
) -> Float[Array, "B T N H"]:
    """[alpha softmax + beta] V of eq. 6, with beta = (alpha_ma - alpha) / N of eq. 8.

    Args:
      heads: softmax V.
      mean: of the values that each query sees, which are N of them: a query's weights then sum to alpha_ma, however
        long the sequence is and wherever it stands in it.
      scale: alpha, of each query and head.
      average: alpha_ma; see `running_average`.
    """
    shift = running_average(average, scale) - scale.astype(average.dtype)
    return (scale[..., None] * heads + shift[..., None] * mean).astype(heads.dtype)
