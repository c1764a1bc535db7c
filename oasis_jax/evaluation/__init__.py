"""Measures of a model: perplexity, outliers, sinks, depth routing. The report over runs is in `oasis_jax.evaluation.runs`."""

from collections.abc import Iterable, Mapping

from flax import nnx

from oasis_jax.evaluation.depth import DEPTH
from oasis_jax.evaluation.evaluator import Batch, Evaluator, Value, of_model, run_evaluators
from oasis_jax.evaluation.outliers import OUTLIERS
from oasis_jax.evaluation.perplexity import PERPLEXITY
from oasis_jax.evaluation.sinks import SINKS
from oasis_jax.evaluation.trigger import TRIGGER

# A new family of measures is one file and one line here.
EVALUATORS: dict[str, Evaluator] = {
    "perplexity": PERPLEXITY,
    "outliers": OUTLIERS,
    "sinks": SINKS,
    "depth": DEPTH,
    "trigger": TRIGGER,
}

# Metric name -> {"tensor": what is read, "average": how it is reduced, "source": who defined it, "applies_to": where not everywhere}.
DEFINITIONS = {name: definition for evaluator in EVALUATORS.values() for name, definition in evaluator.definitions.items()}


def evaluate_model(model: nnx.Module, batches: Iterable[Batch], evaluators: Mapping[str, Evaluator] = EVALUATORS) -> dict[str, Value]:
    """Measures a model with one compiled forward pass per batch, whatever the number of evaluators.

    Args:
      model: an `oasis_jax.decoder.Decoder`, or an NNX module with `.config` and the same call.
      batches: dicts of arrays [B, T, ...] with "inputs", "targets" and "weights", as `oasis_jax.data.eval_batches` gives them;
        at least one. "bytes" [B, T], the bytes that each target stands for, adds bits per byte.
      evaluators: name -> Evaluator.

    Returns:
      {metric name: float, nested lists, or None where the metric does not apply}; `DEFINITIONS` says what each one is.

    Raises:
      ValueError: there is no batch.
    """
    return run_evaluators(*of_model(model), batches, evaluators).values


__all__ = ["DEFINITIONS", "EVALUATORS", "Evaluator", "evaluate_model"]
