"""Attention and depth routing that may attend to nothing: two operators, usable without the rest of the project.

    null_attention   softmax attention with a null key of score b and value zero (Softmax1, softmax, learnable sinks)
    depth_route      a token's weighted sum over the sources of a network's depth, with a null and inter-layer null
    evidence

`add_route_gradients` is depth_route's derivative by hand, for loops over depth that keep all sources in one array.

All are differentiable in every floating-point argument, through every result. `implementation=None` chooses the fastest
backend that can serve the call; `implementations(operator)` lists the names there are and `explain(operator, ...)` says
which one a call runs and why the others do not.
"""

from typing import Any

from pallas_kernels.depth_route import IMPLEMENTATIONS as _DEPTH_ROUTE
from pallas_kernels.depth_route import (
    DepthRoute,
    RouteGradients,
    add_route_gradients,
    depth_route,
)
from pallas_kernels.dispatch import Device, Explanation, explain_call
from pallas_kernels.null_attention import IMPLEMENTATIONS as _NULL_ATTENTION
from pallas_kernels.null_attention import NullAttention, merge_partials, null_attention
from pallas_kernels.sharding import OperatorSharding, unzigzag, zigzag

__all__ = [
    "DepthRoute",
    "Device",
    "Explanation",
    "NullAttention",
    "OperatorSharding",
    "RouteGradients",
    "add_route_gradients",
    "depth_route",
    "explain",
    "implementations",
    "merge_partials",
    "null_attention",
    "unzigzag",
    "zigzag",
]

_OPERATORS = {"null_attention": (null_attention, _NULL_ATTENTION), "depth_route": (depth_route, _DEPTH_ROUTE)}


def _operator(name: str):
    if name not in _OPERATORS:
        raise ValueError(f"operator: no {name!r}; there are: {', '.join(_OPERATORS)}")
    return _OPERATORS[name]


def implementations(operator: str) -> tuple[str, ...]:
    """The backends of "null_attention" or "depth_route", fastest first.

    Raises:
      ValueError: `operator` is neither.
    """
    return tuple(_operator(operator)[1])


def explain(operator: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend a call of an operator runs, and why the others do not; nothing is computed.

        print(pallas_kernels.explain("null_attention", query, key, value, window=512))

    Args:
      operator: "null_attention" or "depth_route".
      args, kwargs: those of the call, without `implementation`; arrays may be of type `jax.ShapeDtypeStruct`.

    Returns:
      An Explanation; printed, one line a backend.

    Raises:
      ValueError: no such operator, or arguments that do not fit.
    """
    function, table = _operator(operator)
    return explain_call(function, table, args, kwargs)
