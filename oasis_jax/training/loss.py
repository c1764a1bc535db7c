"""What training minimizes: cross entropy over tokens, squared error over vectors."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.model.attention import Constrain
from oasis_jax.model.decoder import ends_parameters, padded_vocab, unembed
from oasis_jax.model.parameters import Parameters


def token_losses(
    outputs: Float[Array, "B T O"], batch: Mapping[str, Array], config: ModelConfig
) -> Float[Array, "B T"]:
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
    outputs: Float[Array, "B T O"],
    batch: Mapping[str, Array],
    config: ModelConfig,
    total: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """The mean of `token_losses` under batch["weights"] [B, T].

    Args:
      total: what to divide the weighted sum by, where it is not this batch's own weight: micro-batches divided by the
        weight of the whole batch sum to the loss of the whole batch.
    """
    return (token_losses(outputs, batch, config) * batch["weights"]).sum() / (
        total_weight(batch) if total is None else total
    )


def loss_chunks(config: ModelConfig, length: int) -> int:
    """Into how many chunks of positions the loss is cut: a chunk's logits are no larger than twice all positions'
    activations of width D.

    The least divisor of the length that is enough.
    """
    if config.inputs == "vectors":
        return 1
    wanted = min(-(-padded_vocab(config.vocab_size) // (2 * config.width)), length)
    return next(chunks for chunks in range(wanted, length + 1) if length % chunks == 0)


def chunked_mean_loss(
    ends: Parameters,
    final: Float[Array, "B T D"],
    batch: Mapping[str, Array],
    config: ModelConfig,
    constrain: Constrain,
    total: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """`mean_loss` of the outputs that `unembed` makes of `final`, without ever holding the logits of all positions.

    Chunk k of n takes the positions k, k + n, ..., so that every device keeps its own; the backward pass makes a
    chunk's logits again. Each part of the batch reads a copy of the output weights of its own: they are gathered once
    and their gradients summed over devices once, not for every chunk.
    """
    total = total_weight(batch) if total is None else total
    final = constrain(final, ("batch", "length", None))
    ways = getattr(constrain, "ways", lambda axis: 1)
    rows, columns = ways("batch"), ways("length")
    chunks = loss_chunks(config, final.shape[1] // columns)
    part = {name: batch[name] for name in ("targets", "weights")}
    if chunks == 1:
        return mean_loss(unembed(ends, config, final, constrain), part, config, total)
    name = "head" if "head" in ends else "embedding"
    axes = tuple(axis if axis == "vocab" else None for axis in ends_parameters(config)[name].axes)
    weights = jnp.broadcast_to(constrain(ends[name], axes), (rows, columns, *ends[name].shape))
    weights = constrain(weights, ("batch", "length", *axes))

    def deal(x):
        x = x.reshape(rows, -1, columns, x.shape[1] // columns // chunks, chunks, *x.shape[2:])
        return constrain(jnp.moveaxis(x, (4, 0, 2), (0, 1, 2)), (None, "batch", "length", *(None,) * (x.ndim - 3)))

    def local(x, axes):
        return constrain(x, tuple(axis if axis == "vocab" else None for axis in axes))

    @jax.checkpoint
    def chunk_loss(weights, final, part):
        def of_part(weights, final, part):
            return mean_loss(unembed({name: weights}, config, final, local), part, config, total)

        return jax.vmap(jax.vmap(of_part))(weights, final, part).sum()

    def add(loss, chunk):
        return loss + chunk_loss(weights, *chunk), None

    wide = jnp.promote_types(final.dtype, jnp.float32)
    return jax.lax.scan(add, jnp.zeros((), wide), jax.tree.map(deal, (final, part)))[0]
