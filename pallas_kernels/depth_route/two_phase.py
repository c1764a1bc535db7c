"""Depth routing in two phases, for blocks of sublayers whose queries are known before the block runs (AttnRes, arXiv
2603.15031).

Every router of a block reads the finished blocks and the block's own running sum. Phase 1 serves all routers of the
block in one pass over the finished sources; phase 2 adds the running sum when it is there. With g_i the scores without
the mean of psi, c = coupling * mean_i psi_i

    phase 1   lse_1 = log sum_finished exp(g_i),   output_1 = sum_finished exp(g_i - lse_1) v_i
    phase 2   lse = log(exp(b) + exp(lse_1 + c) + exp(g_r + c)),   output = exp(lse_1 + c - lse) output_1 + exp(g_r + c
    - lse) v_r

so the null and the mean shift, neither of which phase 1 can know, are applied once. Where a finished score may reach
the clamp, whose place depends on c, phase 2 reads the finished sources again instead of using phase 1; that is a branch
taken for no ordinary model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.depth_route.base import KEY_NORM_EPSILON, MAX_SCORE


class FinishedRoutes(NamedTuple):
    """Phase 1, for Q queries; `jax.tree.map(lambda x: x[q], routes)` is that of one.

    output: [Q, B, T, D], in the sources' dtype.
    lse: [Q, B, T], float32 or better.
    may_clamp: [Q], whether some finished score may reach the clamp once the mean of psi is added.
    """

    output: Float[Array, "Q B T D"]
    lse: Float[Array, "Q B T"]
    may_clamp: Bool[Array, " Q"]


class RunningRoute(NamedTuple):
    """Phase 2: output [B, T, D] in the sources' dtype, lse [B, T] with null and mean shift, null_mass [B, T]."""

    output: Float[Array, "B T D"]
    lse: Float[Array, "B T"]
    null_mass: Float[Array, "B T"]


def inverse_rms(source: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """The reciprocal root mean square of a source already in float32 or better."""
    return lax.rsqrt(jnp.mean(source * source, axis=-1) + KEY_NORM_EPSILON)


def clamp(scores: Array) -> Array:
    return jnp.clip(scores, -MAX_SCORE, MAX_SCORE)


def wide_type(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _raw_scores(source, queries, key_norm_scales, score_scale) -> Float[Array, "Q B T"]:
    """Scores of one source under Q queries, before bias and evidence."""
    wide = wide_type(source)
    source, queries = source.astype(wide), queries.astype(wide)
    if key_norm_scales is not None:
        queries = queries * key_norm_scales.astype(wide)
    scores = jnp.einsum("BTD,QD->QBT", source, queries, precision=lax.Precision.HIGHEST) * score_scale
    return scores if key_norm_scales is None else scores * inverse_rms(source)


def _shifted(raw: Float[Array, "Q L B T"], bias, evidence, couplings) -> Float[Array, "Q L B T"]:
    if bias is not None:
        raw = raw + bias.astype(raw.dtype)[..., None, None]
    return raw if evidence is None else raw - _column(couplings, raw, 4) * evidence.astype(raw.dtype)


def _column(couplings, like: Array, rank: int) -> Array:
    couplings = jnp.asarray(couplings, like.dtype)
    return couplings.reshape(couplings.shape + (1,) * (rank - couplings.ndim))


def route_finished(
    sources: Sequence[Float[Array, "B T D"]],
    queries: Float[Array, "Q D"],
    *,
    key_norm_scales: Float[Array, "Q D"] | None = None,
    score_scale: float = 1.0,
    bias: Float[Array, "Q L"] | None = None,
    null_evidence: Float[Array, "L B T"] | None = None,
    couplings: Float[Array, " Q"] | float = 0.0,
) -> FinishedRoutes:
    """Phase 1: Q static queries over the L finished sources, without the null and without the mean of psi.

    Args:
      sources: L arrays [B, T, D].
      queries: one a router of the block.
      key_norm_scales: gains of the key norms, one a router; None scores the sources themselves.
      score_scale: a Python number.
      bias: added to the scores.
      null_evidence: psi of the finished sources, a mass in [0, 1].
      couplings: beta, one a router or one for all; only with null_evidence.

    Returns:
      FinishedRoutes. Differentiable in every floating-point argument.

    Raises:
      ValueError: an argument's shape does not fit.
    """
    _check(sources, queries, key_norm_scales=key_norm_scales, bias=bias, null_evidence=null_evidence)
    raw = jnp.stack([_raw_scores(source, queries, key_norm_scales, score_scale) for source in sources], axis=1)
    scores = _shifted(raw, bias, null_evidence, couplings)
    top = lax.stop_gradient(scores.max(1))
    e = jnp.exp(scores - top[:, None])
    total = e.sum(1)
    weights = e / total[:, None]
    output = sum(weights[:, i, ..., None] * source.astype(scores.dtype) for i, source in enumerate(sources))
    lowest, highest = 0.0, 0.0  # of the mean shift
    if null_evidence is not None:
        known, beta = null_evidence.astype(scores.dtype).sum(0), _column(couplings, scores, 3)
        ends = beta * known / (len(sources) + 1), beta * (known + 1) / (len(sources) + 1)
        lowest, highest = jnp.minimum(*ends), jnp.maximum(*ends)
    reached = (scores.max(1) + highest >= MAX_SCORE) | (scores.min(1) + lowest <= -MAX_SCORE)
    return FinishedRoutes(output.astype(sources[0].dtype), top + jnp.log(total), reached.any(axis=(1, 2)))


def route_running(
    finished: FinishedRoutes,
    running: Float[Array, "B T D"],
    query: Float[Array, " D"],
    *,
    sources: Sequence[Float[Array, "B T D"]],
    key_norm_scale: Float[Array, " D"] | None = None,
    score_scale: float = 1.0,
    bias: Float[Array, " L+1"] | None = None,
    null_evidence: Float[Array, "L+1 B T"] | None = None,
    coupling: Float[Array, ""] | float = 0.0,
    null_logit: Float[Array, ""] | float = 0.0,
) -> RunningRoute:
    """Phase 2: the route of one query over the finished sources and the running one; equals `depth_route` over
    [*sources, running].

    Args:
      finished: phase 1 of this query, without the axis Q, made of the same sources and options.
      running: the running sum.
      sources: the L finished sources; read only where `finished.may_clamp`.
      bias, null_evidence: of the finished sources and, last, of the running one.
      query, key_norm_scale, score_scale, coupling, null_logit: see `depth_route`.

    Returns:
      RunningRoute. Differentiable in every floating-point argument.
    """
    _check([*sources, running], query[None], bias=None if bias is None else bias[None], null_evidence=null_evidence)
    wide = wide_type(running)
    gains = None if key_norm_scale is None else key_norm_scale[None]
    b = jnp.asarray(null_logit, wide)
    mean_shift = jnp.zeros((), wide)
    if null_evidence is not None:
        mean_shift = jnp.asarray(coupling, wide) * null_evidence.astype(wide).mean(0)

    def scores_of(chosen, which):
        raw = jnp.stack([_raw_scores(source, query[None], gains, score_scale)[0] for source in chosen])[None]
        evidence = None if null_evidence is None else null_evidence[which]
        return clamp(_shifted(raw, None if bias is None else bias[None, which], evidence, coupling)[0] + mean_shift)

    running_score = scores_of([running], slice(-1, None))[0]

    def merged(finished, sources):
        del sources
        return finished.output.astype(wide), finished.lse + mean_shift

    def again(finished, sources):
        del finished
        scores = scores_of(sources, slice(None, -1))
        lse = jax.nn.logsumexp(scores, axis=0)
        return sum(jnp.exp(score - lse)[..., None] * source.astype(wide) for score, source in zip(scores, sources)), lse

    output, lse = lax.cond(finished.may_clamp, again, merged, finished, tuple(sources))
    return RunningRoute(*merge_running(output, lse, running, running_score, b))


def merge_running(output, lse, running, running_score, null_logit):
    """(output, lse, null mass) of a partial result with one more source and the null, which is added here and
    nowhere else.
    """
    top = lax.stop_gradient(jnp.maximum(jnp.maximum(lse, running_score), null_logit))
    both, null = (jnp.exp(lse - top), jnp.exp(running_score - top)), jnp.exp(null_logit - top)
    total = both[0] + both[1] + null
    wide = output.dtype
    merged = (both[0] / total)[..., None] * output + (both[1] / total)[..., None] * running.astype(wide)
    return merged.astype(running.dtype), top + jnp.log(total), null / total


def _check(sources, queries, **arguments) -> None:
    shape, count = jnp.shape(sources[0]) if len(sources) else (), len(sources)
    if len(shape) != 3 or any(jnp.shape(s) != shape or s.dtype != sources[0].dtype for s in sources):
        raise ValueError(
            "sources: must be arrays [batch, length, width] of one shape and dtype, got "
            f"{[jnp.shape(s) for s in sources]}"
        )
    if jnp.ndim(queries) != 2 or queries.shape[1] != shape[2]:
        raise ValueError(
            f"queries: must have shape (queries, {shape[2]}) for sources of shape {shape}, got {jnp.shape(queries)}"
        )
    wanted = {"key_norm_scales": queries.shape, "bias": (len(queries), count), "null_evidence": (count, *shape[:2])}
    for name, x in arguments.items():
        if x is not None and jnp.shape(x) != wanted[name]:
            raise ValueError(
                f"{name}: must have shape {wanted[name]} for {count} sources of shape {shape}, got {jnp.shape(x)}"
            )
