"""Which checkpoints of a run stay."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN, PreservationPolicy

from oasis_jax.config import RunConfig


class _AmongGood(PreservationPolicy):
    """What a policy keeps of the checkpoints whose step was not skipped, and the newest of all: steps that are skipped
    one after the other may mean that training is lost, and must not push out what was good.
    """

    def __init__(self, policy: PreservationPolicy):
        self._policy = policy

    def should_preserve(self, checkpoints: Sequence, *, context: object) -> list[bool]:
        good = [checkpoint for checkpoint in checkpoints if not (checkpoint.metrics or {}).get("skipped")]
        verdicts = self._policy.should_preserve(good, context=context)
        kept = {checkpoint.step for checkpoint, keep in zip(good, verdicts) if keep}
        newest = max((checkpoint.step for checkpoint in checkpoints), default=None)
        return [checkpoint.step in kept or checkpoint.step == newest for checkpoint in checkpoints]


def held_out_loss(metrics: dict) -> float:
    """Of the metrics that are written with a checkpoint; infinite where nothing was evaluated."""
    return metrics.get("loss", math.inf)


class Keep(NamedTuple):
    """Which checkpoints stay: the newest, those of every so many steps (0: none), and those with the lowest loss (0:
    none). Only good ones count, see `Checkpoints.save`; the newest of all stays whatever it is.
    """

    latest: int
    every: int = 0
    best: int = 0

    @classmethod
    def of(cls, run: RunConfig) -> "Keep":
        return cls(run.keep_checkpoints, run.keep_every, run.keep_best)

    def policy(self) -> PreservationPolicy:
        policies = [LatestN(self.latest)]
        if self.every:
            policies.append(EveryNSteps(self.every))
        if self.best:
            policies.append(
                BestN(
                    get_metric_fn=held_out_loss,
                    reverse=True,
                    n=self.best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return _AmongGood(AnyPreservationPolicy(policies))
