"""What few seeds can say: means with intervals, paired tests, one correction over all claims, a noise floor."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize, stats

LEVEL = 0.95
ALPHA = 1 - LEVEL


class Mean(NamedTuple):
    """A mean over seeds and its interval by Student's t; of one seed there is no interval."""

    value: float
    interval: tuple[float, float] | None
    count: int


def mean(values: Sequence[float]) -> Mean:
    """The mean of independent values."""
    found, count = np.asarray(values, np.float64), len(values)
    middle = float(found.mean())
    if count < 2:
        return Mean(middle, None, count)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * found.std(ddof=1) / math.sqrt(count))
    return Mean(middle, (middle - half, middle + half), count)


def paired_p_value(differences: Sequence[float]) -> float:
    """Student's two-sided paired t test of differences, seed by seed; 1 where a single seed leaves nothing to test."""
    found = np.asarray(differences, np.float64)
    if len(found) < 2:
        return 1.0
    error = found.std(ddof=1) / math.sqrt(len(found))
    if error == 0:
        return 1.0 if found[0] == 0 else 0.0
    return float(2 * stats.t.sf(abs(found.mean()) / error, len(found) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that hold for all hypotheses together (Holm, 1979), in the order given: each may be compared with
    ALPHA, and the chance that any true null hypothesis falls is at most ALPHA.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def noise_floor(values: Sequence[float]) -> float | None:
    """The standard deviation over seeds of one method; None where there are too few."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


@functools.cache
def detectable(count: int, tests: int) -> float:
    """The smallest effect, in standard deviations of the paired differences, that the strictest of so many tests finds
    with a chance of 80 % from so many seeds; inf where none can.
    """
    if count < 2:
        return math.inf
    freedom = count - 1
    bound = stats.t.ppf(1 - ALPHA / tests / 2, freedom)

    def missing(effect: float) -> float:
        return float(stats.nct.sf(bound, freedom, effect * math.sqrt(count))) - 0.8

    return float(optimize.brentq(missing, 0.0, (3 * float(bound) + 5) / math.sqrt(count)))


def transformed(values: Sequence[float], relative: bool) -> Float[np.ndarray, " seeds"]:
    """Values as they are compared; NaN for those that have no logarithm."""
    found = np.asarray(values, np.float64)
    if not relative:
        return found
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(found > 0, np.log(found), np.nan)
