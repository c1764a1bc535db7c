"""Whole attention rows: sinks at every token and threshold, entropy, largest probability (Gu et al., arXiv
2410.10781).
"""

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation.bootstrap import Estimate, per_sequence
from oasis_jax.evaluation.evaluator import Evaluator, Reading, Rows, Value
from oasis_jax.evaluation.measures.probabilities import ATTENDING, Probabilities, has_null, per_mass
from oasis_jax.evaluation.measures.sinks import EPSILON

EPSILONS = (0.1, 0.2, EPSILON, 0.4, 0.5)

_A = "a_k(l, h) = mean over the queries i >= k of one sequence of p_i(k), every layer l, head h and key k"
_A_CONDITIONAL = "the same of p / (1 - omega), over the queries i >= k; a query with 1 - omega <= 1e-4 counts as 0"
_SECONDARY = "the largest a_k(l, h) of the keys 1 <= k < T / 2, which at least half of the queries see"
_RATES = f"share of (l, h) with a_k > eps, mean over sequences; eps of {EPSILONS} -> k"
_KEYS = "mean over heads and sequences; layer x k"
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


def _of_keys(sums: Float[Array, "B L N T"], name: str) -> Rows:
    """Reduced over heads, so that a row per sequence stays small at any length."""
    length = sums.shape[-1]
    a = sums / (length - jnp.arange(length))
    seen = a[..., 1 : max(2, length // 2)]
    return {
        f"rate{name}": jnp.stack([(a > epsilon).mean((1, 2)) for epsilon in EPSILONS], 1),
        f"mass{name}": a.mean(2),
        f"secondary{name}": seen.max(-1),
    }


def read(reading: Reading) -> Rows | None:
    """Sinks by key: [B, eps, T], [B, L, T] and [B, L, N]; means over queries of the rows' statistics [B, L, N]."""
    if reading.probabilities is None or reading.outputs.shape[1] < 2:
        return None
    pairs = zip(reading.probabilities, reading.attention)
    rows = _of_keys(jnp.stack([p.column_sums for p in reading.probabilities], 1), "")
    rows["attention_entropy"] = jnp.stack([-negative_entropy(p, layer.null_mass).mean(-1) for p, layer in pairs], 1)
    rows["max_probability"] = jnp.stack([p.max_probability.mean(-1) for p in reading.probabilities], 1)
    if has_null(reading.attention):
        rows |= _of_keys(jnp.stack([p.conditional_column_sums for p in reading.probabilities], 1), "_conditional")
        rows["attention_entropy_conditional"] = jnp.stack(
            [conditional_entropy(p).mean(-1) for p in reading.probabilities], 1
        )
        largest = [per_mass(p.max_probability, p.token_mass).mean(-1) for p in reading.probabilities]
        rows["max_probability_conditional"] = jnp.stack(largest, 1)
    return rows


def finish(rows: dict[str, np.ndarray], config: ModelConfig | None) -> dict[str, Value | Estimate]:
    """Means over sequences."""
    del config
    found = {}
    for suffix in ("", "_conditional"):
        if f"rate{suffix}" not in rows:
            continue
        rates = rows[f"rate{suffix}"].mean(0).tolist()
        found[f"sink_rate_by_key{suffix}"] = {str(epsilon): rate for epsilon, rate in zip(EPSILONS, rates)}
        found[f"token_mass_by_key{suffix}"] = rows[f"mass{suffix}"].mean(0).tolist()
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


ATTENTION_MAPS = Evaluator(read, finish, DEFINITIONS)
