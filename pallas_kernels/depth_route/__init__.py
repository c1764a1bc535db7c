"""Depth routing with a null and inter-layer null evidence: `depth_route`, its reference and backends."""

from pallas_kernels.depth_route.api import IMPLEMENTATIONS, depth_route
from pallas_kernels.depth_route.base import DepthRoute
from pallas_kernels.depth_route.gradients import RouteGradients, add_route_gradients

__all__ = ["IMPLEMENTATIONS", "DepthRoute", "RouteGradients", "add_route_gradients", "depth_route"]
