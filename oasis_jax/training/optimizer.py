"""AdamW with warm-up, decay and clipping, by the roles of parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from oasis_jax.config import Config, ModelConfig, OptimizerConfig
from oasis_jax.model.decoder import parameter_roles
from oasis_jax.model.parameters import ROLES


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by the number of updates made before, as optax counts them.

    Counted from 1, update k of the warm-up has k / warmup_steps of the peak: none is wasted at 0, the peak is reached
    with the last one of the warm-up, and the last update of the run has exactly final_fraction of it.
    """
    peak, decay_steps = config.learning_rate, max(steps - config.warmup_steps, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_fraction),
        "linear": optax.linear_schedule(peak, peak * config.final_fraction, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if not config.warmup_steps:
        return lambda count: jnp.asarray(decay(count + 1), jnp.float32)
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    schedule = optax.join_schedules([warmup, decay], [config.warmup_steps])
    return lambda count: jnp.asarray(schedule(count + 1), jnp.float32)


def null_weight(config: Config, step: Int[Array, ""] | int) -> Float[Array, ""] | None:
    """What the null's exponential is multiplied by in the update after `step` others; None: what the model says.

    It grows in a straight line from 0, where Softmax1 is softmax, over optimizer.null_ramp_steps.
    """
    steps = config.optimizer.null_ramp_steps
    return config.model.null_weight * jnp.minimum(step / steps, 1.0).astype(jnp.float32) if steps else None


def at_step(config: Config, step: int) -> Config:
    """The config whose model is the one that a run has after so many updates."""
    weight = null_weight(config, step)
    if weight is None:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, null_weight=float(weight)))


def decayed(model: ModelConfig) -> dict:
    """Which stacked parameters weight decay pulls to zero, by role."""
    return jax.tree.map(lambda role: ROLES[role].decays, parameter_roles(model))


def make_optimizer(config: OptimizerConfig, steps: int, model: ModelConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov and Hutter, arXiv 1711.05101), for a run of so many steps.

    Groups of roles may have a learning rate of their own: router_multiplier times the others' for depth routers.
    """
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decayed(model),
    )
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(*parts, adamw, *_scaled_groups(config, model))


def _scaled_groups(config: OptimizerConfig, model: ModelConfig) -> list[optax.GradientTransformation]:
    """Multiplies the updates of a group, decay included, where its learning rate is not the others'."""
    multiples = {"router": config.router_multiplier}
    roles = parameter_roles(model)
    return [
        optax.masked(optax.scale(multiple), jax.tree.map(lambda role, group=group: ROLES[role].group == group, roles))
        for group, multiple in multiples.items()
        if multiple != 1.0
    ]
