"""Depth routing for any platform: sums over a list of sources one by one, under one custom_vjp. (One array of sources:
buffer.py.)

Each source is read where it lies and never stacked. Written as products and sums, XLA fuses them; as batched einsums
over a stack of sources they made a training step on a CPU several times slower. With a_i the weights, omega the null
mass and c the score scale, the backward pass is

    da_i = dO.v_i + d_alpha_i,   dg_i = a_i (da_i - sum_j a_j da_j - omega d_omega),   zero where the score was clamped
    dv_i = a_i dO + (c r_i dg_i) u - (c r_i^3 (u.v_i) dg_i / D) v_i,   du = sum_i (c r_i dg_i) v_i

where r_i is the reciprocal root mean square of a normalized key; without key norm r_i = 1 and the third term of dv_i is
absent.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.depth_route.base import KEY_NORM_EPSILON, MAX_SCORE, DepthRoute, RouteInputs, lifted, score_shift
from pallas_kernels.depth_route.buffer import route_buffer
from pallas_kernels.dispatch import check_axes
from pallas_kernels.fusion import written_once
from pallas_kernels.reverse_mode import reverse_mode_only
from pallas_kernels.sharding import varying_alike


def depth_route_xla(inputs: RouteInputs) -> DepthRoute:
    """The contract of `depth_route`. Among listed sources a traced number of live ones is a mask: the dead
    are read and left out.
    """
    check_axes(inputs.sources, inputs.query)
    if len(inputs.sources) == 1:  # which needs no loop
        inputs = inputs._replace(sources=(inputs.sources[0],))
    if not isinstance(inputs.sources, tuple):
        return route_buffer(inputs._replace(sharding=None))  # XLA partitions it by itself
    inputs = inputs.trimmed()
    query, normalize = inputs.query, inputs.key_norm_scale is not None
    if normalize:
        query = query.astype(inputs.wide) * lifted(inputs.key_norm_scale.astype(inputs.wide), query)
    shift = jnp.broadcast_to(score_shift(inputs), (len(inputs.sources), *inputs.sources[0].shape[:2]))
    arrays = inputs.sources, query, shift, inputs.null_logit.astype(inputs.wide), inputs.live
    return _route(normalize, inputs.score_scale, *reverse_mode_only("depth_route", varying_alike(arrays, arrays)))


def _wide(sources, live) -> list[Float[Array, "B T D"]]:
    """The sources one by one, in float32 or better, the dead ones as zeros."""
    wide = [source.astype(jnp.promote_types(source.dtype, jnp.float32)) for source in sources]
    return wide if live is None else [jnp.where(live[i], source, 0.0) for i, source in enumerate(wide)]


def _dot(source: Float[Array, "B T D"], query: Float[Array, " D"] | Float[Array, "B T D"]) -> Float[Array, "B T"]:
    if query.ndim == 1:  # one matrix-vector product, which XLA's CPU backend runs faster than the same sum
        return jnp.einsum("BTD,D->BT", source, query, precision=lax.Precision.HIGHEST)
    return jnp.sum(source * query, axis=-1)


def _weighted_sum(weights: Float[Array, "L B T"], sources: list[Float[Array, "B T D"]]) -> Float[Array, "B T D"]:
    return written_once(functools.reduce(jnp.add, [weights[i][..., None] * source for i, source in enumerate(sources)]))


def _forward(normalize, score_scale, sources, query, shift, null_logit, live):
    """The results, and per source [L, B, T]: u.v_i, r_i (None without key norm), and where the score was not
    clamped.
    """
    values, query = _wide(sources, live), query.astype(shift.dtype)
    dots = jnp.stack([_dot(value, query) for value in values])
    inverse_rms = (
        jnp.stack([lax.rsqrt(jnp.mean(v * v, axis=-1) + KEY_NORM_EPSILON) for v in values]) if normalize else None
    )
    raw = dots * score_scale * (inverse_rms if normalize else 1.0) + shift
    scores = jnp.clip(raw, -MAX_SCORE, MAX_SCORE)
    if live is not None:
        scores = jnp.where(live[:, None, None], scores, -jnp.inf)
    top = jnp.maximum(scores.max(0), null_logit)
    top = jnp.where(top == -jnp.inf, 0.0, top)  # neither a live source nor a null
    e, null = jnp.exp(scores - top[None]), jnp.exp(null_logit - top)
    total = e.sum(0) + null
    total = jnp.where(total == 0.0, 1.0, total)
    weights = e / total[None]
    output = _weighted_sum(weights, values).astype(sources[0].dtype)
    return (output, weights, null / total), (dots, inverse_rms, jnp.abs(raw) < MAX_SCORE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _route(normalize, score_scale, sources, query, shift, null_logit, live):
    (output, weights, null_mass), _ = _forward(normalize, score_scale, sources, query, shift, null_logit, live)
    return DepthRoute(output, jnp.moveaxis(weights, 0, -1), null_mass)


def _route_forward(normalize, score_scale, sources, query, shift, null_logit, live):
    (output, weights, null_mass), kept = _forward(normalize, score_scale, sources, query, shift, null_logit, live)
    return DepthRoute(output, jnp.moveaxis(weights, 0, -1), null_mass), (sources, query, live, weights, null_mass, kept)


def _route_backward(normalize, score_scale, saved, cotangents):
    sources, query, live, weights, null_mass, (dots, inverse_rms, unclamped) = saved
    d_output, d_weights, d_null_mass = cotangents
    values, u, d_output = (
        _wide(sources, live),
        query.astype(weights.dtype),
        written_once(d_output.astype(weights.dtype)),
    )
    d_alpha = jnp.stack([jnp.sum(value * d_output, axis=-1) for value in values]) + jnp.moveaxis(d_weights, -1, 0)
    attended = jnp.sum(weights * d_alpha, axis=0)
    # omega * (1 - omega) with 1 - omega as the sum of weights, which stays exact when omega is nearly 1
    d_null_logit = jnp.sum(null_mass * (weights.sum(0) * d_null_mass - attended))
    d_scores = jnp.where(unclamped, weights * (d_alpha - attended[None] - (null_mass * d_null_mass)[None]), 0.0)

    along_query = d_scores * score_scale * (inverse_rms if normalize else 1.0)
    if query.ndim == 1:
        parts = [
            jnp.einsum("BT,BTD->D", along_query[i], v, precision=lax.Precision.HIGHEST) for i, v in enumerate(values)
        ]
        d_query = functools.reduce(jnp.add, parts)
    else:
        d_query = _weighted_sum(along_query, values)
    d_sources = [
        weights[i][..., None] * d_output + along_query[i][..., None] * lifted(u, d_output) for i in range(len(values))
    ]
    if normalize:
        along_source = along_query * dots * inverse_rms**2 / u.shape[-1]
        d_sources = [
            d_source - along_source[i][..., None] * value for i, (d_source, value) in enumerate(zip(d_sources, values))
        ]
    d_sources = tuple(d_source.astype(source.dtype) for d_source, source in zip(d_sources, sources))
    return d_sources, d_query.astype(query.dtype), d_scores, d_null_logit, None


_route.defvjp(_route_forward, _route_backward)
