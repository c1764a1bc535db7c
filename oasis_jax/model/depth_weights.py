"""How scores over depth become weights: with the operator of `pallas_kernels`, or in plain JAX where it has none.

    softmax, softmax1   the operator, without and with a null
    uniform             the operator without a null, for a query of zeros: 1 / L
    sigmoid             plain JAX, whatever the platform: alpha_i = sigmoid(g_i - log L), each source on its own

The offset of sigmoid is that of sigmoid attention (arXiv 2409.04431): scores of 0 give 1 / (L + 1), as Softmax1 gives
them, so that a stack neither grows nor fades at its start. Its null mass is max(0, 1 - sum of weights).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from oasis_jax.model.norms import rms_norm
from pallas_kernels import DepthRoute, RouteGradients, add_route_gradients, depth_route
from pallas_kernels.depth_route import RouteInputs, depth_scores, route_inputs

NULL_LOGITS = {"softmax": -jnp.inf, "softmax1": 0.0, "uniform": -jnp.inf}  # of the operator
PLAIN = ("sigmoid",)  # of no operator


class DepthOperator(NamedTuple):
    """A route over depth and its derivative by hand, with the arguments and results of `pallas_kernels.depth_route` and
    `pallas_kernels.add_route_gradients`.
    """

    route: Callable[..., DepthRoute]
    add_gradients: Callable[..., RouteGradients]


def _sigmoid(inputs: RouteInputs) -> DepthRoute:
    scores, sources, live = depth_scores(inputs)
    count = jnp.broadcast_to(live, (len(sources), 1, 1)).sum().astype(inputs.wide)
    weights = jnp.where(live, jax.nn.sigmoid(scores - jnp.log(count)), 0.0)
    output = jnp.einsum("LBT,LBTD->BTD", weights, sources, precision=jax.lax.Precision.HIGHEST)
    null_mass = jax.nn.relu(1.0 - weights.sum(0))
    return DepthRoute(output.astype(inputs.dtype), jnp.moveaxis(weights, 0, -1), null_mass)


def sigmoid_route(sources, query, **options) -> DepthRoute:
    """`depth_route` with weights sigmoid(g_i - log L); options: those of depth_route but null_logit, implementation."""
    return _sigmoid(route_inputs(sources, query, **options))


def differentiated(route: Callable[..., DepthRoute]) -> DepthOperator:
    """A route with JAX's own derivative in place of `add_route_gradients`: one more array as large as all sources."""

    def add_gradients(into, d_output, result, sources, query, **options) -> RouteGradients:
        del result
        given = {name: options[name] for name in RouteGradients._fields[2:] if name in options}
        rest = {name: value for name, value in options.items() if name not in given}

        def output(sources, query, given):
            return route(sources, query, **given, **rest).output

        d_sources, d_query, d_given = jax.vjp(output, sources, query, given)[1](d_output)
        found = {name: d_given.get(name) for name in RouteGradients._fields[2:]}
        return RouteGradients(into + d_sources, d_query, **found)

    return DepthOperator(route, add_gradients)


def over_normalized(operator: DepthOperator) -> DepthOperator:
    """The operator of sources that are RMS-normalized, without a gain, before they are scored and summed."""

    def route(sources, query, **options) -> DepthRoute:
        return operator.route(rms_norm(sources, jnp.ones(sources.shape[-1:], jnp.float32)), query, **options)

    return differentiated(route)


_KERNELS = DepthOperator(depth_route, add_route_gradients)
_OPERATORS = {"sigmoid": differentiated(sigmoid_route)}


def depth_operator(normalizer: str) -> DepthOperator:
    """The operator of a depth normalizer."""
    return _OPERATORS.get(normalizer, _KERNELS)
