"""Attention sinks over tokens: mass on the first token (Gu et al., arXiv 2410.10781, section 3) and mass on
the null.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation.bootstrap import Estimate, per_sequence
from oasis_jax.evaluation.evaluator import Evaluator, FinalReading, LayerReading, Rows, Value
from oasis_jax.evaluation.measures.probabilities import ATTENDING, conditional_mass

EPSILON = 0.3  # a head whose mean mass on the first token exceeds this has a sink there

_P = (
    "attention probability p of the first token of the query's document, every layer l, head h and query, the "
    "first query "
    "included"
)
_CONDITIONAL = (
    f"p / (1 - omega) of the first token, every layer, head and query with 1 - omega > {ATTENDING:g}; 0 "
    "for a head without such a query"
)
_OMEGA = "null mass omega = max(0, 1 - sum of p), every layer, head and query"
_RATE = f"a(l, h) = mean over queries of one sequence; share of (l, h) with a > {EPSILON}, mean over sequences"
_EVERYWHERE = "mean over queries, then sequences, layers and heads"
_BY_HEAD = "mean over queries, then sequences; layer x head"
_BY_POSITION = "mean over heads and documents; layer x position of the query in its document"
_GU, _OASIS = "Gu et al., arXiv 2410.10781", "OASIS, arXiv 2605.17887"
_NULL = "normalizers that leave mass to a null"
DEFINITIONS = {
    "sink_rate": {"tensor": _P, "average": _RATE, "source": _GU},
    "sink_rate_conditional": {"tensor": _CONDITIONAL, "average": _RATE, "source": _GU, "applies_to": _NULL},
    "first_token_mass": {"tensor": _P, "average": _EVERYWHERE, "source": _GU},
    "first_token_mass_conditional": {
        "tensor": _CONDITIONAL,
        "average": _EVERYWHERE,
        "source": _GU,
        "applies_to": _NULL,
    },
    "null_mass": {"tensor": _OMEGA, "average": _EVERYWHERE, "source": _OASIS, "applies_to": _NULL},
    "first_token_mass_by_head": {"tensor": _P, "average": _BY_HEAD, "source": _GU},
    "first_token_mass_conditional_by_head": {
        "tensor": _CONDITIONAL,
        "average": _BY_HEAD,
        "source": _GU,
        "applies_to": _NULL,
    },
    "null_mass_by_head": {"tensor": _OMEGA, "average": _BY_HEAD, "source": _OASIS, "applies_to": _NULL},
    "first_token_mass_by_position": {"tensor": _P, "average": _BY_POSITION, "source": _GU},
    "null_mass_by_position": {"tensor": _OMEGA, "average": _BY_POSITION, "source": _OASIS, "applies_to": _NULL},
}


def read(reading: LayerReading) -> Rows:
    """Sums over queries [B, N] and the number of queries in them [B, 1]; means over heads [B, T], summed over
    documents.
    """
    if reading.attention is None:
        return {}
    first, null, tokens = reading.attention.first_token_mass, reading.attention.null_mass, reading.tokens
    queries = jnp.full((len(first), 1), tokens.length)
    rows = {"first_sum": first.sum(-1), "first_count": queries, "total_first": tokens.by_place(first.mean(1))}
    if tokens.has_null:
        share, attending = conditional_mass(first, null)
        rows |= {"null_sum": null.sum(-1), "null_count": queries, "total_null": tokens.by_place(null.mean(1))}
        rows |= {"conditional_sum": share.sum(-1), "conditional_count": attending.sum(-1)}
    return rows


def documents(reading: FinalReading) -> Rows:
    """How many documents of a row reach every place [B, T]."""
    return {"total_documents": reading.tokens.documents_by_place}


def sink_rate(mean_mass: Float[np.ndarray, "S L N"]) -> Estimate:
    """Share of heads whose mean mass on the first token exceeds EPSILON, mean over sequences."""
    return per_sequence((mean_mass > EPSILON).mean((1, 2)))


def per_document(sums: Float[np.ndarray, "S L T"], documents: Float[np.ndarray, "S T"]) -> list[list[float | None]]:
    """The mean over documents at every place; None where no document reaches."""
    counts = documents.sum(0)
    means = sums.sum(0) / np.maximum(counts, 1)
    return [[value if count else None for value, count in zip(row, counts)] for row in means.tolist()]


def finish(rows: dict[str, np.ndarray], config: ModelConfig | None) -> dict[str, Value | Estimate]:
    """Thresholds every sequence's heads before averaging over sequences."""
    del config
    metrics: dict[str, Value | Estimate] = {}
    for name, source in (
        ("first_token_mass", "first"),
        ("first_token_mass_conditional", "conditional"),
        ("null_mass", "null"),
    ):
        if f"{source}_sum" not in rows:
            continue
        # Divides in float64: a head whose mean is exactly EPSILON stays below the threshold.
        mass = rows[f"{source}_sum"] / np.maximum(rows[f"{source}_count"], 1)
        metrics[name] = per_sequence(mass.mean((1, 2)))
        metrics[f"{name}_by_head"] = mass.mean(0).tolist()
        if source != "null":
            metrics["sink_rate" + name.removeprefix("first_token_mass")] = sink_rate(mass)
        if source != "conditional":
            metrics[f"{name}_by_position"] = per_document(rows[f"total_{source}"], rows["total_documents"])
    return metrics


SINKS = Evaluator(layer=read, final=documents, finish=finish, definitions=DEFINITIONS)
