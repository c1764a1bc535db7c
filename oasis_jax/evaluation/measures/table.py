"""The table of measures: a new family is one file and one line here."""

from collections.abc import Iterable

from oasis_jax.errors import UserError, unknown_name
from oasis_jax.evaluation.evaluator import Evaluator
from oasis_jax.evaluation.measures.attention_maps import ATTENTION_MAPS
from oasis_jax.evaluation.measures.depth import DEPTH
from oasis_jax.evaluation.measures.joint import JOINT
from oasis_jax.evaluation.measures.massive import MASSIVE
from oasis_jax.evaluation.measures.outliers import OUTLIERS, TOKEN_KURTOSIS
from oasis_jax.evaluation.measures.perplexity import PERPLEXITY
from oasis_jax.evaluation.measures.residual_sinks import RESIDUAL_SINKS
from oasis_jax.evaluation.measures.sinks import SINKS
from oasis_jax.evaluation.measures.trigger import TRIGGER
from oasis_jax.evaluation.measures.values import VALUES

EVALUATORS: dict[str, Evaluator] = {
    "perplexity": PERPLEXITY,
    "outliers": OUTLIERS,
    "sinks": SINKS,
    "depth": DEPTH,
    "trigger": TRIGGER,
    "values": VALUES,
    "token_kurtosis": TOKEN_KURTOSIS,
    "massive": MASSIVE,
    "residual_sinks": RESIDUAL_SINKS,
    "attention_maps": ATTENTION_MAPS,
    "joint": JOINT,
}

# What evaluations read when nothing is asked for; benchmarks/measures.py says what it and the rest cost.
DEFAULT = ("perplexity", "outliers", "sinks", "depth", "trigger")

# Metric name -> {"tensor": what is read, "average": how it is reduced, "source": who defined it, "applies_to": where
# not everywhere}.
DEFINITIONS = {
    name: definition for evaluator in EVALUATORS.values() for name, definition in evaluator.definitions.items()
}


def choose(names: Iterable[str], where: str = "measures") -> dict[str, Evaluator]:
    """The families that a list of names asks for, in the table's order; "default" and "all" stand for several.

    Raises:
      UserError: an unknown name, or none; one text where a list of them is expected.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise UserError(f"{where}: expected a list of names, such as ['sinks'], got {names!r}")
    asked: set[str] = set()
    for name in names:
        family = next((family for family, evaluator in EVALUATORS.items() if name in evaluator.definitions), None)
        if name in ("default", "all"):
            asked |= set(DEFAULT if name == "default" else EVALUATORS)
        elif name in EVALUATORS:
            asked.add(name)
        elif family is not None:
            raise UserError(f"{where}: {name!r} is one of the values of {family!r}; ask for that")
        else:
            raise unknown_name(where, name, ("default", "all", *EVALUATORS))
    if not asked:
        raise UserError(f"{where}: give at least one of default, all, {', '.join(EVALUATORS)}")
    return {name: evaluator for name, evaluator in EVALUATORS.items() if name in asked}
