"""What turns attention scores into probabilities.

Softmax and all normalizers with a null are one operator, `pallas_kernels.null_attention`, with another null.
The other normalizers are the baselines of the literature; they materialize the T x S probabilities.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from oasis_jax.config import AttentionConfig

Scores = Float[Array, "*batch S"]
Mask = Bool[Array, "*#batch S"]

_SOFTPICK_EPSILON = 1e-6  # relative to the largest exponential of the row


def softmax(scores: Scores, mask: Mask) -> Scores:
    """Softmax over the allowed keys; a row without any is all zero."""
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, where=mask, initial=-jnp.inf))
    exponent = jnp.where(mask, scores - jnp.where(jnp.isfinite(highest), highest, 0.0), -jnp.inf)
    weights = jnp.exp(exponent)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def null_softmax(scores: Scores, mask: Mask, null_logit: Float[Array, "B N T"]) -> tuple[Scores, Array, Array]:
    """Probabilities [B, N, T, S], null mass and lse [B, N, T] of `pallas_kernels.null_attention`, materialized; of the
    same definition.
    """
    lse = jnp.logaddexp(jax.nn.logsumexp(scores, axis=-1, where=mask), null_logit)
    some = jnp.where(jnp.isfinite(lse), lse, 0.0)  # no allowed key and no null: all masses are 0
    p = jnp.exp(jnp.where(mask, scores - some[..., None], -jnp.inf))
    return p, jnp.exp(null_logit - some), lse


def clipped(scores: Scores, mask: Mask, config: AttentionConfig) -> Scores:
    """clip((zeta - gamma) * softmax + gamma, 0, 1); gamma given, or -alpha / S (Bondarenko, arXiv 2306.12929,
    eq. 4).
    """
    gamma = config.clip_gamma or -config.clip_alpha / scores.shape[-1]
    stretched = (config.clip_zeta - gamma) * softmax(scores, mask) + gamma
    return jnp.where(mask, jnp.clip(stretched, 0.0, 1.0), 0.0)


def softpick(scores: Scores, mask: Mask) -> Scores:
    """relu(e^s - 1) / sum |e^s - 1| over the allowed keys (Zuhri et al., arXiv 2504.20966)."""
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, where=mask, initial=0.0))
    lifted = jnp.where(mask, jnp.exp(jnp.where(mask, scores, 0.0) - highest) - jnp.exp(-highest), 0.0)
    return jax.nn.relu(lifted) / (jnp.abs(lifted).sum(-1, keepdims=True) + _SOFTPICK_EPSILON)


def _shifted(scores: Scores, mask: Mask, scale: float) -> Scores:
    """scale * (scores - row maximum); masked entries far enough below to be outside any support (the threshold is at
    least -1).
    """
    highest = jnp.max(scores, axis=-1, keepdims=True, where=mask, initial=-jnp.inf)
    return jnp.where(mask, scale * (scores - jnp.where(jnp.isfinite(highest), highest, 0.0)), -2.0)


@jax.custom_jvp
def sparsemax(scores: Scores, mask: Mask) -> Scores:
    """Projection onto the simplex (Martins and Astudillo, arXiv 1602.02068); a row without an allowed key is
    all zero.
    """
    z = _shifted(scores, mask, 1.0)
    descending = -jnp.sort(-z, axis=-1)
    rank = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    total = jnp.cumsum(descending, axis=-1)
    size = jnp.sum(1 + rank * descending > total, axis=-1, keepdims=True)
    threshold = (jnp.take_along_axis(total, size - 1, axis=-1) - 1) / size
    return jnp.where(mask, jax.nn.relu(z - threshold), 0.0)


@sparsemax.defjvp
def _sparsemax_jvp(primals, tangents):
    scores, mask = primals
    p = sparsemax(scores, mask)
    support = (p > 0).astype(p.dtype)
    mean = (support * tangents[0]).sum(-1, keepdims=True) / jnp.maximum(support.sum(-1, keepdims=True), 1.0)
    return p, support * (tangents[0] - mean)


@jax.custom_jvp
def entmax15(scores: Scores, mask: Mask) -> Scores:
    """1.5-entmax, exact by sorting (Peters et al., arXiv 1905.05702, alg. 2); a row without an allowed key is
    all zero.
    """
    z = _shifted(scores, mask, 0.5)
    descending = -jnp.sort(-z, axis=-1)
    rank = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    mean = jnp.cumsum(descending, axis=-1) / rank
    variance = jnp.cumsum(descending**2, axis=-1) / rank - mean**2
    threshold = mean - jnp.sqrt(jax.nn.relu(1 / rank - variance))
    size = jnp.sum(threshold <= descending, axis=-1, keepdims=True)
    return jnp.where(mask, jax.nn.relu(z - jnp.take_along_axis(threshold, size - 1, axis=-1)) ** 2, 0.0)


@entmax15.defjvp
def _entmax15_jvp(primals, tangents):
    scores, mask = primals
    p = entmax15(scores, mask)
    slope = jnp.sqrt(p)
    total = slope.sum(-1, keepdims=True)
    mean = (slope * tangents[0]).sum(-1, keepdims=True) / jnp.where(total > 0, total, 1.0)
    return p, slope * (tangents[0] - mean)


# Normalizers of attention with a null, by what the null logit is made of: a constant, or the name of a parameter.
#   null_logit: [N], learned. null_key: the logit is the query's score of learned keys. null_projection: linear in the
#     layer's input.
NULL_LOGITS: dict[str, float | str] = {
    "softmax": -jnp.inf,
    "softmax1": 0.0,
    "learned_sink": "null_logit",
    "null_key": "null_key",
    "null_key_value": "null_key",
    "token_null": "null_projection",
}

# Normalizers whose row may sum to less than one: what is missing is null mass.
WITH_NULL = (*(name for name, logit in NULL_LOGITS.items() if logit != -jnp.inf), "clipped", "softpick")

# Normalizers that materialize the probabilities: name -> function (scores, mask, config) -> probabilities.
DENSE_NORMALIZERS: dict[str, Callable[[Scores, Mask, AttentionConfig], Scores]] = {
    "clipped": clipped,
    "entmax15": lambda scores, mask, _: entmax15(scores, mask),
    "sparsemax": lambda scores, mask, _: sparsemax(scores, mask),
    "softpick": lambda scores, mask, _: softpick(scores, mask),
}
