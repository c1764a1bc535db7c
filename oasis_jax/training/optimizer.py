"""AdamW with warm-up, decay and clipping."""

import jax
import jax.numpy as jnp
import optax

from oasis_jax.config import OptimizerConfig
from oasis_jax.model.layout import STACKS


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


def decayed(params: dict) -> dict:
    """Which parameters weight decay pulls to zero: matrices, not norms, biases, scalars, sinks and static router
    queries.

    Args:
      params: stacked, see `oasis_jax.model.layout`; a layer's own rank decides.
    """

    def is_matrix(path, x):
        return x.ndim - (path[0].key in STACKS) >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov and Hutter, arXiv 1711.05101), for a run of so many steps."""
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
