"""What quantization knows of a model beforehand: weights rounded once, and what was read of activations in float on
calibration batches.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.evaluation.evaluator import Batch
from oasis_jax.evaluation.numerics import Named, stack_layers, unstack_layers
from oasis_jax.evaluation.passes import DecoderPass, placed_batches
from oasis_jax.evaluation.quantization.quantizers import Codes, as_matrices
from oasis_jax.evaluation.quantization.schemes import Scheme
from oasis_jax.evaluation.quantization.weights import round_table, round_weight, turned
from oasis_jax.model.decoder import final_stream
from oasis_jax.model.head import unembed
from oasis_jax.placement import Placement

MOMENTUM = 0.9  # of running ranges over calibration batches


class Recorded(NamedTuple):
    """What was seen of activations in float, by full name.

    Attributes:
      ranges: running (lowest, highest).
      channels: of a linear layer's input the largest |x| of each channel.
      products: of a linear layer's input x^T x, summed over tokens, where it was asked for.
    """

    ranges: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
    channels: dict[str, Float[Array, " D"]]
    products: dict[str, Float[Array, "D D"]]


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a Recorder reads: equal for equal ones, so that a second pass compiles nothing.

    Attributes:
      rotate: inputs of linear layers as +rotate turns them.
      skip_first: leaves the first token of every row out of the ranges.
      products: reads Recorded.products too.
    """

    rotate: bool = False
    skip_first: bool = False
    products: bool = False

    def __call__(self, factors: Mapping[str, Array] | None) -> "Recorder":
        return Recorder(self, factors)


class Recorder(Named):
    """Float numerics that record one batch; `factors` divide the inputs of linear layers before their ranges are
    taken.
    """

    materializes_attention: bool = True
    loops: bool = True

    def __init__(self, recording: Recording = Recording(), factors: Mapping[str, Array] | None = None):
        super().__init__()
        self.recording: Recording = recording
        self.factors: Mapping[str, Array] = factors or {}
        self.ranges: dict[str, tuple[Array, Array]] = {}
        self.channels: dict[str, Array] = {}
        self.products: dict[str, Array] = {}

    def layer_arrays(self, scopes: Sequence[str]) -> Any:
        return stack_layers(self.factors, scopes)

    def in_layer(self, arrays: Any) -> "Recorder":
        return Recorder(self.recording, arrays)

    @property
    def seen(self) -> Recorded:
        return Recorded(self.ranges, self.channels, self.products)

    def keep(self, scopes: Sequence[str], seen: Any) -> None:
        for own, found in zip(self.seen, seen):
            own |= unstack_layers(found, scopes)

    def einsum(self, name: str, equation: str, x: Array, weight: Array, **options: Any) -> Array:
        full = self.scope + name
        rows, _, _ = as_matrices(equation, x.astype(jnp.float32), weight)
        rows = turned(rows) if self.recording.rotate else rows
        self.channels[full] = jnp.abs(rows).max(axis=0)
        if self.recording.products:
            self.products[full] = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
        rows = rows / self.factors[full] if full in self.factors else rows
        self.tap(name, rows.reshape(-1, x.shape[1], rows.shape[-1]))
        return super().einsum(name, equation, x, weight, **options)

    def tap(self, name: str, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        if self.recording.skip_first and name != "head":
            wide = behind_first(name, wide)
        self.ranges[self.scope + name] = (wide.min(), wide.max())
        return x


def tokens_axis(name: str) -> int:
    """Which axis of an activation counts tokens, those that ask where it is attention's."""
    return 2 if name in ("scores", "probabilities") else 1


def behind_first(name: str, x: Array) -> Array:
    """An activation without a row's first token."""
    axis = tokens_axis(name)
    return jax.lax.slice_in_dim(x, 1, x.shape[axis], axis=axis)


@partial(jax.jit, static_argnames="model")
def _record(model: DecoderPass, params, batch: Batch, factors: Mapping[str, Array] | None) -> Recorded:
    batch = model.placement.ordered(batch)
    context = model.context(batch, factors)
    final, _ = final_stream(params, model.config, batch["inputs"], context, on_layer=lambda *_: (), loop=True)
    unembed(params, model.config, final, context)  # only what goes in is read: no logits are left
    found, whole = context.numerics.seen, model.placement.sharding()
    return found if whole is None else jax.lax.with_sharding_constraint(found, whole)


def calibrate(
    params: Mapping[str, Any],
    config: ModelConfig,
    placement: Placement,
    batches: Iterable[Batch],
    recording: Recording = Recording(),
    *,
    factors: Mapping[str, Array] | None = None,
) -> Recorded:
    """Ranges of activations: running minimum and maximum with momentum 0.9 over batches; channel maxima and products
    over all of them.

    Args:
      params, config, placement, batches: see `oasis_jax.evaluation.evaluate`.
      recording: what is read.
      factors: by full name of a linear layer, what its input is divided by before its range is taken.

    Raises:
      UserError: there is no batch.
    """
    model, found = DecoderPass(config, placement, recording), None
    for batch, _ in placed_batches(model, list(batches)):
        seen = _record(model, params, batch, factors)
        if found is None:
            found = seen
            continue
        ranges = jax.tree.map(lambda old, new: MOMENTUM * old + (1 - MOMENTUM) * new, found.ranges, seen.ranges)
        channels = jax.tree.map(jnp.maximum, found.channels, seen.channels)
        found = Recorded(ranges, channels, jax.tree.map(jnp.add, found.products, seen.products))
    if found is None:
        raise UserError("calibrate: there is no batch; give at least one")
    return found


class Calibration(NamedTuple):
    """What a scheme knows of a model beforehand, by full name; with what it lacks, ranges apart, it does as it runs.

    Attributes:
      ranges: running (lowest, highest) of activations, where the scheme is static.
      factors: what a linear layer's input is divided by and its weight was multiplied with.
      weights: the codes [G, g, M] of linear layers and the embedding's [V, D], rounded once.
    """

    ranges: Mapping[str, tuple[Float[Array, ""], Float[Array, ""]]] = {}
    factors: Mapping[str, Float[Array, " D"]] = {}
    weights: Mapping[str, Codes] = {}


class Rounder(Named):
    """Float numerics that round every weight they meet, from what was recorded of its input."""

    loops = True

    def __init__(self, scheme: Scheme, recorded: Recorded):
        super().__init__()
        self.scheme, self.recorded = scheme, recorded
        self.factors, self.weights = {}, {}

    def layer_arrays(self, scopes: Sequence[str]) -> Any:
        return Recorded(*(stack_layers(values, scopes) for values in self.recorded))

    def in_layer(self, arrays: Any) -> "Recorder":
        return Rounder(self.scheme, arrays)

    @property
    def seen(self) -> Recorded:
        return Calibration({}, self.factors, self.weights)

    def keep(self, scopes: Sequence[str], seen: Any) -> None:
        self.factors |= unstack_layers(seen.factors, scopes)
        self.weights |= unstack_layers(seen.weights, scopes)

    def einsum(self, name: str, equation: str, x: Array, weight: Array, **options: Any) -> Array:
        full, scheme, recorded = self.scope + name, self.scheme, self.recorded
        if not (name == "head" and scheme.float_head):
            _, columns, _ = as_matrices(equation, x, weight.astype(jnp.float32))
            found = round_weight(scheme, columns, recorded.channels.get(full), recorded.products.get(full))
            self.factors |= {} if found.factors is None else {full: found.factors}
            self.weights |= {} if found.codes is None else {full: found.codes}
        return super().einsum(name, equation, x, weight, **options)

    def lookup(self, name: str, table: Array, ids: Array) -> Array:
        if self.scheme.everywhere:
            self.weights[f"{self.scope}{name}"] = round_table(self.scheme, table)
        return super().lookup(name, table, ids)


@dataclasses.dataclass(frozen=True)
class _Rounding:
    """Makes a Rounder; equal for equal schemes."""

    scheme: Scheme

    def __call__(self, recorded: Recorded) -> Rounder:
        return Rounder(self.scheme, recorded)


@partial(jax.jit, static_argnames="model")
def _round(model: DecoderPass, params, recorded: Recorded) -> Calibration:
    """A pass over as few tokens as a mesh divides, for the weights that it meets."""
    config, ways = model.config, model.placement.ways
    # The zigzag order gives every device two parts of a text.
    rows, length = ways("batch"), math.lcm(ways("stream"), 2 * ways("length"))
    tokens = jnp.zeros((rows, length), jnp.int32)
    inputs = tokens if config.inputs == "tokens" else jnp.zeros((rows, length, config.vector_dim), config.dtype)
    context = model.context({}, recorded)
    final, _ = final_stream(params, config, inputs, context, on_layer=lambda *_: (), loop=True)
    unembed(params, config, final, context)
    return context.numerics.seen


def calibration_for(
    scheme: Scheme, params: Mapping[str, Any], config: ModelConfig, placement: Placement, batches: Iterable[Batch]
) -> Calibration:
    """All that a scheme knows of a model beforehand: its weights, rounded once, and, from `batches`, factors and ranges
    where it needs them.

    GPTQ and AWQ read x^T x of every linear layer, 4 D^2 bytes each, at once and of the float model.

    Raises:
      UserError: the scheme reads calibration batches and there are none.
    """
    batches, recorded = list(batches) if scheme.calibrated else [], Recorded({}, {}, {})
    if scheme.reads_inputs:
        recording = Recording(rotate=scheme.rotate, products=scheme.gptq or scheme.awq)
        recorded = calibrate(params, config, placement, batches, recording)
    found = _round(DecoderPass(config, placement, _Rounding(scheme)), params, recorded)
    if scheme.static:
        recording = Recording(rotate=scheme.rotate, skip_first=scheme.sink_float)
        ranges = calibrate(params, config, placement, batches, recording, factors=found.factors).ranges
        found = found._replace(ranges=ranges)
    return found
