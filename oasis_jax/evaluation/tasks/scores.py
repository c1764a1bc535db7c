"""Scores of answers that are right or wrong, and how sure they are."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from oasis_jax.evaluation.bootstrap import DESCRIPTION, LEVEL, Interval, intervals, per_sequence

WILSON = f"Wilson score interval, {100 * LEVEL:.0f} %"
BOOTSTRAP = f"percentile bootstrap over questions, {DESCRIPTION['draws']} draws, seed {DESCRIPTION['seed']}"


def pass_at(samples: int, right: int, k: int) -> float:
    """The share of draws of k out of n samples, c of them right, that hold a right one: 1 - C(n-c, k) / C(n, k),
    unbiased (Chen et al., arXiv 2107.03374, equation 1).
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def wilson(right: int, count: int) -> Interval:
    """The interval of a share (Wilson 1927); also where none or all are right."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle, spread = right + z * z / 2, z * math.sqrt(right * (count - right) / count + z * z / 4)
    return max(0.0, (middle - spread) / (count + z * z)), min(1.0, (middle + spread) / (count + z * z))


def score(verdicts: Sequence[Sequence[bool]], k: int) -> dict[str, object]:
    """Pass@k over questions.

    Args:
      verdicts: of every question whether each of its samples is right.
      k: at most as many as there are samples.

    Returns:
      "value", its "interval" (None for a bootstrap over a single question) and the interval's "method".
    """
    values = np.array([pass_at(len(row), sum(row), k) for row in verdicts])
    if all(len(row) == 1 for row in verdicts):
        return {"value": values.mean().item(), "interval": wilson(int(values.sum()), len(values)), "method": WILSON}
    interval = intervals({"pass": per_sequence(values)})["pass"]
    return {"value": values.mean().item(), "interval": interval, "method": BOOTSTRAP}
