"""Whole attention rows: sinks at every token and threshold, entropy, largest probability (Gu et al., arXiv
2410.10781).
"""

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation.bootstrap import Estimate, per_sequence
from oasis_jax.evaluation.evaluator import Evaluator, FinalReading, LayerReading, Rows, Tokens, Value
from oasis_jax.evaluation.measures.probabilities import ATTENDING, Probabilities, per_mass
from oasis_jax.evaluation.measures.sinks import EPSILON, per_document

EPSILONS = (0.1, 0.2, EPSILON, 0.4, 0.5)

_A = (
    "a_k(l, h) = mean over the queries i >= k of one document of p_i(k), every layer l, head h and key k "
    "of the document"
)
_A_CONDITIONAL = "the same of p / (1 - omega), over the queries i >= k; a query with 1 - omega <= 1e-4 counts as 0"
_SECONDARY = (
    "the largest a_k(l, h) of a sequence's keys 1 <= k < T / 2, T the length of their document, which at least "
    "half of its "
    "queries see"
)
_RATES = f"share of (l, h) with a_k > eps, mean over documents; eps of {EPSILONS} -> k"
_KEYS = "mean over heads and documents; layer x k"
_EVERYWHERE = "mean over queries, heads, layers and sequences"
_BY_HEAD = "mean over queries and sequences; layer x head"
_GU, _OASIS = "Gu et al., arXiv 2410.10781", "OASIS, arXiv 2605.17887"
_KNOWN = "models that say how their attention normalizes"
_NULL = "normalizers that leave mass to a null"
_ENTROPY = "entropy in nats of each attention row, the null one of the outcomes"
_ENTROPY_CONDITIONAL = "entropy in nats of p / (1 - omega), every row with 1 - omega > 1e-4; 0 for others"
_LARGEST, _LARGEST_CONDITIONAL = (
    "largest p of each attention row",
    "largest p / (1 - omega) of each row with 1 - omega > 1e-4; 0 for others",
)


def _definitions() -> dict[str, dict[str, str]]:
    def of(tensor: str, average: str, applies_to: str, source: str = _GU) -> dict[str, str]:
        return {"tensor": tensor, "average": average, "source": source, "applies_to": applies_to}

    found = {}
    for suffix, a, applies_to in (("", _A, _KNOWN), ("_conditional", _A_CONDITIONAL, _NULL)):
        found |= {
            f"sink_rate_by_key{suffix}": of(a, _RATES, applies_to),
            f"token_mass_by_key{suffix}": of(a, _KEYS, applies_to),
            f"secondary_sink_rate{suffix}": of(
                f"{_SECONDARY}; {a}", f"share of (l, h) above {EPSILON}, mean over sequences", applies_to
            ),
            f"secondary_sink_mass_by_head{suffix}": of(
                f"{_SECONDARY}; {a}", "mean over sequences; layer x head", applies_to
            ),
        }
    rows = {
        "attention_entropy": (_ENTROPY, _KNOWN),
        "attention_entropy_conditional": (_ENTROPY_CONDITIONAL, _NULL),
        "max_probability": (_LARGEST, _KNOWN),
        "max_probability_conditional": (_LARGEST_CONDITIONAL, _NULL),
    }
    for name, (tensor, applies_to) in rows.items():
        found |= {
            name: of(tensor, _EVERYWHERE, applies_to, _OASIS),
            f"{name}_by_head": of(tensor, _BY_HEAD, applies_to, _OASIS),
        }
    return found


DEFINITIONS = _definitions()


def negative_entropy(layer: Probabilities, null_mass: Float[Array, "B N T"]) -> Float[Array, "B N T"]:
    """sum p log p over tokens and the null."""
    return layer.negative_entropy + xlogy(null_mass, null_mass)


def conditional_entropy(layer: Probabilities) -> Float[Array, "B N T"]:
    """The entropy of p / m with m the mass on tokens: log m - (sum p log p) / m."""
    m = layer.token_mass
    attending = m > ATTENDING
    return jnp.where(attending, jnp.log(jnp.where(attending, m, 1.0)) - per_mass(layer.negative_entropy, m), 0.0)


def _of_keys(sums: Float[Array, "B N T"], tokens: Tokens, name: str) -> Rows:
    """Reduced over heads, so that a row per sequence stays small at any length; summed over documents."""
    place, length = tokens.place, tokens.document_length
    a = sums / (length - place)[:, None]
    secondary = (place >= 1) & (place < jnp.maximum(2, length // 2))
    rates = [tokens.by_place((a > epsilon).mean(1)) for epsilon in EPSILONS]
    return {
        f"total_rate{name}": jnp.stack(rates, 1),
        f"total_mass{name}": tokens.by_place(a.mean(1)),
        f"secondary{name}": jnp.where(secondary[:, None], a, 0.0).max(-1),
    }


def read(reading: LayerReading) -> Rows:
    """Sinks by key: [B, eps, T], [B, T] and [B, N]; means over queries of the rows' statistics [B, N]."""
    p, tokens = reading.probabilities, reading.tokens
    if p is None or tokens.length < 2:
        return {}
    rows = _of_keys(p.column_sums, tokens, "")
    rows["attention_entropy"] = -negative_entropy(p, reading.attention.null_mass).mean(-1)
    rows["max_probability"] = p.max_probability.mean(-1)
    if tokens.has_null:
        rows |= _of_keys(p.conditional_column_sums, tokens, "_conditional")
        rows["attention_entropy_conditional"] = conditional_entropy(p).mean(-1)
        rows["max_probability_conditional"] = per_mass(p.max_probability, p.token_mass).mean(-1)
    return rows


def combine(layers: Rows, routers: dict[str, Rows], reading: FinalReading) -> Rows:
    """Rates are means over layers too: [B, eps, T]."""
    del routers
    found = {name: values.mean(1) if name.startswith("total_rate") else values for name, values in layers.items()}
    return found | {"total_documents": reading.tokens.documents_by_place} if found else {}


def finish(rows: dict[str, np.ndarray], config: ModelConfig | None) -> dict[str, Value | Estimate]:
    """Means over sequences."""
    del config
    found = {}
    for suffix in ("", "_conditional"):
        if f"total_rate{suffix}" not in rows:
            continue
        rates = per_document(rows[f"total_rate{suffix}"], rows["total_documents"])
        found[f"sink_rate_by_key{suffix}"] = {str(epsilon): rate for epsilon, rate in zip(EPSILONS, rates)}
        found[f"token_mass_by_key{suffix}"] = per_document(rows[f"total_mass{suffix}"], rows["total_documents"])
        secondary = rows[f"secondary{suffix}"]
        found[f"secondary_sink_rate{suffix}"] = per_sequence((secondary > EPSILON).mean((1, 2)))
        found[f"secondary_sink_mass_by_head{suffix}"] = secondary.mean(0).tolist()
        for name in ("attention_entropy", "max_probability"):
            values = rows[name + suffix]
            found |= {
                name + suffix: per_sequence(values.mean((1, 2))),
                f"{name}{suffix}_by_head": values.mean(0).tolist(),
            }
    return found


ATTENTION_MAPS = Evaluator(layer=read, combine=combine, finish=finish, definitions=DEFINITIONS)
