"""Depth routing by XLA over one array of sources of which a traced number is live: a program whose size does not depend on their number.

Written as masked sums over the whole array, which XLA fuses: neither a product nor a copy in float32 of all sources is ever stored.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.depth_route.base import KEY_NORM_EPSILON, MAX_SCORE
from pallas_kernels.depth_route.vjp import RouteOptions, differentiable


def _live(num_sources: Int[Array, ""] | None, count: int) -> Array:
    return jnp.ones(count, bool) if num_sources is None else jnp.arange(count) < num_sources


def _scores(options: RouteOptions, sources, query, shift, live):
    """The sources in a wide type, the dead ones as zeros; and u.v_i, r_i (1 without key norm) and the scores before they are clamped."""
    values = jnp.where(live[:, None, None, None], sources.astype(shift.dtype), 0.0)
    dots = jnp.sum(values * query, axis=-1)
    inverse_rms = lax.rsqrt(jnp.mean(values * values, axis=-1) + KEY_NORM_EPSILON) if options.normalize else 1.0
    return values, dots, inverse_rms, dots * options.score_scale * inverse_rms + shift


def forward(options: RouteOptions, sources, query, shift, null_logit, num_sources):
    """See `vjp.differentiable`."""
    live = _live(num_sources, len(sources))
    values, _, _, raw = _scores(options, sources, query, shift, live)
    # Clamped scores lie in [-50, 50]: no running maximum is needed beside the null's.
    top = jnp.maximum(null_logit, 0.0)
    e, null = jnp.where(live[:, None, None], jnp.exp(jnp.clip(raw, -MAX_SCORE, MAX_SCORE) - top), 0.0), jnp.exp(null_logit - top)
    total = e.sum(0) + null
    total = jnp.where(total == 0.0, 1.0, total)  # neither a live source nor a null
    weights = e / total
    return jnp.sum(weights[..., None] * values, axis=0).astype(sources.dtype), weights, null / total


def backward(options: RouteOptions, sources, query, shift, num_sources, weights, delta, d_output, d_weights, into=None):
    """See `vjp.sharded_backward`."""
    into = jnp.zeros_like(sources) if into is None else into
    live = _live(num_sources, len(sources))
    values, dots, inverse_rms, raw = _scores(options, sources, query, shift, live)
    d_output = d_output.astype(shift.dtype)
    d_scores = weights * (jnp.sum(values * d_output, axis=-1) + d_weights - delta)
    d_scores = jnp.where(jnp.abs(raw) < MAX_SCORE, d_scores, 0.0)
    along = d_scores * options.score_scale * inverse_rms
    d_values = weights[..., None] * d_output + along[..., None] * query
    if options.normalize:
        d_values -= (along * dots * inverse_rms**2 / values.shape[-1])[..., None] * values
    d_query = jnp.sum(along[..., None] * values, axis=(0, 1, 2) if query.ndim == 1 else 0)
    return (into.astype(shift.dtype) + d_values).astype(into.dtype), d_query, d_scores


route_buffer = differentiable(forward, backward)
