"""Depth routing by XLA over one array of sources: a loop over the live ones, and a program of one size for any number.

Sums over the whole array, with the dead sources masked, would do without the inner loop; but XLA's CPU and TPU
compilers then store products as large as all sources. Sums over its slices one by one, as over a list, would make XLA
copy the slices, and their gradients once more to put them together.
"""

import functools

import jax.numpy as jnp
from jax import lax

from pallas_kernels.depth_route.base import KEY_NORM_EPSILON, MAX_SCORE, lifted
from pallas_kernels.depth_route.vjp import RouteOptions, differentiable
from pallas_kernels.sharding import varying_alike


def _over_live(num_sources, count: int, body, carry, like):
    """body(i, carry) for every live source."""
    return lax.fori_loop(0, count if num_sources is None else num_sources, body, varying_alike(carry, like))


def _at(x, i):
    return lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x, i, new):
    return lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), i, 0)


def _bits(x):
    """Half-precision numbers as their bits."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _floats(bits, dtype):
    """The numbers that `bits` are the bits of, where they are bits."""
    return lax.bitcast_convert_type(bits, dtype) if bits.dtype == jnp.uint16 else bits


def _by_platform(run, *arrays):
    """run(hold, *arrays), where hold(sources) is what a loop reads and writes sources in.

    On CPUs `_bits`: to read or write one source of a half-precision array, XLA's CPU compiler would convert all of it
    to float32, and back. Elsewhere the sources themselves, as bits would be laid out anew.
    """
    held, plain = functools.partial(run, _bits), functools.partial(run, lambda x: x)
    return lax.platform_dependent(*arrays, cpu=held, default=plain)


def _score(options: RouteOptions, value, query, shift):
    """u.v and r (1 without key norm) of one source, and its score before it is clamped."""
    dot = jnp.sum(value * lifted(query, value), axis=-1)
    inverse_rms = (
        lax.rsqrt(jnp.mean(value * value, axis=-1) + KEY_NORM_EPSILON) if options.normalize else jnp.ones((), dot.dtype)
    )
    return dot, inverse_rms, dot * options.score_scale * inverse_rms + shift


def forward(options: RouteOptions, sources, query, shift, null_logit, num_sources):
    """See `vjp.differentiable`."""
    return _by_platform(functools.partial(_forward, options), sources, query, shift, null_logit, num_sources)


def _forward(options, hold, sources, query, shift, null_logit, num_sources):
    # Clamped scores lie in [-50, 50]: no running maximum is needed beside the null's.
    top, bits = jnp.maximum(null_logit, 0.0), hold(sources)

    def add(i, carry):
        total, exponentials = carry
        value = _floats(_at(bits, i), sources.dtype).astype(shift.dtype)
        e = jnp.exp(jnp.clip(_score(options, value, query, _at(shift, i))[2], -MAX_SCORE, MAX_SCORE) - top)
        return total + e[..., None] * value, _put(exponentials, i, e)

    zeros = jnp.zeros(sources.shape[1:], shift.dtype), jnp.zeros(shift.shape, shift.dtype)
    total, exponentials = _over_live(num_sources, len(sources), add, zeros, (sources, query, shift, null_logit))
    null = jnp.exp(null_logit - top)
    normalizer = exponentials.sum(0) + null
    normalizer = jnp.where(normalizer == 0.0, 1.0, normalizer)  # neither a live source nor a null
    return (total / normalizer[..., None]).astype(sources.dtype), exponentials / normalizer[None], null / normalizer


def backward(options: RouteOptions, sources, query, shift, num_sources, weights, delta, d_output, d_weights, into=None):
    """See `vjp.sharded_backward`."""
    into = jnp.zeros_like(sources) if into is None else into
    return _by_platform(
        functools.partial(_backward, options),
        sources, query, shift, num_sources, weights, delta, d_output, d_weights, into,
    )  # fmt: skip


def _backward(options, hold, sources, query, shift, num_sources, weights, delta, d_output, d_weights, into):
    d_output, bits = d_output.astype(shift.dtype), hold(sources)
    dtype = into.dtype

    def add(i, carry):
        into, d_query, d_shift = carry
        value, weight = _floats(_at(bits, i), sources.dtype).astype(shift.dtype), _at(weights, i)
        dot, inverse_rms, raw = _score(options, value, query, _at(shift, i))
        d_score = weight * (jnp.sum(value * d_output, axis=-1) + _at(d_weights, i) - delta)
        d_score = jnp.where(jnp.abs(raw) < MAX_SCORE, d_score, 0.0)
        along = d_score * options.score_scale * inverse_rms
        d_value = weight[..., None] * d_output + along[..., None] * lifted(query, value)
        if options.normalize:
            d_value -= (along * dot * inverse_rms**2 / value.shape[-1])[..., None] * value
        part = along[..., None] * value
        d_query += part.sum((0, 1)) if query.ndim == 1 else part
        new = (_floats(_at(into, i), dtype).astype(shift.dtype) + d_value).astype(dtype)
        return _put(into, i, hold(new)), d_query, _put(d_shift, i, d_score)

    zeros = hold(into), jnp.zeros_like(query), jnp.zeros_like(shift)
    into, d_query, d_shift = _over_live(num_sources, len(sources), add, zeros, (sources, query, weights, d_output))
    return _floats(into, dtype), d_query, d_shift


route_buffer = differentiable(forward, backward)
