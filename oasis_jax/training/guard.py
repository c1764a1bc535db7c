"""Whether training still is training: a look at every step's metrics, and what happens when one is not finite."""

import math
from collections.abc import Mapping

import jax

from oasis_jax.config import OptimizerConfig
from oasis_jax.errors import UserError
from oasis_jax.training.checkpoints import Checkpoints

_MUST_BE_FINITE = {"loss": "the loss", "grad_norm": "the gradient", "parameter_norm": "a parameter"}


class TrainingStopped(UserError):
    """Training went astray at a step; the workdir holds what was good before."""


class Guard:
    """Reads the metrics that were left on the device and applies `optimizer.nonfinite`."""

    def __init__(self, config: OptimizerConfig, checkpoints: Checkpoints):
        self._config, self._checkpoints = config, checkpoints
        self._in_a_row = 0

    @property
    def skipping(self) -> bool:
        """Whether the newest step that was looked at was skipped."""
        return self._in_a_row > 0

    def fetch(self, pending: Mapping[int, Mapping[str, jax.Array]]) -> dict[str, float]:
        """The metrics of the newest step that was not skipped, after a look at all of them, and "skipped",
        the number of those that were.

        Where all were skipped there is no loss among them.

        Raises:
          TrainingStopped: something is not finite and the policy is to stop, or too many steps in a row were skipped.
        """
        values, skipped = {}, 0
        for step, metrics in pending.items():
            found = floats(metrics)
            bad = [name for name in _MUST_BE_FINITE if not math.isfinite(found[name])]
            if not found.pop("skipped", 0.0):
                self._in_a_row = 0
                if bad:
                    self._stop(f"step {step}: {_MUST_BE_FINITE[bad[0]]} is not finite ({bad[0]} = {found[bad[0]]})")
                values = found
                continue
            skipped, self._in_a_row = skipped + 1, self._in_a_row + 1
            if self._in_a_row >= self._config.nonfinite_limit:
                self._stop(f"step {step}: {self._in_a_row} steps in a row were not finite (optimizer.nonfinite_limit)")
        return values | ({"skipped": skipped} if self._config.nonfinite == "skip" else {})

    def _stop(self, what: str) -> None:
        raise TrainingStopped(f"{what}; stopped, {self._checkpoints.last_good()}")


def floats(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    """Scalars on devices as Python numbers."""
    return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
