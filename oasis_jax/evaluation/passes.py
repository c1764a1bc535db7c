"""One compiled pass over a batch for all evaluators: a Decoder's parameters where they lie, or anybody's function."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.evaluation.bootstrap import Estimate
from oasis_jax.evaluation.evaluator import (
    Batch,
    Evaluator,
    FinalReading,
    Identity,
    LayerReading,
    Measurements,
    Rows,
    Tokens,
)
from oasis_jax.model.batch import check_ids, without_ignored
from oasis_jax.model.context import Context
from oasis_jax.model.decoder import final_stream
from oasis_jax.model.head import map_logits
from oasis_jax.model.layout import part
from oasis_jax.model.normalizers import WITH_NULL
from oasis_jax.model.numerics import FLOAT, Numerics
from oasis_jax.model.statistics import AttentionStatistics, RouterStatistics
from oasis_jax.model.unrolled import LayerStatistics
from oasis_jax.model.wiring import schedule
from oasis_jax.placement import UNSHARDED, Placement


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NumLayers:
    """How many layers a pass met: leaves jit beside arrays."""

    value: int


@dataclasses.dataclass(frozen=True)
class DecoderPass:
    """A decoder as evaluation runs it; equal for equal models, so that a second one compiles nothing.

    Attributes:
      config: the decoder's.
      placement: where parameters lie and how activations are split.
      numerics: makes the numerics of a pass from the arrays `change`; None: float. Hashable.
    """

    config: ModelConfig
    placement: Placement = UNSHARDED
    numerics: Callable[[Any], Numerics] | None = None

    def context(self, batch: Mapping[str, Array], change: Any = None) -> Context:
        """The context of a pass over an ordered batch."""
        numerics = FLOAT if self.numerics is None else self.numerics(change)
        return Context(batch.get("positions"), batch.get("segment_ids"), placement=self.placement, numerics=numerics)

    def __call__(self, params, change: Any, batch: Batch, size: Int[Array, ""], evaluators: Sequence[Evaluator]):
        batch = self.placement.ordered(without_ignored(batch))
        context = self.context(batch, change)
        show = _Audience(evaluators, Tokens(batch, size, context, self.config.normalizer in WITH_NULL))
        final, unrolled = final_stream(
            params,
            self.config,
            batch["inputs"],
            context,
            on_layer=lambda _, statistics: show.layer(statistics),
            on_router=lambda _, statistics: show.router(statistics),
            loop=True,
        )

        def of_logits(function, arrays):
            return map_logits(params, self.config, final, arrays, function, context)

        gains = _gains(params, self.config.num_layers)
        reading = FinalReading(show.tokens, final, of_logits, self.config, gains)
        routers = {name: unrolled.routers[name] for name in schedule(self.config).routers}
        return show.rows(unrolled.layers, routers, reading), NumLayers(self.config.num_layers)


def _gains(params: Mapping[str, Any], layers: int) -> Float[Array, "L D"] | None:
    """Of the norm that reads each layer's output; None where norms have no gain."""
    norms = [part(params["layers"], i).get("attention_norm", {}) for i in range(1, layers)]
    scales = [norm.get("scale") for norm in [*norms, params.get("final_norm", {})]]
    return None if scales[-1] is None else jnp.stack(scales)


@dataclasses.dataclass(frozen=True, eq=False)
class _Audience:
    """Shows the evaluators what the model says, and collects their rows."""

    evaluators: Sequence[Evaluator]
    tokens: Tokens

    def layer(self, statistics: LayerStatistics) -> list[Rows]:
        reading = LayerReading(self.tokens, statistics)
        return [evaluator.layer(reading) for evaluator in self.evaluators]

    def router(self, statistics: RouterStatistics) -> list[Rows]:
        return [evaluator.router(statistics) for evaluator in self.evaluators]

    def rows(
        self, layers: Sequence[list[Rows]], routers: Mapping[str, list[Rows]], reading: FinalReading
    ) -> list[Rows]:
        """Per evaluator its rows, in float32 or better."""
        found, own = [], jnp.arange(len(self.tokens.batch["inputs"])) < self.tokens.size
        for number, evaluator in enumerate(self.evaluators):
            of_layers, of_routers = ([rows[number] for rows in x] for x in (layers, routers.values()))
            names = dict.fromkeys(name for rows in of_layers for name in rows)
            stacked = {name: jnp.stack([rows[name] for rows in of_layers if name in rows], 1) for name in names}
            rows = evaluator.combine(stacked, dict(zip(routers, of_routers)), reading) | evaluator.final(reading)
            rows = {name: x.astype(jnp.promote_types(x.dtype, jnp.float32)) for name, x in rows.items()}
            total = lambda x: x.sum(0, keepdims=True, where=own.reshape(-1, *(1,) * (x.ndim - 1)))
            found.append({name: total(x) if name.startswith("total_") else x for name, x in rows.items()})
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class FunctionPass:
    """Somebody's function as evaluation runs it.

    Attributes:
      apply: (params, inputs) -> outputs, or (outputs, statistics); with segment_ids where a batch has them.
      parts: what it says of itself -> (of every layer, of routers by name, the final norm's output or None).
    """

    apply: Callable
    parts: Callable[[Any], tuple[Sequence[LayerStatistics], Mapping[str, RouterStatistics], Array | None]]
    placement: Placement = UNSHARDED

    def __call__(self, params, change: Any, batch: Batch, size: Int[Array, ""], evaluators: Sequence[Evaluator]):
        del change
        batch = without_ignored(batch)
        segments = {"segment_ids": batch["segment_ids"]} if "segment_ids" in batch else {}
        result = self.apply(params, batch["inputs"], **segments)
        outputs, statistics = result if isinstance(result, tuple) else (result, ())
        layers, routers, final = self.parts(statistics)
        attention = [layer.attention for layer in layers if layer.attention is not None]
        _check_segments(attention, batch)
        has_null = any(layer.static is not None and layer.static.config.normalizer in WITH_NULL for layer in attention)
        show = _Audience(evaluators, Tokens(batch, size, Context(**segments), has_null))
        reading = FinalReading(show.tokens, final, lambda function, arrays: function(outputs, arrays))
        of_routers = {name: show.router(router) for name, router in routers.items()}
        return show.rows([show.layer(layer) for layer in layers], of_routers, reading), NumLayers(len(attention))


def _check_segments(layers: Sequence[AttentionStatistics], batch: Batch) -> None:
    """Raises UserError where the documents that a layer kept apart are not those that measures will tell apart."""
    for number, layer in enumerate(layers):
        if layer.static is None or layer.static.segments == ("segment_ids" in batch):
            continue
        if layer.static.segments:
            raise UserError(
                f"measure: attention layer {number} used segment ids that the batches do not have; give them as "
                '"segment_ids" of each batch, with which apply_fn is called'
            )
        raise UserError(
            f"measure: the batches have segment_ids, and attention layer {number} did not use them; apply_fn is called "
            "with segment_ids=: pass them on, or leave them out of the batches"
        )


Pass = DecoderPass | FunctionPass


@functools.partial(jax.jit, static_argnames=("model", "evaluators", "sharding"))
def _run(
    model: Pass,
    params,
    change,
    batch: Batch,
    size: Int[Array, ""],
    evaluators: tuple[Evaluator, ...],
    sharding: NamedSharding | None,
):
    rows, layers = model(params, change, batch, size, evaluators)
    return (rows if sharding is None else jax.lax.with_sharding_constraint(rows, sharding)), layers


def _replicated(params) -> NamedSharding | None:
    """Where rows must lie so that every process can read them; None when the parameters are on one device."""
    sharding = next((getattr(x, "sharding", None) for x in jax.tree.leaves(params)), None)
    several = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return NamedSharding(sharding.mesh, PartitionSpec()) if several else None


def lower(model: Pass, params, batch: Batch, evaluators: Mapping[str, Evaluator], change: Any = None):
    """The pass over one batch, lowered; parameters and batch may be abstract (jax.ShapeDtypeStruct with shardings).

    Returns:
      A jax.stages.Lowered; `.compile()` of it is called with (params, change, batch, how many of its rows count).
    """
    size = len(batch["inputs"])
    return _run.lower(model, params, change, dict(batch), size, tuple(evaluators.values()), _replicated(params))


def collect(
    model: Pass, params, batches: Sequence[Batch], evaluators: Sequence[Evaluator], change: Any = None
) -> tuple[list[dict[str, np.ndarray]], int]:
    """Per evaluator the rows of all sequences in float64, and how many layers the model has."""
    sharding, found, layers = _replicated(params), [], NumLayers(0)
    for batch, size in placed_batches(model, batches):
        rows, layers = _run(model, params, change, batch, size, tuple(evaluators), sharding)
        found.append(jax.tree.map(lambda x, size=size: np.asarray(x, np.float64)[:size], jax.device_get(rows)))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found), layers.value


def placed_batches(model: Pass, batches: Sequence[Batch]) -> Iterator[tuple[dict[str, Array], int]]:
    """Every batch where the pass wants it, and how many of its rows are its own.

    The others have weight 0: they are added until the mesh divides the batch and all batches have equally many rows, so
    that one program serves.
    """
    sizes = [len(batch["inputs"]) for batch in batches]
    ways = model.placement.ways("batch")
    rows = -(-max(sizes, default=0) // ways) * ways
    for batch, size in zip(batches, sizes):
        if isinstance(model, DecoderPass):
            check_ids(model.config, inputs=batch["inputs"], targets=batch.get("targets"))
        yield model.placement.put(padded_rows(batch, rows)), size


def padded_rows(batch: Batch, size: int) -> Batch:
    """A batch of `size` rows, the last repeated with weight 0: ranges over the batch stay what they are."""
    extra = size - len(batch["inputs"])
    if not extra:
        return batch
    grown = {name: np.concatenate([x, np.repeat(x[-1:], extra, axis=0)]) for name, x in batch.items()}
    if "weights" in grown:
        grown["weights"][-extra:] = 0
    return grown


def run_evaluators(
    model: Pass, params, batches: Iterable[Batch], evaluators: Mapping[str, Evaluator], change: Any = None
) -> Measurements:
    """One forward pass per batch for all evaluators.

    Raises:
      UserError: there is no batch, or one that does not fit itself or the others; evaluators that are no mapping.
    """
    batches = checked_batches(batches)
    if not isinstance(evaluators, Mapping):
        raise UserError(
            f"evaluators: expected a mapping of names to evaluators, such as choose(['sinks']), got {evaluators!r}"
        )
    config = getattr(model, "config", None)
    every, layers = collect(model, params, batches, tuple(evaluators.values()), change)
    found, estimates = {}, {}
    for evaluator, rows in zip(evaluators.values(), every):
        with np.errstate(all="ignore"):  # of a diverged model numbers are NaN, which is what is said of them
            results = evaluator.finish(rows, config) if rows else {}
        estimates |= {name: result for name, result in results.items() if isinstance(result, Estimate)}
        found |= dict.fromkeys(evaluator.definitions) | results
    values = {name: value.value if isinstance(value, Estimate) else value for name, value in found.items()}
    return Measurements(values, estimates, identity(batches, layers))


def checked_batches(batches: Iterable[Batch], where: str = "evaluation") -> list[dict[str, Array]]:
    """The batches as a list; measures go over all of them, so that all sequences have one length.

    Raises:
      UserError: there is none, or one that is no mapping of arrays [B, T, ...] with "inputs", has no tokens, or has
        another length.
    """
    if not isinstance(batches, Iterable) or not (batches := list(batches)):
        raise UserError(f"{where}: batches is empty; give at least one")
    length = None
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise UserError(f"{where}: batch {number} has to be a dict of arrays, got {type(batch).__name__}")
        if "inputs" not in batch:
            raise UserError(f"{where}: batch {number} has no 'inputs', only {', '.join(map(str, batch)) or 'nothing'}")
        if odd := [name for name, x in batch.items() if len(getattr(x, "shape", ())) < 2]:
            raise UserError(f"{where}: batch {number}: {odd[0]!r} has to be an array [batch, length, ...]")
        shape = tuple(batch["inputs"].shape[:2])
        if not all(shape):
            raise UserError(f"{where}: batch {number} is empty: inputs of shape {tuple(batch['inputs'].shape)}")
        if odd := [name for name, x in batch.items() if tuple(x.shape[:2]) != shape]:
            found = tuple(batch[odd[0]].shape[:2])
            raise UserError(f"{where}: batch {number}: {odd[0]!r} has shape {found} where inputs have {shape}")
        length = length or shape[1]
        if shape[1] != length:
            raise UserError(
                f"{where}: batch {number} has sequences of {shape[1]} tokens, the first one of {length}; measure each "
                "length alone, or fill up with weights of 0"
            )
    return [dict(batch) for batch in batches]


def identity(batches: Sequence[Batch], layers: int) -> Identity:
    """What measurements were read from: the tokens that are scored, how many attention layers, how the sequences were
    cut. Places of weight 0, a begin token's among them, are not part of it.
    """
    digest = hashlib.sha256()
    for batch in batches:
        scored = _scored(batch)
        for name in sorted(batch):
            digest.update(name.encode() + np.ascontiguousarray(jax.device_get(batch[name])[scored]).tobytes())
    return {
        "tokens": digest.hexdigest(),
        "layers": layers,
        "sequences": sum(len(batch["inputs"]) for batch in batches),
        "positions": int(_scored(batches[0]).sum(1).max()),
    }


def _scored(batch: Batch) -> np.ndarray:
    """Which places of a batch count [B, T]."""
    weights = batch.get("weights")
    return np.ones(batch["inputs"].shape[:2], bool) if weights is None else np.asarray(jax.device_get(weights)) > 0
