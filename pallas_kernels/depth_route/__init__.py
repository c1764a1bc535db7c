"""Depth routing with a null and inter-layer null evidence: `depth_route`, its reference and backends."""

from pallas_kernels.depth_route.api import IMPLEMENTATIONS, depth_route
from pallas_kernels.depth_route.base import DepthRoute
from pallas_kernels.depth_route.gradients import RouteGradients, add_route_gradients
from pallas_kernels.depth_route.stack import Consumers, pull, routed_stack, scores_at_birth
from pallas_kernels.depth_route.two_phase import FinishedRoutes, RunningRoute, route_finished, route_running

__all__ = [
    "IMPLEMENTATIONS",
    "Consumers",
    "DepthRoute",
    "FinishedRoutes",
    "RouteGradients",
    "RunningRoute",
    "add_route_gradients",
    "depth_route",
    "pull",
    "route_finished",
    "route_running",
    "routed_stack",
    "scores_at_birth",
]
