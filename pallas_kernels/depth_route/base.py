"""What the backends of depth_route share: the result, the arguments, the constants and the evidence's share of the
scores.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.sharding import OperatorSharding

KEY_NORM_EPSILON = 1e-6  # added to the mean square of a source when keys are normalized
MAX_SCORE = 50.0  # scores are clamped to [-MAX_SCORE, MAX_SCORE] after coupling; outside, their gradient is 0

Sources = Float[Array, "L B T D"] | Sequence[Float[Array, "B T D"]]


class DepthRoute(NamedTuple):
    """The results of depth routing.

    output: [B, T, D], the weighted sum of the sources, in their dtype.
    weights: [B, T, L], alpha; float32, or float64 for float64 sources.
    null_mass: [B, T], the probability of the null, 1 - sum of weights; dtype as weights.
    """

    output: Float[Array, "B T D"]
    weights: Float[Array, "B T L"]
    null_mass: Float[Array, "B T"]


class RouteInputs(NamedTuple):
    """The checked arguments of depth_route, as every backend takes them.

    sources: an array [L, B, T, D], or a tuple of L arrays [B, T, D].
    query: [D] or [B, T, D].
    key_norm_scale: [D], or None for keys that are the sources themselves.
    bias: None, [L] or [B, T, L].
    evidence: None, or psi [L, B, T].
    coupling: a scalar, beta.
    null_logit: a scalar.
    num_sources: how many sources are live: None for all, a Python number or a traced scalar.
    score_scale: a Python number.
    sharding: how tokens are split over a mesh, or None. A backend of plain JAX operations leaves it to XLA.
    """

    sources: Float[Array, "L B T D"] | tuple[Float[Array, "B T D"], ...]
    query: Float[Array, " D"] | Float[Array, "B T D"]
    key_norm_scale: Float[Array, " D"] | None
    bias: Float[Array, " L"] | Float[Array, "B T L"] | None
    evidence: Float[Array, "L B T"] | None
    coupling: Float[Array, ""]
    null_logit: Float[Array, ""]
    num_sources: int | Int[Array, ""] | None
    score_scale: float
    sharding: OperatorSharding | None = None

    @property
    def dtype(self) -> jnp.dtype:
        return self.sources[0].dtype

    @property
    def wide(self) -> jnp.dtype:
        """The dtype of scores, weights and accumulators: float32 or better."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def live(self) -> Bool[Array, " L"] | None:
        """Which sources are live, or None where all are."""
        return None if self.num_sources is None else jnp.arange(len(self.sources)) < self.num_sources

    def trimmed(self) -> "RouteInputs":
        """The same call without its dead sources, where their number is a Python number."""
        if not isinstance(self.num_sources, int):
            return self
        bias, evidence = self.bias, self.evidence
        return self._replace(
            sources=self.sources[: self.num_sources],
            bias=None if bias is None else bias[..., : self.num_sources],
            evidence=None if evidence is None else evidence[: self.num_sources],
            num_sources=None,
        )


def lifted(x: Array, like: Array) -> Array:
    """x with leading dimensions of 1, as many as `like` has: JAX may be told to refuse to add them by itself."""
    return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)


def score_shift(inputs: RouteInputs) -> Float[Array, "#L #B #T"]:
    """What is added to the scores before they are clamped: bias - beta * (psi - mean of psi over the live sources)."""
    wide = inputs.wide
    live = None if inputs.live is None else inputs.live[:, None, None]
    shift = jnp.zeros((1, 1, 1), wide)
    if inputs.bias is not None:
        bias = inputs.bias.astype(wide)
        shift = bias[:, None, None] if bias.ndim == 1 else jnp.moveaxis(bias, -1, 0)
    if inputs.evidence is not None:
        evidence = inputs.evidence.astype(wide)
        if live is None:
            centred = evidence - evidence.mean(0, keepdims=True)
        else:
            evidence = jnp.where(live, evidence, 0.0)
            centred = evidence - evidence.sum(0, keepdims=True) / jnp.maximum(live.sum(), 1)
        shift = shift - inputs.coupling.astype(wide) * centred
    return shift if live is None else jnp.where(live, shift, 0.0)
