"""The derivative of depth_route by hand, for loops over depth that keep all sources, and all their gradients, in one
array each.

Differentiated by JAX, every route of a stack returns an array of gradients as large as all sources, most of it zeros,
to be added to the others.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.depth_route import buffer
from pallas_kernels.depth_route.api import route_inputs
from pallas_kernels.depth_route.base import DepthRoute, RouteInputs
from pallas_kernels.depth_route.mosaic_gpu import check_mosaic_gpu
from pallas_kernels.depth_route.mosaic_tpu import backward_mosaic_tpu
from pallas_kernels.depth_route.reference import depth_route_reference
from pallas_kernels.depth_route.vjp import RouteOptions, live_number, query_and_shift
from pallas_kernels.dispatch import dispatch, target_mesh
from pallas_kernels.sharding import varying_alike


class RouteGradients(NamedTuple):
    """The gradients of a route's arguments; None for those that were not given.

    sources: [L, B, T, D], those of the sources added to what was there before.
    """

    sources: Float[Array, "L B T D"]
    query: Float[Array, "..."]
    key_norm_scale: Float[Array, " D"] | None
    bias: Float[Array, "..."] | None
    null_evidence: Float[Array, "L B T"] | None
    coupling: Float[Array, ""] | None


# The arguments of a call that gradients flow into beside the sources, as depth_route and as RouteInputs call them.
_DIFFERENTIABLE = {
    "query": "query",
    "key_norm_scale": "key_norm_scale",
    "bias": "bias",
    "null_evidence": "evidence",
    "coupling": "coupling",
}


def _arguments(inputs: RouteInputs) -> dict[str, Array]:
    given = {name: getattr(inputs, field) for name, field in _DIFFERENTIABLE.items()}
    return {
        name: x for name, x in given.items() if x is not None and (name != "coupling" or inputs.evidence is not None)
    }


def _with(inputs: RouteInputs, arguments: dict[str, Array]) -> RouteInputs:
    return inputs._replace(**{_DIFFERENTIABLE[name]: x for name, x in arguments.items()})


def _by(backward: Callable, inputs: RouteInputs, into, result: DepthRoute, d_output):
    """By a backward function of `vjp.sharded_backward`."""

    def prepared(arguments):
        return varying_alike(query_and_shift(_with(inputs, arguments)), (inputs.sources, d_output))

    (query, shift), pull = jax.vjp(prepared, _arguments(inputs))
    delta, weights = (
        jnp.sum(result.output.astype(inputs.wide) * d_output.astype(inputs.wide), axis=-1),
        jnp.moveaxis(result.weights, -1, 0),
    )
    arrays = inputs.sources, query, shift, live_number(inputs), weights, delta, d_output, jnp.zeros_like(weights), into
    into, d_query, d_shift = backward(RouteOptions.of(inputs), *varying_alike(arrays, arrays))
    return into, pull((d_query, d_shift))[0]


def _xla(inputs: RouteInputs, *arrays):
    return _by(buffer.backward, inputs, *arrays)


def _mosaic_tpu(inputs: RouteInputs, *arrays):
    return _by(backward_mosaic_tpu(inputs), inputs, *arrays)


def _mosaic_gpu(inputs: RouteInputs, *arrays):
    """Serves what the kernel forward serves. XLA adds in place; the kernel backward would need one more array
    for what is to be added.
    """
    check_mosaic_gpu(inputs)
    return _xla(inputs, *arrays)


def _reference(inputs: RouteInputs, into, result, d_output):
    del result

    def output(sources, arguments):
        return depth_route_reference(_with(inputs._replace(sources=sources), arguments)).output

    d_sources, d_arguments = jax.vjp(output, inputs.sources, _arguments(inputs))[1](d_output)
    return into + d_sources, d_arguments


_IMPLEMENTATIONS = {"mosaic_gpu": _mosaic_gpu, "mosaic_tpu": _mosaic_tpu, "xla": _xla, "reference": _reference}


def add_route_gradients(
    into: Float[Array, "L B T D"],
    d_output: Float[Array, "B T D"],
    result: DepthRoute,
    sources: Float[Array, "L B T D"],
    query: Float[Array, " D"] | Float[Array, "B T D"],
    *,
    implementation: str | None = None,
    **options: Any,
) -> RouteGradients:
    """What `jax.vjp(depth_route)` gives for a cotangent of its output alone, with the sources' gradients added to an
    array in place.

    Args:
      into: the gradients of the sources so far; in what dtype it is, they are summed.
      d_output: the cotangent.
      result: what depth_route returned for this call.
      sources, query, options: those of the call; sources must be one array.
      implementation: a backend of depth_route; None takes the fastest that can serve.

    Returns:
      RouteGradients. The null logit is taken as a constant.

    Raises:
      ValueError: as depth_route; sources that are not one array, or `into` of another shape.
    """
    inputs = route_inputs(sources, query, **options)
    if isinstance(inputs.sources, tuple) or into.shape != inputs.sources.shape:
        got = "a sequence" if isinstance(inputs.sources, tuple) else f"{inputs.sources.shape}"
        raise ValueError(f"sources: must be one array of the shape of into, {into.shape}, got {got}")
    serve = dispatch("add_route_gradients", _IMPLEMENTATIONS, implementation)
    with target_mesh(inputs.sharding.mesh) if inputs.sharding else contextlib.nullcontext():
        into, gradients = serve(inputs, into, result, d_output)
    return RouteGradients(into, *(gradients.get(name) for name in RouteGradients._fields[1:]))
