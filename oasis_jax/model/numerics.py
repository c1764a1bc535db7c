"""How a model's matrix products are computed and what else of a forward pass is rounded, as one explicit argument.

Every module takes `numerics`; `FLOAT`, the default, is plain arithmetic. Quantized inference and the calibration it
needs (`oasis_jax.evaluation.quantization.inference`) are subclasses, so that the model itself knows nothing of either.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import DepthRoute


class Numerics:
    """Float arithmetic. A subclass overrides what it changes; names are relative to the scopes of `within`."""

    # Whether the scores and probabilities of attention have to exist as arrays, for `tap` to see them.
    materializes_attention: bool = False
    # Whether it can be shown layers in a loop, by the last four methods.
    loops: bool = False

    def within(self, scope: str) -> "Numerics":
        """The numerics of a part of the model, whose names start with `scope`."""
        del scope
        return self

    def einsum(self, name: str, equation: str, x: Array, weight: Array, **options: Any) -> Array:
        """A linear layer: `jnp.einsum` of an activation and a parameter."""
        del name
        return jnp.einsum(equation, x, weight, **options)

    def lookup(self, name: str, table: Float[Array, "V D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of a parameter."""
        del name
        return table[ids]

    def tap(self, name: str, x: Array) -> Array:
        """An activation that is not the input of a linear layer: scores, probabilities, context, residual sums,
        mixtures.
        """
        del name
        return x

    def route(
        self,
        run: Callable[[Sequence[Array], Sequence[Array]], DepthRoute],
        sources: Sequence[Float[Array, "B T D"]],
        evidence: Sequence[Float[Array, "B T"]],
    ) -> DepthRoute:
        """A depth router, `run(sources, evidence)`; an intervention changes what goes in or comes out."""
        return run(sources, evidence)

    def norm(self, run: Callable[[Array], Array], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """A norm of the stream, `run(x)`; an intervention changes what comes out."""
        return run(x)

    def layer_arrays(self, scopes: Sequence[str]) -> Any:
        """What it needs to know of the layers with these scopes: a pytree of arrays [L, ...], one entry a layer."""
        del scopes
        return ()

    def in_layer(self, arrays: Any) -> "Numerics":
        """The numerics of one layer, from its entry of `layer_arrays`; names are relative to the layer."""
        del arrays
        return self

    @property
    def seen(self) -> Any:
        """What was recorded in one layer: a pytree of arrays."""
        return ()

    def keep(self, scopes: Sequence[str], seen: Any) -> None:
        """Takes over what `in_layer(...).seen` was in every layer: a pytree of arrays [L, ...]."""
        del scopes, seen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputsFirst:
    """A linear layer's weight with the axes of its outputs before those of its inputs, for `FLOAT` alone.

    XLA's CPU library reads the left operand of a product where it lies and copies the right one into tiles. With few
    rows the copy takes longer than the product; so the weight is the left operand here, which has to lie this way.
    """

    array: Float[Array, "..."]  # [*outputs, *inputs]

    @classmethod
    def of(cls, weight: Float[Array, "..."], inputs: int) -> "OutputsFirst":
        """A weight [*inputs, *outputs] with so many axes of inputs."""
        return cls(jnp.moveaxis(weight, range(inputs), range(-inputs, 0)))

    def astype(self, dtype: DTypeLike) -> "OutputsFirst":
        return OutputsFirst(self.array.astype(dtype))

    def einsum(self, equation: str, x: Array, **options: Any) -> Array:
        """jnp.einsum(equation, x, weight)."""
        terms, result = equation.split("->")
        rows, axes = terms.split(",")
        outputs = "".join(axis for axis in axes if axis in result)
        inputs = "".join(axis for axis in axes if axis not in result)
        found = outputs + "".join(axis for axis in result if axis not in axes)
        product = jnp.einsum(f"{outputs}{inputs},{rows}->{found}", self.array, x, **options)
        product = jax.lax.optimization_barrier(product)  # or XLA would exchange the operands
        return product.transpose([found.index(axis) for axis in result])


class Float(Numerics):
    """Plain arithmetic."""

    loops = True

    def einsum(self, name: str, equation: str, x: Array, weight: Array | OutputsFirst, **options: Any) -> Array:
        if isinstance(weight, OutputsFirst):
            return weight.einsum(equation, x, **options)
        return super().einsum(name, equation, x, weight, **options)


FLOAT = Float()
jax.tree_util.register_pytree_node(Float, lambda _: ((), None), lambda *_: FLOAT)
