"""Derivatives for reverse mode only: forward mode is refused by name, in whatever form it comes.

`jax.custom_vjp` alone refuses it in JAX' words, and under `jax.jit` or a transformation only where the program is
compiled, out of the operator's reach.
"""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def reverse_mode_only(operator: str, arrays):
    """The arrays of a pytree as they are. Reverse mode passes their cotangents on; forward mode, which would compute
    with their tangents, is a TypeError, under `jax.jit` where the program is compiled.

    Args:
      operator: its name, for the message.
      arrays: the arguments of a `jax.custom_vjp` function.
    """
    leaves, tree = jax.tree.flatten(arrays)
    places = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    for i, x in zip(places, _guarded(operator, *(leaves[i] for i in places))):
        leaves[i] = x
    return jax.tree.unflatten(tree, leaves)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _guarded(operator: str, *arrays):
    return arrays


@_guarded.defjvp
def _guarded_jvp(operator: str, primals, tangents):
    # primals without a guard of their own: a derivative of this derivative is one of plain JAX operations
    return primals, tuple(_tangents.bind(*tangents, operator=operator))


def _refuse(*_, operator: str):
    raise TypeError(
        f"implementation: {operator} has derivatives for reverse mode (jax.grad, jax.vjp) only; forward mode (jax.jvp, "
        'jax.jacfwd, jax.linearize) needs implementation="reference"'
    )


# The identity of tangents, which has a transpose and nothing else.
_tangents = Primitive("reverse_mode_only")
_tangents.multiple_results = True
_tangents.def_impl(_refuse)
_tangents.def_abstract_eval(lambda *tangents, operator: tangents)
mlir.register_lowering(_tangents, lambda context, *tangents, operator: _refuse(operator=operator))
batching.primitive_batchers[_tangents] = lambda tangents, axes, operator: (
    _tangents.bind(*tangents, operator=operator),
    axes,
)
ad.primitive_transposes[_tangents] = lambda cotangents, *tangents, operator: [
    cotangent if ad.is_undefined_primal(x) else None for cotangent, x in zip(cotangents, tangents)
]


def _jvp(primals, tangents, operator):
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return _tangents.bind(*primals, operator=operator), _tangents.bind(*tangents, operator=operator)


ad.primitive_jvps[_tangents] = _jvp
