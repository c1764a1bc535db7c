"""Depth routing with a null and inter-layer null evidence: `depth_route`, its reference and backends."""

from pallas_kernels.depth_route.api import IMPLEMENTATIONS, depth_route, route_inputs
from pallas_kernels.depth_route.base import DepthRoute, RouteInputs
from pallas_kernels.depth_route.gradients import RouteGradients, add_route_gradients
from pallas_kernels.depth_route.reference import depth_scores

__all__ = [
    "IMPLEMENTATIONS",
    "DepthRoute",
    "RouteGradients",
    "RouteInputs",
    "add_route_gradients",
    "depth_route",
    "depth_scores",
    "route_inputs",
]
