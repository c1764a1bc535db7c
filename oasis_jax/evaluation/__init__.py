"""Measures of a model: perplexity, outliers, sinks, depth routing. The report over runs is in `oasis_jax.evaluation.runs`."""

from oasis_jax.evaluation.depth import DEPTH
from oasis_jax.evaluation.evaluator import Evaluator, evaluate_model
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

__all__ = ["DEFINITIONS", "EVALUATORS", "Evaluator", "evaluate_model"]
