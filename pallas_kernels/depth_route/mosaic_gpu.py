"""Depth routing on Hopper GPUs: when our Mosaic GPU kernels (mosaic_gpu_kernels.py) can serve a call."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.depth_route.base import DepthRoute, RouteInputs
from pallas_kernels.dispatch import Unavailable, check_axes, interpreting, target_device
from pallas_kernels.sharding import unmapped_axes

_OLDEST_JAX = (0, 11, 2)
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
_DTYPES = ("bfloat16", "float16", "float32")
WARPS, LANES = 4, 32
_ELEMENTS_PER_THREAD = 64


def depth_route_mosaic_gpu(inputs: RouteInputs) -> DepthRoute:
    """The contract of `depth_route`, by Pallas kernels that read every live source once and no dead one."""
    check_mosaic_gpu(inputs)
    return _serve()(inputs)


def check_mosaic_gpu(inputs: RouteInputs) -> None:
    """Raises Unavailable, with the reason, where the kernels cannot serve a call."""
    if jax.__version_info__ < _OLDEST_JAX:
        raise Unavailable(f"needs jax {'.'.join(map(str, _OLDEST_JAX))} or newer, this is {jax.__version__}")
    device = target_device()
    if not interpreting():
        if device.platform != "gpu":
            raise Unavailable(f"runs on GPUs only, the call is compiled for {device.platform}")
        if not any(name in device.kind.replace("-", " ").split() for name in _HOPPER):
            raise Unavailable(
                f"runs on Hopper GPUs only ({', '.join(_HOPPER)}), the call is compiled for {device.kind}, "
                "which xla serves"
            )
    check_axes(inputs.sources, inputs.query)
    axes = unmapped_axes(inputs.sharding, inputs.sources, inputs.query)
    if axes:
        raise Unavailable(
            f"XLA cannot partition it over the mesh axes {', '.join(axes)}; call it inside jax.shard_map over them"
        )
    if jnp.dtype(inputs.dtype).name not in _DTYPES:
        raise Unavailable(f"takes sources of {', '.join(_DTYPES)}, got {inputs.dtype}")
    width = inputs.sources[0].shape[-1]
    if not tile_rows(width):
        allowed = ", ".join(f"of {step} up to {limit}" for _, step, _, limit in _SHARES[1:])
        raise Unavailable(f"takes widths that are multiples {allowed}, got {width}")


# (tokens that share a program, what their width must be a multiple of, how many columns their warps take at once, the
# largest width). A copy moves a multiple of 128 bytes, so that one row of half-precision numbers is one of 64 columns.
_SHARES = [
    (rows, step, WARPS // rows * LANES, WARPS // rows * LANES * _ELEMENTS_PER_THREAD)
    for rows, step in ((4, 32), (2, 32), (1, 64))
]


def tile_rows(width: int) -> list[int]:
    """How many tokens a program may own at this width, the best first: a warp each, or two or four of them, whose
    threads share a row evenly; where none does, as many as fit. None at a width that the kernels do not take.
    """
    fit = [(rows, width % unit == 0) for rows, step, unit, limit in _SHARES if width % step == 0 and width <= limit]
    return [rows for rows, even in fit if even] or [rows for rows, _ in fit[:1]]


@functools.cache
def _serve():
    """Imported here, as Pallas takes a while to import and its Mosaic GPU part differs between versions of jax."""
    from pallas_kernels.depth_route.mosaic_gpu_kernels import backward, forward
    from pallas_kernels.depth_route.vjp import differentiable

    return differentiable(forward, backward, kernels="mosaic_gpu")
