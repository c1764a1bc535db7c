"""Measures of a model: perplexity, outliers, sinks, depth routing. The report over runs is in
`oasis_jax.evaluation.runs`.
"""

from collections.abc import Iterable, Mapping

from flax import nnx

from oasis_jax.evaluation.evaluator import Batch, Evaluator, Measurements, Value, of_model, run_evaluators
from oasis_jax.evaluation.library import measure
from oasis_jax.evaluation.measures.table import DEFAULT, DEFINITIONS, EVALUATORS, choose


def evaluate_model(
    model: nnx.Module, batches: Iterable[Batch], evaluators: Mapping[str, Evaluator] | None = None
) -> dict[str, Value]:
    """Measures a model with one compiled forward pass per batch, whatever the number of evaluators.

    Args:
      model: an `oasis_jax.model.decoder.Decoder`; `measure` takes any other.
      batches: dicts of arrays [B, T, ...] with "inputs", "targets" and "weights", as `oasis_jax.data.eval_batches`
        gives them; at least one. "bytes" [B, T], the bytes that each target stands for, adds bits per byte.
      evaluators: name -> Evaluator; the default set where not given.

    Returns:
      {metric name: float, nested lists, or None where the metric does not apply}; `DEFINITIONS` says what each one is.

    Raises:
      ValueError: there is no batch.
    """
    return measure_model(model, batches, choose(["default"]) if evaluators is None else evaluators).values


def measure_model(model: nnx.Module, batches: Iterable[Batch], evaluators: Mapping[str, Evaluator]) -> Measurements:
    """The same with what confidence intervals and differences between runs need."""
    return run_evaluators(*of_model(model), batches, evaluators)


__all__ = [
    "DEFAULT",
    "DEFINITIONS",
    "EVALUATORS",
    "Evaluator",
    "Measurements",
    "choose",
    "evaluate_model",
    "measure",
    "measure_model",
]
