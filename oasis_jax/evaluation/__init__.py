"""Measures of a model: perplexity, outliers, sinks, depth routing. The report over runs is in
`oasis_jax.evaluation.runs`.

`evaluate` is the one path: parameters are used where they lie, layers are reduced as they are done, logits exist in
pieces.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from oasis_jax.config import Config, ModelConfig
from oasis_jax.evaluation.evaluator import Batch, Evaluator, Measurements, Value
from oasis_jax.evaluation.library import measure
from oasis_jax.evaluation.measures.table import DEFAULT, DEFINITIONS, EVALUATORS, choose
from oasis_jax.evaluation.passes import DecoderPass, lower, run_evaluators
from oasis_jax.model.decoder import Decoder
from oasis_jax.placement import UNSHARDED, Placement, place
from oasis_jax.training.plan import abstract_batch
from oasis_jax.training.state import abstract_state


def evaluate(
    params: Mapping[str, Any],
    config: ModelConfig,
    placement: Placement,
    batches: Iterable[Batch],
    evaluators: Mapping[str, Evaluator] | None = None,
) -> Measurements:
    """Measures a decoder with one compiled forward pass per batch, whatever the number of evaluators.

    Args:
      params: of a training state, stacked, or layer by layer as `Decoder.parameters` gives them; used where they lie.
      config: the decoder's.
      placement: what the parameters are placed by; UNSHARDED leaves it to the compiler.
      batches: dicts of host arrays [B, T, ...] with "inputs", "targets" and "weights", as `oasis_jax.data.eval_batches`
        gives them, the same on every process; at least one, of one length. "segment_ids" and "positions" reach the
        model; "bytes" [B, T], the bytes that each target stands for, adds bits per byte. The mesh need not divide B.
        Targets of -100 and weights of 0 count nothing.
      evaluators: name -> Evaluator; the default set where not given.

    Returns:
      Measurements: `values` {metric name: float, nested lists, or None where the metric does not apply}, which
      `DEFINITIONS` explains, and what confidence intervals and differences between runs need.

    Raises:
      ValueError: there is no batch.
      UserError: an id outside the vocabulary.
    """
    chosen = choose(["default"]) if evaluators is None else evaluators
    return run_evaluators(DecoderPass(config, placement), params, batches, chosen)


def evaluate_params(
    params: Mapping[str, Any], config: ModelConfig, placement: Placement, batches: Iterable[Batch]
) -> dict[str, Value]:
    """The values of the default set: what training logs."""
    return evaluate(params, config, placement, batches).values


def lower_evaluation(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """What an evaluation of the default set runs on a batch of this run, lowered from shapes alone, for a plan."""
    params, batch = abstract_state(config, mesh).params, abstract_batch(config, mesh)
    return lower(DecoderPass(config.model, place(config, mesh)), params, batch, choose(["default"]))


def measure_model(
    model: Decoder, batches: Iterable[Batch], evaluators: Mapping[str, Evaluator] | None = None
) -> Measurements:
    """`evaluate` for an NNX Decoder."""
    return evaluate(model.parameters(), model.config, UNSHARDED, batches, evaluators)


def evaluate_model(
    model: Decoder, batches: Iterable[Batch], evaluators: Mapping[str, Evaluator] | None = None
) -> dict[str, Value]:
    """The values of `measure_model`."""
    return measure_model(model, batches, evaluators).values


__all__ = [
    "DEFAULT",
    "DEFINITIONS",
    "EVALUATORS",
    "Evaluator",
    "Measurements",
    "choose",
    "evaluate",
    "evaluate_model",
    "evaluate_params",
    "lower_evaluation",
    "measure",
    "measure_model",
]
