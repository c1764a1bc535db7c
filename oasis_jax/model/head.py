"""Before and after the layers: the embedding, the head, and losses from pieces of the logits, which never exist as a
whole.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.model.context import Context
from oasis_jax.model.parameters import ParameterSpec, matrix

Inputs = Int[Array, "B T"] | Float[Array, "B T I"]
Outputs = Float[Array, "B T O"]
Params = Mapping[str, Any]

PADDING_LOGIT = -1e30  # its exponential is 0, and unlike -inf it may be multiplied with that


def padded_vocab(vocab_size: int) -> int:
    """The rows of the embedding: vocab_size rounded up to a multiple of 8, so that it can be split over devices."""
    return -(-vocab_size // 8) * 8


def embedding_parameters(config: ModelConfig) -> dict[str, ParameterSpec]:
    """The table of tokens, or the projection of vectors, and the table of learned positions where there is one."""
    width = config.width
    if config.inputs == "vectors":
        specs = {"table": matrix((config.vector_dim, width), (None, "embed"), config.vector_dim, "embedding")}
    else:
        specs = {"table": matrix((padded_vocab(config.vocab_size), width), ("vocab", "embed"), width, "embedding")}
    if config.learned_positions:
        specs["positions"] = matrix((config.learned_positions, width), (None, "embed"), width, "embedding")
    return specs


def head_parameters(config: ModelConfig) -> dict[str, ParameterSpec]:
    """The output projection; a tied head has none of its own."""
    width = config.width
    if config.inputs == "vectors":
        return {"kernel": matrix((width, config.vector_dim), ("embed", None), width, "embedding")}
    if config.tied_head:
        return {}
    return {"kernel": matrix((width, padded_vocab(config.vocab_size)), ("embed", "vocab"), width, "embedding")}


def embed(params: Params, config: ModelConfig, inputs: Inputs, context: Context) -> Float[Array, "B T D"]:
    """Token ids are looked up, vectors projected, learned positions added; the result has the compute type.

    Raises:
      UserError: the sequence is longer than the table of learned positions.
    """
    table, numerics = params["embedding"]["table"].astype(config.dtype), context.numerics
    if config.inputs == "vectors":
        x = numerics.einsum("embedding", "BTI,ID->BTD", inputs.astype(config.dtype), table)
    else:
        x = numerics.lookup("embedding", table, inputs)
    if config.embedding_multiplier != 1.0:
        x = x * config.embedding_multiplier
    if config.learned_positions:
        rows, length = config.learned_positions, x.shape[1]
        cached = context.cached_at_most
        first = None if cached is None else cached + config.position_offset
        if context.positions is None and first is not None and first + length > rows:
            raise UserError(
                f"model.learned_positions: {rows} rows do not hold {length} positions from {first} on; "
                f"at most {max(rows - first, 0)} tokens"
            )
        # A position beyond the table is NaN, never another position's row.
        positions = context.positions_of(length) + config.position_offset
        x = x + params["embedding"]["positions"].astype(config.dtype).at[positions].get(mode="fill", fill_value=jnp.nan)
    return context.constrain(x, "batch", "stream", None)


def with_offset(config: ModelConfig, context: Context, length: int) -> Context:
    """The context whose positions are what rotary positions see: those given, or the places, and the config's
    offset.
    """
    if not config.position_offset:
        return context
    return context.replace(positions=context.positions_of(length) + config.position_offset)


def head_kernel(params: Params) -> Float[Array, "D O"]:
    """The output projection; a tied head's is the transposed embedding."""
    head = params.get("head")
    return head["kernel"] if head else params["embedding"]["table"].T


def unembed(params: Params, config: ModelConfig, x: Float[Array, "B T D"], context: Context) -> Outputs:
    """Logits over the padded vocabulary, those of the padding `PADDING_LOGIT`, or output vectors; float32 or better."""
    x = context.constrain(x, "batch", "length", None)
    outputs = project_outputs(head_kernel(params), config, x, context)
    return context.constrain(outputs, "batch", "length", "vocab" if config.inputs == "tokens" else None)


def project_outputs(
    kernel: Float[Array, "D O"], config: ModelConfig, x: Float[Array, "B T D"], context: Context
) -> Outputs:
    """x times the output projection, summed in float32 or better; the vocabulary's padding gets no probability."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    outputs = context.numerics.einsum("head", "BTD,DO->BTO", x, kernel.astype(x.dtype), preferred_element_type=wide)
    if config.logits_multiplier != 1.0:
        outputs = outputs * config.logits_multiplier
    if config.inputs == "tokens" and outputs.shape[-1] != config.vocab_size:
        outputs = jnp.where(jnp.arange(outputs.shape[-1]) < config.vocab_size, outputs, PADDING_LOGIT)
    return outputs


def num_pieces(config: ModelConfig, length: int) -> int:
    """Into how many pieces of positions the logits are cut: a piece is no larger than twice all positions'
    activations of width D. The least divisor of the length that is enough.
    """
    if config.inputs == "vectors":
        return 1
    wanted = min(-(-padded_vocab(config.vocab_size) // (2 * config.width)), length)
    return next(pieces for pieces in range(wanted, length + 1) if length % pieces == 0)


def map_logits(
    params: Params,
    config: ModelConfig,
    final: Float[Array, "B T D"],
    arrays: Mapping[str, Array],
    function: Callable[[Outputs, Mapping[str, Array]], Any],
    context: Context,
) -> Any:
    """function(logits, arrays) of all positions, from pieces of them: the logits of all never exist, nor in the
    backward pass.

    Piece k of n takes the positions k, k + n, ..., so that every device works on its own. Each part of the batch reads
    a copy of the output weights of its own: they are gathered once and their gradients summed over devices once, not
    for every piece.

    Args:
      params, config: see `unembed`.
      final: what the head reads.
      arrays: [B, T, ...] each, cut as the logits are.
      function: (logits [b, t, O], arrays [b, t, ...]) -> a pytree of arrays [b, t, ...]; a position's results depend on
        it alone.
      context: see Context.

    Returns:
      The pytree, with arrays [B, T, ...].
    """
    final = context.constrain(final, "batch", "length", None)
    length, (rows, columns) = final.shape[1], (context.placement.ways("batch"), context.placement.ways("length"))
    pieces = num_pieces(config, length // columns)
    if pieces == 1:
        return function(unembed(params, config, final, context), arrays)
    kernel = head_kernel(params)
    kernel = context.constrain(kernel, None, "vocab")
    kernel = jnp.broadcast_to(kernel, (rows, columns, *kernel.shape))
    kernel = context.constrain(kernel, "batch", "length", None, "vocab")

    def cut(x):
        x = x.reshape(rows, -1, columns, length // columns // pieces, pieces, *x.shape[2:])
        rest = (None,) * (x.ndim - 3)
        return context.constrain(jnp.moveaxis(x, (4, 0, 2), (0, 1, 2)), None, "batch", "length", *rest)

    def joined(x):
        x = jnp.moveaxis(x, (0, 1, 2), (4, 0, 2))
        return x.reshape(x.shape[0] * x.shape[1], length, *x.shape[5:])

    @jax.checkpoint
    def of_piece(kernel, final, arrays):
        def of_part(kernel, final, arrays):
            kernel = context.constrain(kernel, None, "vocab")
            logits = context.constrain(project_outputs(kernel, config, final, context), None, None, "vocab")
            return function(logits, arrays)

        return jax.vmap(jax.vmap(of_part))(kernel, final, arrays)

    found = jax.lax.map(lambda piece: of_piece(kernel, *piece), jax.tree.map(cut, (final, dict(arrays))))
    return jax.tree.map(joined, found)


def token_losses(outputs: Outputs, targets: Array) -> Float[Array, "B T"]:
    """The loss of every position, in float32 or better.

    Args:
      outputs: logits over the padded vocabulary, or vectors.
      targets: token ids [B, T], or vectors [B, T, O].

    Returns:
      Cross entropy in nats; for vectors the squared error, mean over components.
    """
    outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        return jnp.square(outputs - targets).mean(axis=-1)
    # A sum over a mask instead of a gather: it stays split where the vocabulary is split over devices.
    is_target = jnp.arange(outputs.shape[-1]) == targets[..., None]
    return jax.nn.logsumexp(outputs, axis=-1) - jnp.where(is_target, outputs, 0.0).sum(axis=-1)
