"""What the numerics of evaluation have in common: they know the full names of what they see."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from oasis_jax.model.numerics import Numerics


class Named(Numerics):
    """Numerics with `scope`, the start of the full name of everything that they are shown: "layer0.attention."."""

    def __init__(self) -> None:
        self.scope: str = ""

    def within(self, scope: str) -> "Named":
        part = copy.copy(self)
        part.scope = f"{self.scope}{scope}."
        return part


def stack_layers(values: Mapping[str, Any], scopes: Sequence[str]) -> dict[str, Any]:
    """Full name -> value as name within a layer -> the values [L, ...] of these layers."""
    names = [name.removeprefix(f"{scopes[0]}.") for name in values if name.startswith(f"{scopes[0]}.")]
    of_layers = {name: [values[f"{scope}.{name}"] for scope in scopes] for name in names}
    return {name: jax.tree.map(lambda *x: jnp.stack(x), *found) for name, found in of_layers.items()}


def unstack_layers(values: Mapping[str, Any], scopes: Sequence[str]) -> dict[str, Any]:
    """The inverse of `stack_layers`."""
    return {
        f"{scope}.{name}": jax.tree.map(lambda x, i=i: x[i], value)
        for i, scope in enumerate(scopes)
        for name, value in values.items()
    }
