"""Two layouts of a decoder's parameters: layer by layer, as modules have them, and stacked, as training has them.

Layer by layer, params["layers"][i] and params["routers"][i] hold arrays [...]; stacked, params["layers"] and
params["routers"] hold arrays [L, ...] of all layers or routers. A training state is always stacked: what is traced,
compiled and saved has as many arrays for 64 layers as for one. Everything outside the stack (embedding, final_norm,
head) is the same in both.
"""

import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

STACKS = ("layers", "routers")  # what a decoder has several alike of


def is_stacked(params: Mapping[str, Any]) -> bool:
    """Whether parameters are stacked; those of a decoder's modules have whole numbers as keys."""
    return not any(isinstance(name, int) for name in params["layers"])


def part(together: Mapping, index: int) -> Mapping[str, Any]:
    """The parameters of one layer or router, from either layout."""
    if index in together:
        return together[index]
    return jax.tree.map(operator.itemgetter(index), dict(together))


def router_part(params: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """The parameters of one router, {} where routers have none."""
    return part(params["routers"], index) if params.get("routers") else {}


def stack_layers(params: Mapping[str, Any]) -> dict:
    """Layer by layer -> stacked: {"layers": {0: {name: [...]}, ...}} -> {"layers": {name: [L, ...]}}."""

    def stack(one: dict) -> dict:
        return jax.tree.map(lambda *x: jnp.stack(x), *(one[i] for i in range(len(one))))

    return {name: stack(group) if name in STACKS else group for name, group in params.items()}


def unstack_layers(params: Mapping[str, Any]) -> dict:
    """Stacked -> layer by layer; the inverse of `stack_layers`."""

    def unstack(together: dict) -> dict:
        count = jax.tree.leaves(together)[0].shape[0]
        return {i: part(together, i) for i in range(count)}

    return {name: unstack(group) if name in STACKS else group for name, group in params.items()}
