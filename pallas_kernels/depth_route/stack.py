"""A whole stack of routed sublayers over an append-only buffer: memory and program size linear in depth
(AttnRes, arXiv 2603.15031, full).

Sublayer s reads h_s and makes source s+1; router l reads sources 0..l and makes h_l; h_0 is source 0. The queries are
known beforehand, so a source's scores under all later routers are made at its birth by one skinny matmul, and a route
is one weighted sum.

Backward, a source pulls its gradient once from all its consumers instead of every router pushing into all its sources:
delta_l = <dO_l, out_l> is known as soon as dO_l is, so with dg_li = a_li (<dO_l, v_i> - delta_l), zero where the score
was clamped,

    dv_i = sum_l a_li dO_l + r_i sum_l dg_li u_l - r_i^3 / D (sum_l dg_li u_l.v_i) v_i            summed in float32,
    written once dpsi_i = sum_l beta_l (S_l / n_l - dg_li),    S_l = sum_j dg_lj = omega_l delta_l where nothing is
    clamped

Source l is needed last when dO_l is made, so dO_l takes its place in the buffer.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.depth_route.base import MAX_SCORE
from pallas_kernels.depth_route.two_phase import clamp, inverse_rms, wide_type

# (parameters, context, h [B, T, D], psi [B, T]) -> (source [B, T, D], psi [B, T]); psi is the previous sublayer's
# evidence.
Sublayer = Callable[[Any, Any, Array, Array], tuple[Array, Array]]


class Consumers(NamedTuple):
    """What R routers leave behind for the backward pass of their sources.

    queries: [R, D], with the key norm's gain multiplied in.
    couplings: [R]; zeros without coupling.
    lse: [R, B, T], log of the normalizer, null included.
    mean_evidence: [R, B, T], mean of psi over the router's sources.
    delta: [R, B, T], <gradient of the output, output>.
    mean_score_gradient: [R, B, T], mean over the router's sources of the gradients of their scores.
    """

    queries: Float[Array, "R D"]
    couplings: Float[Array, " R"]
    lse: Float[Array, "R B T"]
    mean_evidence: Float[Array, "R B T"]
    delta: Float[Array, "R B T"]
    mean_score_gradient: Float[Array, "R B T"]


def scores_at_birth(source: Float[Array, "B T D"], queries: Float[Array, "R D"]) -> Float[Array, "R B T"]:
    """The scores of one source under R static queries on normalized keys, before evidence; float32 or better."""
    source = source.astype(queries.dtype)
    return jnp.einsum("BTD,RD->RBT", source, queries, precision=lax.Precision.HIGHEST) * inverse_rms(source)


def pull(
    source: Float[Array, "B T D"],
    evidence: Float[Array, "B T"],
    d_outputs: Float[Array, "R B T D"],
    consumers: Consumers,
    reads: Array,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T"], Float[Array, "R D"], Float[Array, " R"]]:
    """The gradients that R routers send to one of their sources, gathered at once.

    Args:
      source, evidence: v_i and psi_i.
      d_outputs: the gradients of the routers' outputs.
      consumers: see Consumers.
      reads: [R] of bool, which routers read this source.

    Returns:
      In float32 or better: the gradients of the source, of its evidence (all that comes through these routers), and
      this source's share of the gradients of the queries and of the couplings.
    """
    wide = consumers.queries.dtype
    value, reads = source.astype(wide), reads[:, None, None]
    r = inverse_rms(value)
    dots = jnp.einsum("BTD,RD->RBT", value, consumers.queries, precision=lax.Precision.HIGHEST)
    betas, centred = consumers.couplings[:, None, None], evidence.astype(wide) - consumers.mean_evidence
    raw = dots * r - betas * centred
    weights = jnp.where(reads, jnp.exp(clamp(raw) - consumers.lse), 0.0)
    d_outputs = d_outputs.astype(wide)
    d_scores = weights * (jnp.sum(d_outputs * value, axis=-1) - consumers.delta)
    d_scores = jnp.where(jnp.abs(raw) < MAX_SCORE, d_scores, 0.0)
    along = d_scores * r
    d_source = (
        jnp.sum(weights[..., None] * d_outputs, axis=0)
        + jnp.einsum("RBT,RD->BTD", along, consumers.queries, precision=lax.Precision.HIGHEST)
        - (jnp.sum(along * dots, axis=0) * r * r / value.shape[-1])[..., None] * value
    )
    d_evidence = jnp.sum(jnp.where(reads, betas * (consumers.mean_score_gradient - d_scores), 0.0), axis=0)
    d_queries = jnp.einsum("RBT,BTD->RD", along, value, precision=lax.Precision.HIGHEST)
    return d_source, d_evidence, d_queries, -jnp.sum(d_scores * centred, axis=(1, 2))


def routed_stack(
    sublayers: Sequence[Sublayer],
    parameters: Sequence[Any],
    context: Any,
    first: Float[Array, "B T D"],
    queries: Float[Array, "S D"],
    couplings: Float[Array, " S"] | None = None,
    *,
    null_logit: float = 0.0,
) -> Float[Array, "B T D"]:
    """The stream after a stack of S = n * P routed sublayers, P kinds in turn; sublayers are computed again in the
    backward pass.

    Args:
      sublayers: P functions (parameters, context, h, psi) -> (source, psi) with psi the evidence of the source before
        (0 at first).
      parameters: P trees whose arrays are stacked [n, ...].
      context: a tree of arrays given to every sublayer; no gradient flows into it.
      first: source 0, which the first sublayer reads unrouted; its psi is 0.
      queries: of router 1 .. S, float32 or better, with the key norm's gain multiplied in.
      couplings: beta of every router; None leaves the evidence out.
      null_logit: a Python number.

    Returns:
      The output of the last router. Differentiable in parameters, first, queries and couplings.

    Raises:
      ValueError: the number of queries is not that of the sublayers.
    """
    periods = {x.shape[0] for x in jax.tree.leaves(tuple(parameters))}
    if (
        len(sublayers) != len(parameters)
        or len(periods) != 1
        or queries.shape != (len(sublayers) * max(periods), first.shape[-1])
    ):
        raise ValueError(
            f"queries: must have shape (sublayers, {first.shape[-1]}) with {len(sublayers)} sublayers for each of "
            f"{sorted(periods)} stacked "
            f"parameters, got {queries.shape}"
        )
    wide = jnp.promote_types(wide_type(first), queries.dtype)
    coupled = couplings is not None
    couplings = couplings.astype(wide) if coupled else jnp.zeros(len(queries), wide)
    static = (tuple(sublayers), float(null_logit), coupled)
    return _stack(static, tuple(parameters), context, first, queries.astype(wide), couplings)


class _Forward(NamedTuple):
    buffer: Array  # [S+1, B, T, D], source i in slot i
    evidence: Array  # [S+1, B, T]
    scores: Array  # [S+1, S, B, T], scores at birth by source and router
    stream: Array
    psi: Array
    clamped: Array  # [B, T], whether any score was clamped so far


def _route(state: _Forward, count, coupling, null_logit):
    """h, lse and mean evidence of the router over the first `count` sources."""
    wide = state.scores.dtype
    live = (jnp.arange(len(state.buffer)) < count)[:, None, None]
    mean = jnp.sum(jnp.where(live, state.evidence, 0.0), axis=0) / count
    raw = lax.dynamic_index_in_dim(state.scores, count - 2, 1, keepdims=False) - coupling * (state.evidence - mean)
    scores = jnp.where(live, clamp(raw), -jnp.inf)
    top = jnp.maximum(scores.max(0), null_logit)
    lse = top + jnp.log(jnp.sum(jnp.exp(scores - top), axis=0) + jnp.exp(null_logit - top))
    stream = jnp.sum(jnp.exp(scores - lse)[..., None] * state.buffer.astype(wide), axis=0)
    clamped = state.clamped | jnp.any(live & (jnp.abs(raw) >= MAX_SCORE), axis=0)
    return state._replace(stream=stream.astype(state.buffer.dtype), clamped=clamped), lse, mean


def _put(buffer, index, x, axis=0):
    return lax.dynamic_update_index_in_dim(buffer, x.astype(buffer.dtype), index, axis)


def _run(static, parameters, context, first, queries, couplings):
    sublayers, null_logit, _ = static
    count, kinds, wide = len(queries), len(sublayers), queries.dtype

    def period(state: _Forward, xs):
        index, own = xs
        kept = []
        for kind, sublayer in enumerate(sublayers):
            s = index * kinds + kind
            source, psi = sublayer(own[kind], context, state.stream, state.psi)
            before = (state.stream, state.psi)
            state = state._replace(
                buffer=_put(state.buffer, s + 1, source),
                evidence=_put(state.evidence, s + 1, psi),
                scores=_put(state.scores, s + 1, scores_at_birth(source, queries)),
                psi=psi.astype(wide),
            )
            state, lse, mean = _route(state, s + 2, couplings[s], null_logit)
            kept.append((*before, lse, mean))
        return state, tuple(kept)

    tokens = first.shape[:2]
    state = _Forward(
        _put(jnp.zeros((count + 1, *first.shape), first.dtype), 0, first),
        jnp.zeros((count + 1, *tokens), wide),
        _put(jnp.zeros((count + 1, count, *tokens), wide), 0, scores_at_birth(first, queries)),
        first,
        jnp.zeros(tokens, wide),
        jnp.zeros(tokens, bool),
    )
    return lax.scan(period, state, (jnp.arange(count // kinds), parameters))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stack(static, parameters, context, first, queries, couplings):
    return _run(static, parameters, context, first, queries, couplings)[0].stream


def _stack_forward(static, parameters, context, first, queries, couplings):
    state, kept = _run(static, parameters, context, first, queries, couplings)
    saved = (
        parameters,
        context,
        queries,
        couplings,
        state.buffer,
        state.evidence,
        state.stream,
        state.clamped.any(),
        kept,
    )
    return state.stream, saved


class _Backward(NamedTuple):
    buffer: (
        Array  # slots up to the source at hand hold sources, later ones the gradients of the streams of their number
    )
    consumers: Consumers  # by router number; slot 0 is no router
    d_psi: Array  # of the evidence of the sublayer at hand, through the sublayer after it
    d_queries: Array
    d_couplings: Array


def _stack_backward(static, saved, d_stream):
    sublayers, null_logit, coupled = static
    parameters, context, queries, couplings, buffer, evidence, stream, clamped, kept = saved
    kinds, count, wide = len(sublayers), len(queries), queries.dtype
    slots = jnp.arange(count + 1)
    by_router = [jnp.stack([one[i] for one in kept], axis=1) for i in (2, 3)]  # [n, P, B, T]
    lse, mean = (jnp.pad(x.reshape(count, *x.shape[2:]), ((1, 0), (0, 0), (0, 0))) for x in by_router)

    def arrive(state: _Backward, router, d_output, output):
        """Takes in the gradient of a router's output; its number's source has been read for the last time, or
        is read in `pull` before.
        """
        delta = jnp.sum(d_output.astype(wide) * output.astype(wide), axis=-1)
        consumers = state.consumers._replace(delta=_put(state.consumers.delta, router, delta))
        if coupled:
            total = lax.cond(clamped, exact_sum, null_share, state, router, d_output, delta)
            consumers = consumers._replace(
                mean_score_gradient=_put(consumers.mean_score_gradient, router, total / (router + 1))
            )
        return state._replace(consumers=consumers)

    def null_share(state, router, d_output, delta):
        return jnp.exp(null_logit - state.consumers.lse[router]) * delta

    def exact_sum(state, router, d_output, delta):
        """The sum over a router's sources of the score gradients, where some are clamped: the sources are
        read again.
        """
        values = jnp.where((slots <= router)[:, None, None, None], state.buffer, 0).astype(wide)
        dots = jnp.einsum("SBTD,D->SBT", values, state.consumers.queries[router], precision=lax.Precision.HIGHEST)
        raw = dots * inverse_rms(values) - state.consumers.couplings[router] * (
            evidence - state.consumers.mean_evidence[router]
        )
        weights = jnp.exp(clamp(raw) - state.consumers.lse[router])
        d_scores = weights * (jnp.sum(values * d_output.astype(wide), axis=-1) - delta)
        unclamped = (slots <= router)[:, None, None] & (jnp.abs(raw) < MAX_SCORE)
        return jnp.sum(jnp.where(unclamped, d_scores, 0.0), axis=0)

    def gather(state: _Backward, source, number):
        d_source, d_psi, d_queries, d_couplings = pull(
            source, evidence[number], state.buffer, state.consumers, (slots >= number) & (slots > 0)
        )
        return (
            state._replace(d_queries=state.d_queries + d_queries, d_couplings=state.d_couplings + d_couplings),
            d_source,
            d_psi,
        )

    def period(carry, xs):
        state, d_output, output = carry
        index, own, kept = xs
        d_own = [None] * kinds
        for kind in reversed(range(kinds)):
            s = index * kinds + kind
            h, psi = kept[kind][:2]
            state = arrive(state, s + 1, d_output, output)
            source = lax.dynamic_index_in_dim(state.buffer, s + 1, keepdims=False)
            state = state._replace(buffer=_put(state.buffer, s + 1, d_output))
            state, d_source, d_psi = gather(state, source, s + 1)
            outputs, pullback = jax.vjp(
                lambda p, h, psi, kind=kind: sublayers[kind](p, context, h, psi), own[kind], h, psi
            )
            d_own[kind], d_output, d_before = pullback(
                (d_source.astype(outputs[0].dtype), (d_psi + state.d_psi).astype(outputs[1].dtype))
            )
            state, output = state._replace(d_psi=d_before.astype(wide)), h
        return (state, d_output, output), tuple(d_own)

    zeros = jnp.zeros_like(lse)
    padded = lambda x: jnp.concatenate([jnp.zeros_like(x[:1]), x])
    consumers = Consumers(padded(queries), padded(couplings), lse, mean, zeros, zeros)
    state = _Backward(
        buffer,
        consumers,
        jnp.zeros_like(lse[0]),
        jnp.zeros_like(consumers.queries),
        jnp.zeros_like(consumers.couplings),
    )
    steps = (jnp.arange(count // kinds), parameters, tuple(one[:2] for one in kept))
    (state, d_direct, _), d_parameters = lax.scan(period, (state, d_stream, stream), steps, reverse=True)
    state, d_first, _ = gather(state, lax.index_in_dim(state.buffer, 0, keepdims=False), 0)
    d_first = (d_first + d_direct.astype(wide)).astype(d_stream.dtype)
    return d_parameters, None, d_first, state.d_queries[1:], state.d_couplings[1:]


_stack.defvjp(_stack_forward, _stack_backward)
