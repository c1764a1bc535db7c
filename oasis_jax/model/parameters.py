"""How a layer says which parameters it has, once, for NNX and Linen alike."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

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
}


class ParameterSpec(NamedTuple):
    """One parameter: its shape, the logical axis of each dimension (None: never split), its initializer and
    its role.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable
    role: str


def matrix(shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int, role: str = "matrix") -> ParameterSpec:
    """A projection drawn from a normal distribution with standard deviation fan_in ** -0.5."""
    return ParameterSpec(shape, axes, jax.nn.initializers.normal(fan_in**-0.5), role)


def constant(
    shape: tuple[int, ...], value: float, role: str, axes: tuple[str | None, ...] | None = None
) -> ParameterSpec:
    """A small parameter that starts at one value; never split where no axes are given."""
    return ParameterSpec(shape, axes or (None,) * len(shape), jax.nn.initializers.constant(value), role)


class ParameterModule(nnx.Module):
    """An NNX module whose `nnx.Param`s follow a table of `ParameterSpec`s.

    Every `nnx.Param` carries its logical axes and its role as the metadata `axes` and `role`.
    """

    def __init__(self, specs: Mapping[str, ParameterSpec], *, rngs: nnx.Rngs):
        self.names = tuple(specs)
        for name, spec in specs.items():
            value = spec.init(rngs.params(), spec.shape, jnp.float32)
            setattr(self, name, nnx.Param(value, axes=spec.axes, role=spec.role))

    @property
    def parameters(self) -> dict[str, Float[Array, "..."]]:
        """The parameter arrays by name."""
        return {name: getattr(self, name)[...] for name in self.names}
