"""Token ids as they come in: which targets count, and whether there are any that the model does not have."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError

IGNORED = -100  # a target that counts nothing, as PyTorch's cross entropy has it


def without_ignored(batch: Mapping[str, Array]) -> dict[str, Array]:
    """The batch with weight 0 where a target is `IGNORED`."""
    targets = batch.get("targets")
    if targets is None or "weights" not in batch or not jnp.issubdtype(targets.dtype, jnp.integer):
        return dict(batch)
    return {**batch, "weights": jnp.where(targets == IGNORED, 0, batch["weights"])}


def check_ids(config: ModelConfig, **arrays: Any) -> None:
    """Raises UserError, which names place and id, where an array holds an id outside the vocabulary. What is being
    traced, or lies on other hosts too, is not looked at; targets may be `IGNORED`.
    """
    if config.inputs != "tokens" or not config.vocab_size:
        return
    for name, ids in arrays.items():
        if ids is None or isinstance(ids, jax.core.Tracer) or not getattr(ids, "is_fully_addressable", True):
            continue
        ids = np.asarray(ids)
        if not ids.size or (ids.min() >= 0 and ids.max() < config.vocab_size):
            continue
        wrong = (ids < 0) | (ids >= config.vocab_size)
        if name == "targets":
            wrong &= ids != IGNORED
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            also = f", or {IGNORED} where nothing is to be predicted" if name == "targets" else ""
            raise UserError(
                f"{name}: the id {int(ids[place])} at row {place[0]}, position {place[1]} is outside the vocabulary; "
                f"allowed are 0..{config.vocab_size - 1}{also}"
            )
