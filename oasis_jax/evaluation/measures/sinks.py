"""Attention sinks over tokens: mass on the first token (Gu et al., arXiv 2410.10781, section 3) and mass on
the null.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation.bootstrap import Estimate, per_sequence
from oasis_jax.evaluation.evaluator import Evaluator, Reading, Rows, Value
from oasis_jax.evaluation.measures.probabilities import ATTENDING, conditional_mass, has_null

EPSILON = 0.3  # a head whose mean mass on the first token exceeds this has a sink there

_P = "attention probability p of the first token (key 0), every layer l, head h and query, the first query included"
_CONDITIONAL = (
    f"p / (1 - omega) of the first token, every layer, head and query with 1 - omega > {ATTENDING:g}; 0 "
    "for a head without such a query"
)
_OMEGA = "null mass omega = max(0, 1 - sum of p), every layer, head and query"
_RATE = f"a(l, h) = mean over queries of one sequence; share of (l, h) with a > {EPSILON}, mean over sequences"
_EVERYWHERE = "mean over queries, then sequences, layers and heads"
_BY_HEAD = "mean over queries, then sequences; layer x head"
_BY_POSITION = "mean over heads and sequences; layer x position of the query"
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


def read(reading: Reading) -> Rows | None:
    """Sums over queries [B, L, N] and the number of queries in them; means over heads [B, L, T]."""
    if not reading.attention:
        return None
    first = jnp.stack([layer.first_token_mass for layer in reading.attention], 1)  # [B, L, N, T]
    queries = jnp.full(first.shape[:-1], first.shape[-1])
    rows = {"first_sum": first.sum(-1), "first_count": queries, "first_by_position": first.mean(2)}
    if has_null(reading.attention):
        null = jnp.stack([layer.null_mass for layer in reading.attention], 1)
        share, attending = conditional_mass(first, null)
        rows |= {"null_sum": null.sum(-1), "null_count": queries, "null_by_position": null.mean(2)}
        rows |= {"conditional_sum": share.sum(-1), "conditional_count": attending.sum(-1)}
    return rows


def sink_rate(mean_mass: Float[np.ndarray, "S L N"]) -> Estimate:
    """Share of heads whose mean mass on the first token exceeds EPSILON, mean over sequences."""
    return per_sequence((mean_mass > EPSILON).mean((1, 2)))


def finish(rows: dict[str, np.ndarray], config: ModelConfig | None) -> dict[str, Value | Estimate]:
    """Thresholds every sequence's heads before averaging over sequences."""
    del config
    metrics = {}
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
            metrics[f"{name}_by_position"] = rows[f"{source}_by_position"].mean(0).tolist()
    return metrics


SINKS = Evaluator(read, finish, DEFINITIONS)
