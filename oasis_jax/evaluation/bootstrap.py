"""Confidence intervals: scalar measures as ratios of sums over sequences, resampled by whole sequences.

The tokens of a sequence are not independent, so a sequence is drawn whole or not at all (sequence-cluster bootstrap).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from oasis_jax.errors import UserError

DRAWS = 10_000
SEED = 0
LEVEL = 0.95
DESCRIPTION = {"method": "percentile bootstrap over sequences", "draws": DRAWS, "seed": SEED, "level": LEVEL}

Interval = tuple[float, float]


def only(means: Float[np.ndarray, "*draws 1"]) -> Float[np.ndarray, "*draws"]:
    """The `reduce` of a measure that is one ratio."""
    return means[..., 0]


def mean(means: Float[np.ndarray, "*draws K"]) -> Float[np.ndarray, "*draws"]:
    """The `reduce` of a mean over K ratios."""
    return means.mean(-1)


def largest(means: Float[np.ndarray, "*draws K"]) -> Float[np.ndarray, "*draws"]:
    """The `reduce` of the largest of K ratios."""
    return means.max(-1)


class Estimate(NamedTuple):
    """A scalar measure before its average: reduce(totals.sum(0) / counts.sum(0)).

    totals: [sequences, K].
    counts: [sequences, K] or [sequences, 1]: what each total is a sum over.
    reduce: [..., K] ratios -> [...].
    """

    totals: Float[np.ndarray, "S K"]
    counts: Float[np.ndarray, "S _"]
    reduce: Callable[[np.ndarray], np.ndarray] = only

    @property
    def value(self) -> float | None:
        """None where nothing was counted."""
        counts = self.counts.sum(0)
        return float(self.reduce(self.totals.sum(0) / counts)) if counts.all() else None


def per_sequence(
    values: Float[np.ndarray, "S ..."], reduce: Callable[[np.ndarray], np.ndarray] | None = None
) -> Estimate:
    """The estimate that averages one value, or K values, of every sequence."""
    values = values.reshape(len(values), -1)
    return Estimate(values, np.ones((len(values), 1)), reduce or only)


def _weights(sequences: int) -> Float[np.ndarray, "draws S"]:
    """How often each draw has each sequence; the same for every measure, so that differences can be paired."""
    random = np.random.default_rng(SEED)
    return random.multinomial(sequences, np.full(sequences, 1 / sequences), size=DRAWS).astype(np.float64)


def _resampled(estimate: Estimate, weights: Float[np.ndarray, "draws S"]) -> Float[np.ndarray, " draws"]:
    parts = max(1, len(weights) * estimate.totals.shape[1] // 2**22)  # 32 MiB of means at a time
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw without any count is left out
        drawn = [
            estimate.reduce((part @ estimate.totals) / (part @ estimate.counts))
            for part in np.array_split(weights, parts)
        ]
    return np.concatenate(drawn)


def _quantiles(values: Float[np.ndarray, " draws"]) -> Interval | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def intervals(estimates: Mapping[str, Estimate]) -> dict[str, Interval | None]:
    """The confidence interval of each estimate over the same sequences; None where a single sequence was read."""
    if not estimates:
        return {}
    sequences = len(next(iter(estimates.values())).totals)
    if sequences < 2:
        return dict.fromkeys(estimates)
    weights = _weights(sequences)
    return {name: None if e.value is None else _quantiles(_resampled(e, weights)) for name, e in estimates.items()}


def paired_differences(
    first: Mapping[str, Estimate],
    second: Mapping[str, Estimate],
    identities: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> dict[str, dict[str, object]]:
    """first - second of every measure both have, with the interval of the difference over the same draws of the same
    sequences.

    Args:
      identities: what each of the two was read from; see `oasis_jax.evaluation.evaluator.Identity`.

    Raises:
      UserError: they read other tokens, other layers or sampled otherwise: a difference would not be one of the models.
    """
    one, other = identities
    differing = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    if differing:
        found = "; ".join(f"{name}: {one.get(name)!r} and {other.get(name)!r}" for name in differing)
        raise UserError(f"these runs cannot be paired, they differ in {found}")
    names = [
        name for name in first if name in second and first[name].value is not None and second[name].value is not None
    ]
    weights = _weights(one["sequences"]) if one["sequences"] > 1 else None
    found = {}
    for name in names:
        pair = first[name], second[name]
        interval = None if weights is None else _quantiles(_resampled(pair[0], weights) - _resampled(pair[1], weights))
        found[name] = {"difference": pair[0].value - pair[1].value, "interval": interval}
    return found
