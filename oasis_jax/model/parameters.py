"""How a layer says which parameters it has, once, for NNX and Linen alike."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Parameters = Mapping[str, Array]


class ParameterSpec(NamedTuple):
    """One parameter: its shape, the logical axis of each dimension (None: never split) and its initializer."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable


def matrix(shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int) -> ParameterSpec:
    """A projection drawn from a normal distribution with standard deviation fan_in ** -0.5."""
    return ParameterSpec(shape, axes, jax.nn.initializers.normal(fan_in**-0.5))


def constant(shape: tuple[int, ...], value: float) -> ParameterSpec:
    """A small, never split parameter that starts at one value."""
    return ParameterSpec(shape, (None,) * len(shape), jax.nn.initializers.constant(value))


class ParameterModule(nnx.Module):
    """An NNX module whose `nnx.Param`s follow a table of `ParameterSpec`s.

    Every `nnx.Param` carries its logical axes as the metadata `axes`.
    """

    def __init__(self, specs: Mapping[str, ParameterSpec], *, rngs: nnx.Rngs):
        self.names = tuple(specs)
        for name, spec in specs.items():
            setattr(self, name, nnx.Param(spec.init(rngs.params(), spec.shape, jnp.float32), axes=spec.axes))

    @property
    def parameters(self) -> dict[str, Float[Array, "..."]]:
        """The parameter arrays by name."""
        return {name: getattr(self, name)[...] for name in self.names}
