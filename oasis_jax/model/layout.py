"""Two layouts of a decoder's parameters: layer by layer, as modules have them, and stacked, as training has them.

Layer by layer, params["layers"][i] and params["routers"][i] hold arrays [...]; stacked, params["layers"] and
params["routers"] hold arrays [L, ...] of all layers or routers. A training state is always stacked: what is traced,
compiled and saved has as many arrays for 64 layers as for one. Everything outside the stack (ends, final_norm) is the
same in both.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from oasis_jax.config import ModelConfig
from oasis_jax.model.decoder import Layer, check_model, ends_parameters, parameter_axes
from oasis_jax.model.norms import Norm
from oasis_jax.model.parameters import ParameterModule
from oasis_jax.model.router import Router
from oasis_jax.model.wiring import router_names

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


def initial_params(config: ModelConfig, key: Array) -> dict:
    """The stacked parameters of `Decoder(config, rngs=nnx.Rngs(params=key))`, bit for bit when compiled.

    All layers are drawn at once: the program does not grow with depth, and a second copy never exists.

    Raises:
      UserError: a config that cannot be built.
    """
    check_model(config)
    rngs = nnx.Rngs(params=key)
    parts = {
        "ends": _pure(ParameterModule(ends_parameters(config), rngs=rngs)),
        "layers": _draw(Layer, config.num_layers, config, rngs),
    }
    if router_names(config):
        parts["routers"] = _draw(Router, len(router_names(config)), config, rngs)
    parts["final_norm"] = _pure(Norm(config, config.width, rngs=rngs))
    return {name: part for name, part in parts.items() if part}


def _pure(module: nnx.Module) -> dict:
    return nnx.to_pure_dict(nnx.state(module))


def _draw(make: Callable[..., nnx.Module], count: int, config: ModelConfig, rngs: nnx.Rngs) -> dict:
    """The stacked parameters of modules that were made one after the other, each with the next keys of `rngs`."""
    stream = rngs.params
    first = stream.count[...]
    make(config, rngs=rngs)  # says how many keys one takes
    keys = stream.count[...] - first

    def one(index):
        own = nnx.Rngs(params=stream.key[...])
        own.params.count[...] = first + index * keys
        return _pure(make(config, rngs=own))

    stream.count[...] = first + count * keys
    return jax.vmap(one)(jnp.arange(count, dtype=first.dtype))


def stacked_axes(config: ModelConfig) -> dict:
    """The logical axes of every stacked parameter; that of the layers is never split."""
    axes = parameter_axes(dataclasses.replace(config, num_layers=1, blocks=0))  # layers are alike

    def stack(one: dict) -> dict:
        return jax.tree.map(lambda names: (None, *names), one[0], is_leaf=lambda x: isinstance(x, tuple))

    return {name: stack(part) if name in STACKS else part for name, part in axes.items()}
