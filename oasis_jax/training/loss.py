"""What training minimizes: cross entropy over tokens, squared error over vectors."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.model.context import Context
from oasis_jax.model.head import map_logits, token_losses


def total_weight(batch: Mapping[str, Array]) -> Float[Array, ""]:
    """What a batch's weights sum to; 1 where they are all 0, so that such a batch has loss 0."""
    total = batch["weights"].astype(jnp.float32).sum()
    return jnp.where(total > 0, total, 1.0)


def mean_loss(
    params: Mapping[str, Any],
    config: ModelConfig,
    final: Float[Array, "B T D"],
    batch: Mapping[str, Array],
    context: Context,
    total: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """The mean of `token_losses` under batch["weights"] [B, T], from pieces of the logits.

    Args:
      params: of the model.
      config: of the model.
      final: what the head reads.
      batch: "targets" and "weights".
      context: see Context.
      total: what to divide the weighted sum by, where it is not this batch's own weight: micro-batches divided by the
        weight of the whole batch sum to the loss of the whole batch.
    """
    total = total_weight(batch) if total is None else total
    arrays = {name: batch[name] for name in ("targets", "weights")}
    of_piece = lambda outputs, piece: token_losses(outputs, piece["targets"]) * piece["weights"]
    return map_logits(params, config, final, arrays, of_piece, context).sum() / total
