"""Attention and depth routing that may attend to nothing: two operators, usable without the rest of the project.

    null_attention   softmax attention with a null key of score b and value zero (Softmax1, softmax, learnable sinks)
    depth_route      a token's weighted sum over the sources of a network's depth, with a null and inter-layer null evidence

Both are differentiable in every floating-point argument, through every result. `implementation=None` chooses the fastest
backend that can serve the call; `implementations(operator)` lists the names there are.
"""

from pallas_kernels.depth_route import IMPLEMENTATIONS as _DEPTH_ROUTE
from pallas_kernels.depth_route import DepthRoute, depth_route
from pallas_kernels.null_attention import IMPLEMENTATIONS as _NULL_ATTENTION
from pallas_kernels.null_attention import NullAttention, merge_partials, null_attention

__all__ = ["DepthRoute", "NullAttention", "depth_route", "implementations", "merge_partials", "null_attention"]


def implementations(operator: str) -> tuple[str, ...]:
    """The backends of "null_attention" or "depth_route", fastest first.

    Raises:
      ValueError: `operator` is neither.
    """
    tables = {"null_attention": _NULL_ATTENTION, "depth_route": _DEPTH_ROUTE}
    if operator not in tables:
        raise ValueError(f"operator: no {operator!r}; there are: {', '.join(tables)}")
    return tuple(tables[operator])
