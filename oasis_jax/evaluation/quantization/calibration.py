"""What quantization has to know of activations beforehand, read in float on calibration batches."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation.evaluator import Batch
from oasis_jax.evaluation.numerics import Named, stack_layers, unstack_layers
from oasis_jax.evaluation.passes import DecoderPass, placed_batches
from oasis_jax.evaluation.quantization.quantizers import as_matrices
from oasis_jax.evaluation.quantization.schemes import Scheme
from oasis_jax.model.decoder import final_stream
from oasis_jax.model.head import unembed
from oasis_jax.placement import Placement

MOMENTUM = 0.9  # of running ranges over calibration batches
SMOOTHING = 0.5  # SmoothQuant's alpha (arXiv 2211.10438)


class Calibration(NamedTuple):
    """What was seen of activations, by full name: running (lowest, highest), and largest |x| of each channel of a
    layer's input.
    """

    ranges: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
    channels: dict[str, Float[Array, " D"]]


def smoothing_factors(channels: Float[Array, " D"], weight: Float[Array, "D M"]) -> Float[Array, " D"]:
    """SmoothQuant (arXiv 2211.10438, eq. 4): what a layer's input is divided by and its weight multiplied by, per
    channel.
    """
    largest = jnp.abs(weight).max(axis=1)
    factors = channels**SMOOTHING / jnp.where(largest > 0, largest, 1.0) ** (1 - SMOOTHING)
    return jnp.where((channels > 0) & (largest > 0), factors, 1.0)


class Recorder(Named):
    """Float numerics that record one batch's ranges, those of linear layers after smoothing where `channels`
    are given.
    """

    materializes_attention, loops = True, True
    skips_first = False  # of every row, for the ranges

    def __init__(self, channels: Mapping[str, Array] | None = None):
        super().__init__()
        self.smoothed = channels
        self.ranges, self.channels = {}, {}

    def layer_arrays(self, scopes):
        return None if self.smoothed is None else stack_layers(self.smoothed, scopes)

    def in_layer(self, arrays):
        return type(self)(arrays)

    @property
    def seen(self):
        return Calibration(self.ranges, self.channels)

    def keep(self, scopes, seen):
        self.ranges |= unstack_layers(seen.ranges, scopes)
        self.channels |= unstack_layers(seen.channels, scopes)

    def einsum(self, name, equation, x, weight, **options):
        rows, columns, _ = as_matrices(equation, x.astype(jnp.float32), weight.astype(jnp.float32))
        self.channels[self.scope + name] = jnp.abs(rows).max(axis=0)
        if self.smoothed is not None:
            rows = rows / smoothing_factors(self.smoothed[self.scope + name], columns)
        self.tap(name, rows.reshape(-1, x.shape[1], rows.shape[-1]))
        return super().einsum(name, equation, x, weight, **options)

    def tap(self, name, x):
        wide = x.astype(jnp.float32)
        if self.skips_first and name != "head":
            wide = behind_first(name, wide)
        self.ranges[self.scope + name] = (wide.min(), wide.max())
        return x


class RecorderBehindFirst(Recorder):
    """A Recorder that leaves the first token of every row out of the ranges."""

    skips_first = True


def tokens_axis(name: str) -> int:
    """Which axis of an activation counts tokens, those that ask where it is attention's."""
    return 2 if name in ("scores", "probabilities") else 1


def behind_first(name: str, x: Array) -> Array:
    """An activation without a row's first token."""
    axis = tokens_axis(name)
    return jax.lax.slice_in_dim(x, 1, x.shape[axis], axis=axis)


@partial(jax.jit, static_argnames="model")
def _record(model: DecoderPass, params, batch: Batch, channels: Mapping[str, Array] | None) -> Calibration:
    batch = model.placement.ordered(batch)
    context = model.context(batch, channels)
    final, _ = final_stream(params, model.config, batch["inputs"], context, on_layer=lambda *_: (), loop=True)
    unembed(params, model.config, final, context)  # only what goes in is read: no logits are left
    found = Calibration(context.numerics.ranges, context.numerics.channels)
    whole = model.placement.sharding()
    return found if whole is None else jax.lax.with_sharding_constraint(found, whole)


def calibrate(
    params: Mapping[str, Any],
    config: ModelConfig,
    placement: Placement,
    batches: Iterable[Batch],
    *,
    channels: Mapping[str, Array] | None = None,
    skip_first: bool = False,
) -> Calibration:
    """Ranges of activations: running minimum and maximum with momentum 0.9 over batches; channel maxima over all of
    them.

    Args:
      params, config, placement, batches: see `oasis_jax.evaluation.evaluate`.
      channels: of an earlier calibration, to record the ranges of inputs smoothed with them (SmoothQuant).
      skip_first: leave the first token of every row out.

    Raises:
      ValueError: there is no batch.
    """
    model, found = DecoderPass(config, placement, RecorderBehindFirst if skip_first else Recorder), None
    for batch, _ in placed_batches(model, list(batches)):
        seen = _record(model, params, batch, channels)
        if found is None:
            found = seen
            continue
        ranges = jax.tree.map(lambda old, new: MOMENTUM * old + (1 - MOMENTUM) * new, found.ranges, seen.ranges)
        found = Calibration(ranges, jax.tree.map(jnp.maximum, found.channels, seen.channels))
    if found is None:
        raise ValueError("calibrate: batches is empty; give at least one")
    return found


def calibration_for(
    scheme: Scheme, params: Mapping[str, Any], config: ModelConfig, placement: Placement, batches: Iterable[Batch]
) -> Calibration:
    """What a scheme needs to know: nothing, or ranges, of smoothed inputs where it smooths; see `calibrate`."""
    if not (scheme.static or scheme.smooth):
        return Calibration({}, {})
    batches, found = list(batches), None
    if scheme.smooth:
        found = calibrate(params, config, placement, batches)
    if scheme.static:
        channels = found and found.channels
        found = calibrate(params, config, placement, batches, channels=channels, skip_first=scheme.sink_float)
    return found
