"""What training minimizes: cross entropy over tokens, squared error over vectors."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig


def token_losses(outputs: Float[Array, "B T O"], batch: Mapping[str, Array], config: ModelConfig) -> Float[Array, "B T"]:
    """The loss of every position, in float32 or better, unweighted.

    Args:
      outputs: logits over the padded vocabulary (the padding is never a target, training lowers it), or vectors.
      batch: "targets": token ids [B, T], or vectors [B, T, O].
      config: says by `inputs` which of the two it is.

    Returns:
      Cross entropy in nats; for vectors the squared error, mean over components.
    """
    outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    targets = batch["targets"]
    if config.inputs == "vectors":
        return jnp.square(outputs - targets).mean(axis=-1)
    # A sum over a mask instead of a gather: it stays split where the vocabulary is split over devices.
    is_target = jnp.arange(outputs.shape[-1]) == targets[..., None]
    return jax.nn.logsumexp(outputs, axis=-1) - jnp.where(is_target, outputs, 0.0).sum(axis=-1)


def total_weight(batch: Mapping[str, Array]) -> Float[Array, ""]:
    """What a batch's weights sum to; 1 where they are all 0, so that such a batch has loss 0."""
    total = batch["weights"].astype(jnp.float32).sum()
    return jnp.where(total > 0, total, 1.0)


def mean_loss(
    outputs: Float[Array, "B T O"], batch: Mapping[str, Array], config: ModelConfig, total: Float[Array, ""] | None = None
) -> Float[Array, ""]:
    """The mean of `token_losses` under batch["weights"] [B, T].

    Args:
      total: what to divide the weighted sum by, where it is not this batch's own weight: micro-batches divided by the
        weight of the whole batch sum to the loss of the whole batch.
    """
    return (token_losses(outputs, batch, config) * batch["weights"]).sum() / (total_weight(batch) if total is None else total)
