"""How a layer says which parameters it has, once, for NNX and Linen alike."""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Parameters = Mapping[str, Array]


class Role(NamedTuple):
    """What follows from what a parameter is.

    decays: weight decay pulls it to zero.
    multiplies: activations are multiplied with it as a matrix: it counts as FLOPs, and quantization rounds it.
    group: of learning rates.
    """

    decays: bool
    multiplies: bool
    group: str = "base"


ROLES = {
    "matrix": Role(decays=True, multiplies=True),
    "embedding": Role(decays=True, multiplies=True),  # as the head, or where vectors come in; tokens look its rows up
    "norm": Role(decays=False, multiplies=False),
    "bias": Role(decays=False, multiplies=False),
    "null": Role(decays=False, multiplies=False),  # what the null option is made of
    "router": Role(decays=False, multiplies=False, group="router"),  # queries over depth, gains, biases, coupling
    "router_matrix": Role(decays=True, multiplies=True, group="router"),
    "running": Role(decays=False, multiplies=False, group="running"),  # a running average; see oasis_jax.model.affine
}


class ParameterSpec(NamedTuple):
    """One parameter: its shape, the logical axis of each dimension (None: never split), its initializer, its role and,
    of a projection, the product of the leading dimensions that its input is summed over.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable
    role: str
    fan_in: int | None = None


def matrix(shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int, role: str = "matrix") -> ParameterSpec:
    """A projection drawn from a normal distribution with standard deviation fan_in ** -0.5."""
    return ParameterSpec(shape, axes, jax.nn.initializers.normal(fan_in**-0.5), role, fan_in)


def constant(
    shape: tuple[int, ...], value: float, role: str, axes: tuple[str | None, ...] | None = None
) -> ParameterSpec:
    """A small parameter that starts at one value; never split where no axes are given."""
    return ParameterSpec(shape, axes or (None,) * len(shape), jax.nn.initializers.constant(value), role)


def with_initializers(
    specs: Mapping[str, ParameterSpec], kernel_init: Callable | None, bias_init: Callable | None
) -> dict[str, ParameterSpec]:
    """The table with other initializers for its projections and its biases, as far as they are given.

    Args:
      specs: parameters by name.
      kernel_init: (key, [inputs, outputs], dtype) -> a projection as one matrix, which Flax' initializers take fans
        from.
      bias_init: (key, shape, dtype) -> a bias.
    """

    def as_matrix(spec: ParameterSpec) -> Callable:
        def init(key, shape, dtype):
            return kernel_init(key, (spec.fan_in, math.prod(shape) // spec.fan_in), dtype).reshape(shape)

        return init

    found = dict(specs)
    for name, spec in specs.items():
        if kernel_init is not None and spec.role == "matrix":
            found[name] = spec._replace(init=as_matrix(spec))
        elif bias_init is not None and spec.role == "bias":
            found[name] = spec._replace(init=bias_init)
    return found


class ParameterModule(nnx.Module):
    """An NNX module whose `nnx.Param`s follow a table of `ParameterSpec`s.

    Every `nnx.Param` carries its logical axes and its role as the metadata `axes` and `role`. A module takes one key of
    `rngs`, whatever it holds, and each parameter's own key comes from its name: methods that differ in one parameter
    start from the same values everywhere else.
    """

    def __init__(self, specs: Mapping[str, ParameterSpec], *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.names: tuple[str, ...] = tuple(specs)
        key = rngs.params()
        for name, spec in specs.items():
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            value = spec.init(own, spec.shape, param_dtype)
            setattr(self, name, nnx.Param(value, axes=spec.axes, role=spec.role))

    @property
    def parameters(self) -> dict[str, Float[Array, "..."]]:
        """The parameter arrays by name."""
        return {name: getattr(self, name)[...] for name in self.names}
