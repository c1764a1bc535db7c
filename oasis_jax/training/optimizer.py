"""AdamW, Muon or SGD with warm-up, decay and clipping, by the roles of parameters."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from oasis_jax.config import Config, ModelConfig, OptimizerConfig
from oasis_jax.model.affine import MOMENTUM
from oasis_jax.model.decoder import map_specs, parameter_roles
from oasis_jax.model.parameters import ROLES, ParameterSpec

MUON_ROLES = ("matrix", "router_matrix")  # what Muon updates; AdamW the rest, embeddings and the head among it
MUON_RMS = 0.2  # of Muon's updates, about that of AdamW's, so that one learning rate serves both (arXiv 2502.16982)


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


def null_weights(config: Config, step: Int[Array, ""] | int) -> dict[str, Float[Array, ""]]:
    """What the null has in the update after `step` others in place of what the model says, by field of it.

    The factor of its exponential grows in a straight line from 0, where Softmax1 is softmax, over
    optimizer.null_ramp_steps; that of its values falls to 0 over optimizer.null_value_fade_steps.
    """
    found, model, options = {}, config.model, config.optimizer
    done = lambda steps: jnp.minimum(step / steps, 1.0).astype(jnp.float32)
    if options.null_ramp_steps:
        found["null_weight"] = model.null_weight * done(options.null_ramp_steps)
    if options.null_value_fade_steps:
        found["null_value_weight"] = model.null_value_weight * (1.0 - done(options.null_value_fade_steps))
    return found


def at_step(config: Config, step: int) -> Config:
    """The config whose model is the one that a run has after so many updates."""
    found = {name: float(weight) for name, weight in null_weights(config, step).items()}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **found)) if found else config


def decayed(model: ModelConfig) -> dict:
    """Which stacked parameters weight decay pulls to zero, by role."""
    return jax.tree.map(lambda role: ROLES[role].decays, parameter_roles(model))


def make_optimizer(config: OptimizerConfig, steps: int, model: ModelConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer that the config names, for a run of so many steps.

    adamw: Loshchilov and Hutter, arXiv 1711.05101. muon: matrices by Muon (arXiv 2502.16982), the rest by AdamW. sgd:
    with momentum beta1. All decay weights apart from the gradient. Groups of roles may have a learning rate of their
    own: router_multiplier times the others' for depth routers.
    Running averages move as such; see `oasis_jax.model.affine`.
    """
    rule = optax.chain(
        _DIRECTIONS[config.optimizer](config, model),
        optax.add_decayed_weights(config.weight_decay, decayed(model)),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    rule = optax.chain(*parts, rule, *_scaled_groups(config, model))
    if all(jax.tree.leaves(_trained(model))):
        return rule
    # micro-batches add up what they say of a running average, where they should give its mean
    average = optax.scale(-(1 - MOMENTUM) / config.accumulation_steps)
    return optax.partition({True: rule, False: average}, _trained(model))


def _trained(model: ModelConfig) -> dict:
    """Which stacked parameters follow a gradient; the others are running averages."""
    return jax.tree.map(lambda role: ROLES[role].group != "running", parameter_roles(model))


def gradient_norm(gradients: dict, model: ModelConfig) -> Float[Array, ""]:
    """Over all parameters that are trained."""
    return optax.tree.norm(jax.tree.map(lambda x, trained: x if trained else None, gradients, _trained(model)))


def _adam(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformation:
    del model
    return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)


def _sgd(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformation:
    del model
    return optax.trace(decay=config.beta1)


def _muon(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformation:
    """Muon sees a projection as one matrix of all its inputs and all its outputs, heads joined, layer by layer."""

    def of_matrices(function):
        masked = lambda spec, stacked: function(spec, stacked) if spec.role in MUON_ROLES else optax.MaskedNode()
        return map_specs(masked, model)

    def axes(spec: ParameterSpec, stacked: bool) -> optax.contrib.MuonDimensionNumbers:
        inputs = next(i for i in range(1, len(spec.shape)) if math.prod(spec.shape[:i]) == spec.fan_in)
        every = tuple(range(stacked, stacked + len(spec.shape)))
        return optax.contrib.MuonDimensionNumbers(every[:inputs], every[inputs:])

    def scale(spec: ParameterSpec, stacked: bool) -> float:
        del stacked
        return MUON_RMS * math.sqrt(max(spec.fan_in, math.prod(spec.shape) // spec.fan_in))

    numbers, scales = of_matrices(axes), of_matrices(scale)
    scaled = optax.stateless(lambda updates, _: jax.tree.map(lambda update, factor: factor * update, updates, scales))
    muon = optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=lambda _: numbers), scaled)
    labels = jax.tree.map(lambda role: "muon" if role in MUON_ROLES else "adam", parameter_roles(model))
    return optax.partition({"muon": muon, "adam": _adam(config, model)}, labels)


_DIRECTIONS = {"adamw": _adam, "muon": _muon, "sgd": _sgd}


def _scaled_groups(config: OptimizerConfig, model: ModelConfig) -> list[optax.GradientTransformation]:
    """Multiplies the updates of a group, decay included, where its learning rate is not the others'."""
    multiples = {"router": config.router_multiplier}
    roles = parameter_roles(model)
    return [
        optax.masked(optax.scale(multiple), jax.tree.map(lambda role, group=group: ROLES[role].group == group, roles))
        for group, multiple in multiples.items()
        if multiple != 1.0
    ]
