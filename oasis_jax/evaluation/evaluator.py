"""What a measure is, and the one compiled pass over the model that serves all of them."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation import bootstrap
from oasis_jax.evaluation.bootstrap import Estimate, Interval
from oasis_jax.evaluation.measures.probabilities import Probabilities, probabilities
from oasis_jax.model.statistics import AttentionStatistics, Statistics

Batch = Mapping[str, np.ndarray]
Rows = dict[str, Array]
Value = float | list | dict | None  # None: the measure does not apply to this model or these batches
Identity = dict[str, object]


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """What a measure may look at: one batch of B sequences and what the model said about it."""

    batch: Batch
    outputs: Float[Array, "B T V"]
    statistics: Statistics
    config: ModelConfig | None = None  # None: a foreign model
    gains: Mapping[str, list[Float[Array, " D"]]] = dataclasses.field(
        default_factory=dict
    )  # of the norms, by kind of tap

    @property
    def attention(self) -> list[AttentionStatistics]:
        return self.statistics.attention

    @functools.cached_property
    def probabilities(self) -> list[Probabilities] | None:
        """Per layer what only the whole rows of its attention tell, read block by block once for all measures; None
        where unknown.
        """
        if not self.attention or any(layer.static is None for layer in self.attention):
            return None
        return [probabilities(layer, self.batch.get("segment_ids")) for layer in self.attention]


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """A family of measures: `evaluator(model, batches) -> {name: value}`.

    `read` runs under jit and reduces a batch to rows, one per sequence (arrays [B, ...]), or says None where the family
    does not apply. `finish` sees the rows of all sequences in float64 (arrays [sequences, ...]) and averages them: an
    `Estimate` for a scalar, a value for everything else; what it leaves out does not apply.
    Keeping a row per sequence lets `finish` threshold, average or resample over sequences as its definition demands.
    """

    read: Callable[[Reading], Rows | None]
    finish: Callable[[dict[str, np.ndarray], ModelConfig | None], dict[str, Value | Estimate]]
    definitions: Mapping[str, Mapping[str, str]]

    def __call__(self, model: nnx.Module, batches: Iterable[Batch]) -> dict[str, Value]:
        """Runs this family alone; see `oasis_jax.evaluation.evaluate_model` for many at once."""
        return run_evaluators(*of_model(model), batches, {"alone": self}).values


class Measurements(NamedTuple):
    """What was measured of one model."""

    values: dict[str, Value]
    estimates: dict[str, Estimate]  # of the scalars among them
    identity: Identity  # what was read: two of these are paired only where it is equal

    def intervals(self) -> dict[str, Interval | None]:
        """The confidence interval of every scalar; see `oasis_jax.evaluation.bootstrap`."""
        return bootstrap.intervals(self.estimates)


@dataclasses.dataclass(frozen=True)
class ReadModel:
    """(state, batch) -> Reading of a Decoder; equal for equal models, so that a second one compiles nothing."""

    graphdef: nnx.GraphDef

    def __call__(self, state, batch: Batch) -> Reading:
        model = nnx.merge(self.graphdef, state)
        outputs, statistics = model(batch["inputs"], segment_ids=batch.get("segment_ids"))
        norms = {
            kind: [getattr(layer, kind).parameters.get("scale") for layer in model.layers]
            for kind in ("attention_norm", "mlp_norm")
        }
        norms["final_norm"] = [model.final_norm.parameters.get("scale")]
        gains = {kind: scales for kind, scales in norms.items() if scales[0] is not None}
        return Reading(batch, outputs, statistics, model.config, gains)


def of_model(model: nnx.Module) -> tuple[ReadModel, Any, ModelConfig]:
    """The first arguments of `run_evaluators` for a Decoder."""
    graphdef, state = nnx.split(model)
    return ReadModel(graphdef), state, model.config


def _replicated(state) -> NamedSharding | None:
    """Where results must lie so that every process can read them; None when the model is on one device."""
    sharding = getattr(jax.tree.leaves(state)[0], "sharding", None)
    several = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return NamedSharding(sharding.mesh, PartitionSpec()) if several else None


@functools.partial(jax.jit, static_argnames=("read_model", "evaluators", "sharding"))
def _read(
    read_model, state, batch, evaluators: tuple[Evaluator, ...], sharding: NamedSharding | None
) -> list[Rows | None]:
    reading = read_model(state, batch)
    rows = [evaluator.read(reading) for evaluator in evaluators]
    rows = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), rows)
    return rows if sharding is None else jax.lax.with_sharding_constraint(rows, sharding)


def run_evaluators(
    read_model: Callable[[Any, Batch], Reading],
    state,
    config: ModelConfig | None,
    batches: Iterable[Batch],
    evaluators: Mapping[str, Evaluator],
) -> Measurements:
    """One forward pass per batch for all evaluators.

    Args:
      read_model: (state, batch) -> Reading, traceable and hashable.
      state: its parameters.
      config: of a Decoder; None for a foreign model.
      batches, evaluators: see `oasis_jax.evaluation.evaluate_model`.
    """
    chosen, batches = tuple(evaluators.values()), [dict(batch) for batch in batches]
    if not batches:
        raise ValueError("evaluate_model: batches is empty; give at least one")
    sharding = _replicated(state)
    per_batch = [jax.device_get(_read(read_model, state, batch, chosen, sharding)) for batch in batches]
    found, estimates = {}, {}
    for evaluator, rows in zip(chosen, zip(*per_batch)):
        results = evaluator.finish(_joined(rows), config) if rows[0] is not None else {}
        estimates |= {name: result for name, result in results.items() if isinstance(result, Estimate)}
        found |= dict.fromkeys(evaluator.definitions) | results
    values = {name: value.value if isinstance(value, Estimate) else value for name, value in found.items()}
    return Measurements(
        values, estimates, identity(batches, config.num_layers if config else _layers(read_model, state, batches[0]))
    )


def _layers(read_model, state, batch: Batch) -> int:
    return len(
        jax.eval_shape(
            lambda state, batch: [layer.null_mass for layer in read_model(state, batch).attention], state, batch
        )
    )


def identity(batches: Sequence[Batch], layers: int) -> Identity:
    """What measurements were read from: the tokens, how many attention layers, how the sequences were cut."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(name.encode() + np.ascontiguousarray(jax.device_get(batch[name])).tobytes())
    first = np.asarray(batches[0]["inputs"])
    return {
        "tokens": digest.hexdigest(),
        "layers": layers,
        "sequences": sum(len(batch["inputs"]) for batch in batches),
        "positions": first.shape[1],
    }


def _joined(rows: Sequence[Rows]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([np.asarray(batch[name], np.float64) for batch in rows]) for name in rows[0]}
