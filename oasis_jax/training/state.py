"""What a training run carries from step to step, and how it is made where it will lie."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from oasis_jax.config import Config, ModelConfig
from oasis_jax.model.decoder import Decoder, initial_params, parameter_axes, parameter_shapes, with_parameters
from oasis_jax.model.layout import unstack_layers
from oasis_jax.placement import Placement
from oasis_jax.training.optimizer import make_optimizer


class TrainState(NamedTuple):
    """Everything that training changes, and the key that whatever is random in step k folds k into."""

    step: Int[Array, ""]  # updates made
    params: dict  # stacked, see oasis_jax.model.layout; float32
    opt_state: optax.OptState
    rng: Array  # a jax.random.key


def build_model(config: ModelConfig, params: dict) -> Decoder:
    """The decoder with the parameters of a training state, of which it makes its own copy."""
    return with_parameters(config, _unstack(params))


_unstack = jax.jit(unstack_layers)  # one program, where slice after slice would be a thousand


def _initial(config: Config, seed: Int[Array, ""]) -> TrainState:
    """The seed is an argument, so that runs that differ in it alone are one program."""
    parameter_key, rng = jax.random.split(jax.random.key(seed))
    params = initial_params(config.model, parameter_key)
    opt_state = make_optimizer(config.optimizer, config.run.steps, config.model).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, rng)


def parameter_shardings(config: ModelConfig, placement: Placement) -> dict:
    """The sharding of every stacked parameter.

    Raises:
      UserError: a dimension that its mesh axes do not divide.
    """

    def sharding(path, shape, axes):
        name = ".".join(str(key.key) for key in path)
        return placement.checked_sharding(name, shape.shape, axes)

    return jax.tree_util.tree_map_with_path(sharding, parameter_shapes(config), parameter_axes(config))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state; an optimizer's moments lie where their parameters do.

    Raises:
      UserError: the model cannot be built, or not be split over this mesh.
    """
    placement = Placement(mesh, config.mesh.rules)
    shardings, everywhere = parameter_shardings(config.model, placement), placement.sharding()
    state = jax.eval_shape(partial(_initial, config), 0)
    optimizer = make_optimizer(config.optimizer, config.run.steps, config.model)
    # An optimizer of some parameters has MaskedNodes in place of the others.
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    moments = optax.tree_map_params(
        optimizer,
        lambda moment, sharding: moment if is_masked(moment) else sharding,
        state.opt_state,
        shardings,
        transform_non_params=lambda _: everywhere,
        is_leaf=is_masked,
    )
    return jax.tree.map(placed, state, TrainState(everywhere, shardings, moments, everywhere))


def placed(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """The abstract array with a sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def shardings_of(state: Any) -> Any:
    """The shardings of a tree of arrays or abstract arrays."""
    return jax.tree.map(lambda x: x.sharding, state)


def new_state(
    config: Config, mesh: Mesh, compiled: Callable[[Callable], Callable] = lambda lower: lower().compile()
) -> TrainState:
    """The state before the first step, made in its shards: no device ever holds the whole.

    Args:
      config: the run.
      mesh: as `make_mesh` builds it.
      compiled: makes a program of a function that traces and lowers it.
    """
    make = jax.jit(partial(_initial, config), out_shardings=shardings_of(abstract_state(config, mesh)))
    seed = np.int32(config.run.seed)
    return compiled(partial(make.lower, seed))(seed)
