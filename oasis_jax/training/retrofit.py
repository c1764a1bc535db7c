"""A trained model in another method: where its null starts, and how far the first step is from the model it was."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oasis_jax.config import Config, ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.model.context import Context
from oasis_jax.model.decoder import final_stream
from oasis_jax.model.head import head_kernel, map_logits, project_outputs, token_losses
from oasis_jax.placement import Placement
from oasis_jax.pretrained.load import Pretrained
from oasis_jax.pretrained.transplant import transplant_sink

NULL_SHARE = 0.01  # of every head's mass, with run.init_null=one_per_cent
COMPARED_ROWS = 4


class Difference(NamedTuple):
    """How far two models are from each other on the same tokens.

    Attributes:
      logits: largest difference of logits, as a share of the largest logit.
      loss, source_loss: means over tokens, of the new model and of the one it comes from.
      nats: whether these are nats; else squared errors of vectors.
    """

    logits: float
    loss: float
    source_loss: float
    nats: bool


def in_words(found: Difference) -> str:
    """A line for those who start a run."""
    unit = " nats" if found.nats else ""
    return (
        f"before the first step: logits differ from that model's by {found.logits:.1e} of the largest, loss "
        f"{found.loss:.4f} against {found.source_loss:.4f} ({found.loss - found.source_loss:+.4f}{unit})"
    )


def rows_to_compare(config: Config, placement: Placement) -> int:
    """Of a batch on which two models are compared: few, none more than a micro-batch has."""
    ways = placement.ways("batch")
    micro_batch = config.data.batch_size // config.optimizer.accumulation_steps
    return ways * max(1, min(COMPARED_ROWS, micro_batch) // ways)


def with_null(source: Pretrained, config: Config, batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
    """The parameters of a model and those of its null, as run.init_null asks for.

    Raises:
      UserError: it cannot start so.
    """
    start = config.run.init_null
    if start == "transplant":
        if source.placement.ways("length") > 1:
            raise UserError(
                "run.init_null: transplant cannot be compared with its model where a sequence is split over devices; "
                "start from what `export --transplant begin` writes, or with mesh.sequence=1"
            )
        return transplant_sink(source).params
    if start != "one_per_cent":
        return source.params
    if source.config.normalizer != "softmax":
        raise UserError(
            f"run.init_null: one_per_cent needs a model with softmax, this one has {source.config.normalizer}"
        )
    mean = _mean_lse(source.params, source.placement.put(dict(batch)), source.config, source.placement)
    attention = {**source.params["layers"]["attention"], "null_logit": mean + math.log(NULL_SHARE / (1 - NULL_SHARE))}
    return {**source.params, "layers": {**source.params["layers"], "attention": attention}}


def _context(batch: Mapping[str, Array], placement: Placement) -> Context:
    return Context(batch.get("positions"), batch.get("segment_ids"), placement=placement)


@partial(jax.jit, static_argnames=("config", "placement"))
def _mean_lse(params, batch, config: ModelConfig, placement: Placement) -> Float[Array, "L N"]:
    """Of every head the mean over queries of the logarithm of its scores' exponentials' sum."""
    batch = placement.ordered(batch)
    seen = lambda _, layer: layer.attention.lse.mean(axis=(0, 2))
    _, run = final_stream(params, config, batch["inputs"], _context(batch, placement), on_layer=seen, loop=True)
    return jnp.stack(run.layers)


def difference(
    source: Pretrained, params: Mapping[str, Any], config: Config, batch: Mapping[str, np.ndarray]
) -> Difference:
    """How far a model is from the one it comes from, both in float32.

    Args:
      source: what it comes from.
      params, config: the model.
      batch: host arrays [B, T, ...]; a source whose begin token has become the null reads it before them.
    """
    placement, model = source.placement, dataclasses.replace(config.model, dtype="float32")
    inputs = {"begin": np.zeros((len(batch["inputs"]), 0), np.int32)}
    if config.run.init_null == "transplant":
        inputs["begin"] = np.full((len(batch["inputs"]), 1), source.begin_token, np.int32)
    arrays = placement.put({**batch, **inputs})
    of_batch = _difference(source.params, params, arrays, source.config, model, placement)
    largest, size, loss, source_loss = (float(x) for x in jax.device_get(of_batch))
    return Difference(largest / size, loss, source_loss, model.inputs == "tokens")


@partial(jax.jit, static_argnames=("theirs", "ours", "placement"))
def _difference(their_params, params, batch, theirs: ModelConfig, ours: ModelConfig, placement: Placement):
    batch = dict(batch)
    begin = batch.pop("begin")
    batch = placement.ordered(batch)
    context, inputs = _context(batch, placement), batch["inputs"]
    final, _ = final_stream(params, ours, inputs, context, on_layer=lambda *_: (), loop=True)
    added = begin.shape[1]
    whole = jnp.concatenate([begin, inputs], axis=1) if added else inputs
    their_context = Context(placement=placement) if added else context
    their_final, _ = final_stream(their_params, theirs, whole, their_context, on_layer=lambda *_: (), loop=True)
    kernel = head_kernel(their_params)

    def compare(outputs, piece):
        wanted = project_outputs(kernel, theirs, piece["final"], context)[..., : outputs.shape[-1]]
        known = jnp.arange(outputs.shape[-1]) < (ours.vocab_size or outputs.shape[-1])
        error = jnp.where(known, jnp.abs(outputs - wanted), 0.0).max(-1)
        losses = (token_losses(x, piece["targets"]) * piece["weights"] for x in (outputs, wanted))
        return error, jnp.where(known, jnp.abs(wanted), 0.0).max(-1), *losses

    arrays = {"final": their_final[:, added:], "targets": batch["targets"], "weights": batch["weights"]}
    error, size, loss, their_loss = map_logits(params, ours, final, arrays, compare, context)
    total = batch["weights"].sum()
    return error.max(), size.max(), loss.sum() / total, their_loss.sum() / total
