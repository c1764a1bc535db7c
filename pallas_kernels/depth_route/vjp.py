"""The derivative that the accelerator backends of depth_route share.

With a_i the weights, omega the null mass, c the score scale, r_i the reciprocal root mean square of a normalized key (1
without key norm):

    delta = dO.O + sum_j a_j d_alpha_j + omega d_omega            known before any source is read again
    dg_i = a_i (dO.v_i + d_alpha_i - delta)                       zero where the score was clamped
    dv_i = a_i dO + (c r_i dg_i) u - (c r_i^3 (u.v_i) dg_i / D) v_i,     du = sum_i (c r_i dg_i) v_i

so a backward kernel reads every source once, and may recompute u.v_i and r_i from what it has read.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.depth_route.base import DepthRoute, RouteInputs, lifted, score_shift
from pallas_kernels.dispatch import differentiated_once
from pallas_kernels.reverse_mode import reverse_mode_only
from pallas_kernels.sharding import OperatorSharding, varying_alike


class RouteOptions(NamedTuple):
    """What a kernel is compiled for. normalize: keys are divided by their root mean square; their gain is
    part of the query. Kernels never see a sharding.
    """

    normalize: bool
    score_scale: float
    sharding: OperatorSharding | None = None

    @classmethod
    def of(cls, inputs: RouteInputs) -> "RouteOptions":
        return cls(inputs.key_norm_scale is not None, inputs.score_scale, inputs.sharding)


def differentiable(forward: Callable, backward: Callable, kernels: str | None = None) -> Callable:
    """Joins two kernels into a differentiable backend.

    Args:
      forward: forward(options, sources, query, shift, null_logit, num_sources) -> (output [B, T, D], weights [L, B, T],
        null_mass [B, T]), with options a RouteOptions; sources an array [L, B, T, D] or a tuple of L arrays; query [D]
        or [B, T, D] in the wide dtype; shift [L, B, T] wide, added to the scores before they are clamped; null_logit a
        scalar; num_sources None or an int32 scalar.
      backward: backward(options, sources, query, shift, num_sources, weights, delta [B, T], d_output [B, T, D],
        d_weights [L, B, T]) -> (d_sources like sources, zero for the dead, d_query like query, d_shift [L, B, T]).
      kernels: name of a backend whose functions JAX cannot differentiate: a second derivative is refused.

    Returns:
      serve(inputs: RouteInputs) -> DepthRoute.
    """
    forward, backward = _sharded_forward(forward), sharded_backward(backward)
    if kernels is not None:
        forward, backward = (differentiated_once("depth_route", kernels, f) for f in (forward, backward))

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def route(options, sources, query, shift, null_logit, num_sources):
        return _result(varying_alike(forward(options, sources, query, shift, null_logit, num_sources), sources))

    def route_forward(options, sources, query, shift, null_logit, num_sources):
        output, weights, null_mass = varying_alike(
            forward(options, sources, query, shift, null_logit, num_sources), sources
        )
        return _result((output, weights, null_mass)), (sources, query, shift, num_sources, output, weights, null_mass)

    def route_backward(options, saved, cotangents):
        sources, query, shift, num_sources, output, weights, null_mass = saved
        d_output, d_weights, d_null_mass = cotangents
        d_weights = jnp.moveaxis(d_weights, -1, 0)
        through_output = jnp.sum(output.astype(weights.dtype) * d_output.astype(weights.dtype), axis=-1)
        attended = through_output + jnp.sum(weights * d_weights, axis=0)
        # omega * (1 - omega) with 1 - omega as the sum of weights, which stays exact when omega is nearly 1
        d_null_logit = jnp.sum(null_mass * (weights.sum(0) * d_null_mass - attended))
        delta = attended + null_mass * d_null_mass
        gradients = backward(options, sources, query, shift, num_sources, weights, delta, d_output, d_weights)
        d_sources, d_query, d_shift = varying_alike(gradients, sources)
        return d_sources, d_query, d_shift, d_null_logit, None

    route.defvjp(route_forward, route_backward)

    def serve(inputs: RouteInputs) -> DepthRoute:
        if isinstance(inputs.sources, tuple):
            inputs = inputs.trimmed()
        query, shift = query_and_shift(inputs)
        arrays = inputs.sources, query, shift, inputs.null_logit.astype(inputs.wide), live_number(inputs)
        return route(RouteOptions.of(inputs), *reverse_mode_only("depth_route", varying_alike(arrays, arrays)))

    return serve


def query_and_shift(inputs: RouteInputs) -> tuple[Array, Array]:
    """The query with the keys' gain in it and what is added to the scores [L, B, T], as kernels take them."""
    query = inputs.query.astype(inputs.wide)
    if inputs.key_norm_scale is not None:
        query = query * lifted(inputs.key_norm_scale.astype(inputs.wide), query)
    return query, jnp.broadcast_to(score_shift(inputs), (len(inputs.sources), *inputs.sources[0].shape[:2]))


def live_number(inputs: RouteInputs) -> Array | None:
    """The number of live sources as kernels take it: None for all."""
    return None if inputs.num_sources is None else jnp.asarray(inputs.num_sources, jnp.int32)


def _specs(options: RouteOptions, sources, query, num_sources):
    """PartitionSpecs of sources, query, the number of sources, a [B, T, D] array, an [L, B, T] array and a [B, T]
    array.
    """
    spec = options.sharding.spec
    stream = spec("batch", "sequence", None)
    placed = (stream,) * len(sources) if isinstance(sources, tuple) else spec(None, "batch", "sequence", None)
    number = None if num_sources is None else spec()
    return (
        placed,
        spec(None) if query.ndim == 1 else stream,
        number,
        stream,
        spec(None, "batch", "sequence"),
        spec("batch", "sequence"),
    )


def _sharded_forward(forward: Callable) -> Callable:
    """`forward` over the mesh of `options.sharding`, every device on its own tokens; itself where there is none."""

    def run(options, sources, query, shift, null_logit, num_sources):
        if options.sharding is None:
            return forward(options, sources, query, shift, null_logit, num_sources)
        placed, along, number, stream, scores, rows = _specs(options, sources, query, num_sources)
        local = options._replace(sharding=None)
        mapped = options.sharding.mapped(
            lambda *arrays: forward(local, *arrays),
            (placed, along, scores, options.sharding.spec(), number),
            (stream, scores, rows),
        )
        return mapped(sources, query, shift, null_logit, num_sources)

    return run


def sharded_backward(backward: Callable) -> Callable:
    """`backward` over the mesh of `options.sharding`; the gradient of a query that all tokens share is summed
    over the devices.

    A backward function may take one more array, `into`, to which it adds the sources' gradients.
    """

    def run(options, sources, query, shift, num_sources, weights, delta, d_output, d_weights, *into):
        arrays, sharding = (
            (sources, query, shift, num_sources, weights, delta, d_output, d_weights, *into),
            options.sharding,
        )
        if sharding is None:
            return backward(options, *arrays)
        placed, along, number, stream, scores, rows = _specs(options, sources, query, num_sources)

        def local(*arrays):
            d_sources, d_query, d_shift = backward(options._replace(sharding=None), *arrays)
            axes = sharding.axes("batch", "sequence")
            return d_sources, lax.psum(d_query, axes) if query.ndim == 1 and axes else d_query, d_shift

        given = (placed, along, scores, number, scores, rows, stream, scores, *[placed for _ in into])
        return sharding.mapped(local, given, (placed, along, scores))(*arrays)

    return run


def _result(results) -> DepthRoute:
    output, weights, null_mass = results
    return DepthRoute(output, jnp.moveaxis(weights, 0, -1), null_mass)
