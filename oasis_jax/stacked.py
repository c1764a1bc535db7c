"""Two layouts of a decoder's parameters: layer by layer, as modules have them, and stacked, as training has them.

Layer by layer, params["layers"][i] and params["routers"][i] hold arrays [...]; stacked, params["layers"] and params["routers"] hold
arrays [L, ...] of all layers or routers. A training state is always stacked: what is traced, compiled and saved has as many arrays for 64 layers
as for one. Everything outside the stack (ends, final_norm) is the same in both.
"""

import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

STACKS = ("layers", "routers")  # what a decoder has several alike of


def stack_layers(params: Mapping[str, Any]) -> dict:
    """Layer by layer -> stacked: {"layers": {0: {name: [...]}, ...}} -> {"layers": {name: [L, ...]}}."""

    def stack(one: dict) -> dict:
        return jax.tree.map(lambda *x: jnp.stack(x), *(one[i] for i in range(len(one))))

    return {name: stack(part) if name in STACKS else part for name, part in params.items()}


def unstack_layers(params: Mapping[str, Any]) -> dict:
    """Stacked -> layer by layer; the inverse of `stack_layers`."""

    def unstack(together: dict) -> dict:
        count = jax.tree.leaves(together)[0].shape[0]
        return {i: jax.tree.map(operator.itemgetter(i), together) for i in range(count)}

    return {name: unstack(part) if name in STACKS else part for name, part in params.items()}


def stack_axes(axes: Mapping[str, Any]) -> dict:
    """The logical axes of stacked parameters, from those of `oasis_jax.decoder.parameter_axes`: the axis of layers is never split."""

    def stack(one: dict) -> dict:
        return jax.tree.map(lambda names: (None, *names), one[0], is_leaf=lambda x: isinstance(x, tuple))

    return {name: stack(part) if name in STACKS else part for name, part in axes.items()}
