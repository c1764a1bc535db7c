"""What a measure is, and the one compiled pass over the model that serves all of them."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.statistics import Statistics

Batch = Mapping[str, np.ndarray]
Rows = dict[str, Array]
Value = float | list | dict | None  # None: the measure does not apply to this model or these batches


class Reading(NamedTuple):
    """What a measure may look at: one batch of B sequences and what the model said about it."""

    config: ModelConfig
    batch: Batch
    outputs: Float[Array, "B T V"]
    statistics: Statistics


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """A family of measures: `evaluator(model, batches) -> {name: value}`.

    `read` runs under jit and reduces a batch to rows, one per sequence (arrays [B, ...]), or says None where the family
    does not apply. `finish` sees the rows of all sequences in float64 (arrays [sequences, ...]), or None, and averages.
    Keeping a row per sequence lets `finish` threshold, average or resample over sequences as its definition demands.
    """

    read: Callable[[Reading], Rows | None]
    finish: Callable[[dict[str, np.ndarray] | None, ModelConfig], dict[str, Value]]
    definitions: Mapping[str, Mapping[str, str]]

    def __call__(self, model: nnx.Module, batches: Iterable[Batch]) -> dict[str, Value]:
        """Runs this family alone; see `oasis_jax.evaluation.evaluate_model` for many at once."""
        return run_evaluators(model, batches, {"alone": self})


def _replicated(state) -> NamedSharding | None:
    """Where results must lie so that every process can read them; None when the model is on one device."""
    sharding = getattr(jax.tree.leaves(state)[0], "sharding", None)
    several = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return NamedSharding(sharding.mesh, PartitionSpec()) if several else None


@partial(jax.jit, static_argnames=("graphdef", "evaluators", "sharding"))
def _read(graphdef, state, batch, evaluators: tuple[Evaluator, ...], sharding: NamedSharding | None) -> list[Rows | None]:
    model = nnx.merge(graphdef, state)
    outputs, statistics = model(batch["inputs"], segment_ids=batch.get("segment_ids"))
    reading = Reading(model.config, batch, outputs, statistics)
    rows = [evaluator.read(reading) for evaluator in evaluators]
    rows = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), rows)
    return rows if sharding is None else jax.lax.with_sharding_constraint(rows, sharding)


def run_evaluators(model: nnx.Module, batches: Iterable[Batch], evaluators: Mapping[str, Evaluator]) -> dict[str, Value]:
    """One forward pass per batch for all evaluators; see `oasis_jax.evaluation.evaluate_model`."""
    chosen = tuple(evaluators.values())
    graphdef, state = nnx.split(model)
    sharding = _replicated(state)
    per_batch = [jax.device_get(_read(graphdef, state, dict(batch), chosen, sharding)) for batch in batches]
    if not per_batch:
        raise ValueError("evaluate_model: batches is empty; give at least one")
    metrics = {}
    for evaluator, rows in zip(chosen, zip(*per_batch)):
        metrics |= evaluator.finish(_joined(rows), model.config)
    return metrics


def _joined(rows: Sequence[Rows | None]) -> dict[str, np.ndarray] | None:
    if rows[0] is None:
        return None
    return {name: np.concatenate([np.asarray(batch[name], np.float64) for batch in rows]) for name in rows[0]}
