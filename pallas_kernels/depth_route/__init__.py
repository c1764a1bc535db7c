"""Depth routing with a null and inter-layer null evidence: `depth_route`, its reference and backends."""

from pallas_kernels.depth_route.api import IMPLEMENTATIONS, depth_route
from pallas_kernels.depth_route.base import DepthRoute

__all__ = ["IMPLEMENTATIONS", "DepthRoute", "depth_route"]
