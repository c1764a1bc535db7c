"""Quantization schemes of the literature as numerics of a model, and what they cost in perplexity.

`calibrate` reads activations in float; `Quantized(scheme, calibration)` is then a `Numerics` that any model takes.
"""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from oasis_jax.errors import UserError, unknown_name
from oasis_jax.evaluation.bootstrap import Estimate, intervals
from oasis_jax.evaluation.evaluator import Batch, Reading
from oasis_jax.evaluation.measures.perplexity import PERPLEXITY
from oasis_jax.evaluation.quantization.quantizers import (
    Codes,
    Format,
    as_matrices,
    asymmetric,
    grouped,
    integer_product,
    product,
    symmetric,
    symmetric_mse,
)
from oasis_jax.model.numerics import FLOAT, Numerics

MOMENTUM = 0.9  # of running ranges over calibration batches
SMOOTHING = 0.5  # SmoothQuant's alpha (arXiv 2211.10438)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What is rounded, and how.

    Attributes:
      weights: format of the weights of linear layers, symmetric.
      activations: format of the inputs of linear layers; None: they stay as they are.
      group: how many terms of the contraction share a scale; 0: all.
      per_tensor: one scale a tensor, activations asymmetric with running ranges from calibration, and also the
        embedding table, attention scores, probabilities, context, residual sums and depth mixtures (the reference of
        arXiv 2605.17887, after arXiv 2306.12929). Else weights have a scale per output channel, activations one per
        token, taken as they come.
      mse, smooth, float_head, integer: the options of `OPTIONS`.
    """

    weights: Format
    activations: Format | None
    group: int = 0
    per_tensor: bool = False
    mse: bool = False
    smooth: bool = False
    float_head: bool = False
    integer: bool = False


SCHEMES = {
    "w8a8_tensor": Scheme(Format(8), Format(8), per_tensor=True),
    "w8a8": Scheme(Format(8), Format(8)),
    "w6a6": Scheme(Format(6), Format(6)),
    "w4a8": Scheme(Format(4), Format(8)),
    "w4a4_g32": Scheme(Format(4), Format(4), group=32),
    "w4a4_g128": Scheme(Format(4), Format(4), group=128),
    "w4a16_g128": Scheme(Format(4), None, group=128),
    "fp8": Scheme(Format(8, floating=True), Format(8, floating=True)),
}
# The fields of Scheme that "scheme+option" sets.
OPTIONS = {
    "mse": "weights are clipped to the range of 100 that has the least squared error",
    "smooth": "SmoothQuant on every linear layer, which divides its input by its factors as it runs; with calibration",
    "float_head": "the head stays in float",
    "integer": "products of linear layers on the codes themselves, int8 or E4M3, in place of simulated ones",
}


def parse_scheme(text: str) -> Scheme:
    """'w8a8_tensor+mse+float_head' as a Scheme; raises UserError for a name there is not, and for an option
    that has no meaning.
    """
    name, *options = text.split("+")
    if name not in SCHEMES:
        raise unknown_name("--quantize", name, SCHEMES)
    for option in options:
        if option not in OPTIONS:
            raise unknown_name(f"--quantize: option of {name}", option, OPTIONS)
    scheme = dataclasses.replace(SCHEMES[name], **dict.fromkeys(options, True))
    if scheme.integer and scheme.activations is None:
        raise UserError(
            f"--quantize: {text}: activations stay in float, so there is no integer product; leave out +integer"
        )
    return scheme


def parse_schemes(names: Sequence[str]) -> dict[str, Scheme]:
    """Schemes by name; raises UserError for one there is not or one given twice."""
    if repeated := [name for index, name in enumerate(names) if name in names[:index]]:
        raise UserError(f"--quantize: {repeated[0]!r} is given twice")
    return {name: parse_scheme(name) for name in names}


# Calibration


class Calibration(NamedTuple):
    """What was seen of activations, by full name: running (lowest, highest), and largest |x| of each channel of a
    layer's input.
    """

    ranges: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
    channels: dict[str, Float[Array, " D"]]


class _Named(Numerics):
    """Numerics that know the full names of what they see."""

    def __init__(self):
        self.scope = ""

    def within(self, scope: str) -> "_Named":
        part = copy.copy(self)
        part.scope = f"{self.scope}{scope}."
        return part


def smoothing_factors(channels: Float[Array, " D"], weight: Float[Array, "D M"]) -> Float[Array, " D"]:
    """SmoothQuant (arXiv 2211.10438, eq. 4): what a layer's input is divided by and its weight multiplied by, per
    channel.
    """
    largest = jnp.abs(weight).max(axis=1)
    factors = channels**SMOOTHING / jnp.where(largest > 0, largest, 1.0) ** (1 - SMOOTHING)
    return jnp.where((channels > 0) & (largest > 0), factors, 1.0)


class Recorder(_Named):
    """Float numerics that record one batch's ranges, those of linear layers after smoothing where `channels`
    are given.
    """

    materializes_attention = True

    def __init__(self, channels: Mapping[str, Array] | None = None):
        super().__init__()
        self.smoothed = channels
        self.ranges, self.channels = {}, {}

    def einsum(self, name, equation, x, weight, **options):
        rows, columns, _ = as_matrices(equation, x.astype(jnp.float32), weight.astype(jnp.float32))
        self.channels[self.scope + name] = jnp.abs(rows).max(axis=0)
        if self.smoothed is not None:
            rows = rows / smoothing_factors(self.smoothed[self.scope + name], columns)
        self.tap(name, rows)
        return super().einsum(name, equation, x, weight, **options)

    def tap(self, name, x):
        wide = x.astype(jnp.float32)
        self.ranges[self.scope + name] = (wide.min(), wide.max())
        return x


@partial(jax.jit, static_argnames="graphdef")
def _record(graphdef, state, batch, channels) -> Calibration:
    recorder = Recorder(channels)
    nnx.merge(graphdef, state)(batch["inputs"], segment_ids=batch.get("segment_ids"), numerics=recorder)
    return Calibration(recorder.ranges, recorder.channels)


def calibrate(
    model: nnx.Module, batches: Iterable[Batch], *, channels: Mapping[str, Array] | None = None
) -> Calibration:
    """Ranges of activations: running minimum and maximum with momentum 0.9 over batches; channel maxima over all of
    them.

    Args:
      model: takes `numerics`, as an `oasis_jax.model.decoder.Decoder` does.
      batches: as for `evaluate_model`; at least one.
      channels: of an earlier calibration, to record the ranges of inputs smoothed with them (SmoothQuant).

    Raises:
      ValueError: there is no batch.
    """
    graphdef, state = nnx.split(model)
    found = None
    for batch in batches:
        seen = _record(graphdef, state, dict(batch), channels)
        if found is None:
            found = seen
            continue
        ranges = jax.tree.map(lambda old, new: MOMENTUM * old + (1 - MOMENTUM) * new, found.ranges, seen.ranges)
        found = Calibration(ranges, jax.tree.map(jnp.maximum, found.channels, seen.channels))
    if found is None:
        raise ValueError("calibrate: batches is empty; give at least one")
    return found


def calibration_for(scheme: Scheme, model: nnx.Module, batches: Sequence[Batch]) -> Calibration:
    """What a scheme needs to know: nothing, or ranges, of smoothed inputs where it smooths."""
    if not (scheme.per_tensor or scheme.smooth):
        return Calibration({}, {})
    found = calibrate(model, batches)
    return calibrate(model, batches, channels=found.channels) if scheme.per_tensor and scheme.smooth else found


# Inference


class Quantized(_Named):
    """The numerics of a scheme; `records` maps the full name of every tensor seen to how it was rounded."""

    def __init__(self, scheme: Scheme, calibration: Calibration):
        super().__init__()
        self.scheme, self.calibration = scheme, calibration
        self.materializes_attention = scheme.per_tensor
        self.records: dict[str, str] = {}

    def _record(self, name: str, text: str) -> None:
        self.records[self.scope + name] = text

    def _weight(self, weight: Float[Array, "G g M"]) -> Codes:
        scheme = self.scheme
        return (symmetric_mse if scheme.mse else symmetric)(weight, scheme.weights, None if scheme.per_tensor else (1,))

    def _activation(self, name: str, x: Array) -> Codes:
        """Static with one range, or dynamic: a scale per token and group."""
        if self.scheme.per_tensor:
            return asymmetric(x, self.scheme.activations.bits, *self.calibration.ranges[self.scope + name])
        return symmetric(x, self.scheme.activations, (2,))

    def einsum(self, name, equation, x, weight, **options):
        scheme = self.scheme
        if name == "head" and scheme.float_head:
            self._record(name, "float, by option")
            return super().einsum(name, equation, x, weight, **options)
        self._record(name, describe(scheme))
        rows, columns, shape = as_matrices(equation, x, weight.astype(jnp.float32))
        if scheme.smooth:
            factors = smoothing_factors(self.calibration.channels[self.scope + name], columns)
            rows, columns = rows / factors, columns * factors[:, None]
        rows, codes = (
            grouped(rows.astype(jnp.float32), 1, scheme.group),
            self._weight(grouped(columns, 0, scheme.group)),
        )
        if scheme.activations is None:
            y = jnp.einsum("RGD,GDM->RM", rows, codes.values(), precision=jax.lax.Precision.HIGHEST)
        else:
            y = (integer_product if scheme.integer else product)(self._activation(name, rows), codes)
        return y.reshape(shape).astype(options.get("preferred_element_type") or x.dtype)

    def lookup(self, name, table, ids):
        if not self.scheme.per_tensor:
            self._record(name, "float")
            return super().lookup(name, table, ids)
        self._record(name, f"{self.scheme.weights}, one scale a tensor")
        return self._weight(table).values().astype(table.dtype)[ids]

    def tap(self, name, x):
        if not self.scheme.per_tensor:
            self._record(name, "float")
            return x
        self._record(name, f"{self.scheme.activations}, one scale and zero point a tensor, from calibration")
        return self._activation(name, x).values().astype(x.dtype)


def describe(scheme: Scheme) -> str:
    """How a linear layer is computed, in words."""
    group = f" and group of {scheme.group}" if scheme.group else ""
    fit = "least squared error of 100 ranges" if scheme.mse else "min-max"
    weight = (
        f"weight {scheme.weights}, "
        f"{'one scale a tensor' if scheme.per_tensor else f'a scale per output channel{group}'}, {fit}"
    )
    if scheme.activations is None:
        inputs = "input in float"
    elif scheme.per_tensor:
        inputs = f"input {scheme.activations}, one scale and zero point a tensor, from calibration"
    else:
        inputs = f"input {scheme.activations}, a scale per token{group}, as it comes"
    sums = "float32" if scheme.weights.floating or scheme.activations is None else "int32"
    kind = f"product on the codes, {sums} sums" if scheme.integer else "product simulated in float32"
    return f"{weight}; {inputs}{'; smoothed' if scheme.smooth else ''}; {kind}"


ALWAYS_FLOAT = (
    "norms and gatednorm's gate",
    "rotary positions",
    "the normalizer itself: exponentials, their sum, the null logit and the null mass",
    "sigmoid gates, SiLU and their products",
    "the scores, bias, evidence and weights of depth routers",
)


@partial(jax.jit, static_argnames=("graphdef", "scheme"))
def _losses(graphdef, state, batch, scheme: Scheme | None, calibration: Calibration) -> dict[str, Array]:
    model = nnx.merge(graphdef, state)
    numerics = FLOAT if scheme is None else Quantized(scheme, calibration)
    outputs, statistics = model(batch["inputs"], segment_ids=batch.get("segment_ids"), numerics=numerics)
    rows = PERPLEXITY.read(Reading(batch, outputs, statistics, model.config))
    return {"loss": rows["nats" if model.config.inputs == "tokens" else "squared_error"], "weight": rows["weight"]}


def losses(
    model: nnx.Module, batches: Sequence[Batch], scheme: Scheme | None, calibration: Calibration
) -> dict[str, np.ndarray]:
    """Per sequence the summed "loss" (nats, or squared error of vectors) and its "weight", under a scheme; None: in
    float.
    """
    graphdef, state = nnx.split(model)
    rows = [jax.device_get(_losses(graphdef, state, dict(batch), scheme, calibration)) for batch in batches]
    return {name: np.concatenate([np.asarray(part[name], np.float64) for part in rows]) for name in rows[0]}


def rounded_tensors(model: nnx.Module, batch: Batch, scheme: Scheme) -> dict[str, str]:
    """Full name of every tensor that a scheme meets -> how it is rounded; nothing is computed."""
    graphdef, state = nnx.split(model)
    records = {}

    def run(state, inputs, calibration):
        numerics = Quantized(scheme, calibration)
        records.clear()
        nnx.merge(graphdef, state)(inputs, numerics=numerics)
        records.update(numerics.records)

    def recorded(state, inputs):
        recorder = Recorder()
        nnx.merge(graphdef, state)(inputs, numerics=recorder)
        return Calibration(recorder.ranges, recorder.channels)

    jax.eval_shape(run, state, batch["inputs"], jax.eval_shape(recorded, state, batch["inputs"]))
    return records


def quantization(
    model: nnx.Module, batches: Sequence[Batch], calibration_batches: Sequence[Batch], schemes: Mapping[str, Scheme]
) -> dict[str, dict]:
    """Every scheme beside float on the same batches.

    Args:
      model: an `oasis_jax.model.decoder.Decoder`, or a module that takes `numerics` likewise.
      batches: held-out, as for `evaluate_model`.
      calibration_batches: of training data; read by w8a8_tensor and with +smooth.
      schemes: by name, as `parse_schemes` gives them.

    Returns:
      Name -> {"value": perplexity, or the squared error of vectors; "float": the same in float; "relative_change":
      value / float - 1;
      "interval": of the relative change, as `bootstrap.DESCRIPTION` says, paired by sequence;
      "samples"; "tensors": as `rounded_tensors`}.
    """
    base = losses(model, batches, None, Calibration({}, {}))
    found = {}
    for name, scheme in schemes.items():
        rows = losses(model, batches, scheme, calibration_for(scheme, model, calibration_batches))
        tensors = rounded_tensors(model, batches[0], scheme)
        found[name] = beside_float(rows, base, perplexity=model.config.inputs == "tokens") | {"tensors": tensors}
    return found


def beside_float(rows: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], *, perplexity: bool) -> dict:
    """Value, float value and relative change with its interval, from per-sequence sums of losses and weights."""
    loss, before = (float(part["loss"].sum() / part["weight"].sum()) for part in (rows, base))

    def relative(means: Float[np.ndarray, "*draws 2"]) -> Float[np.ndarray, "*draws"]:
        with np.errstate(over="ignore"):
            return np.expm1(means[..., 0] - means[..., 1]) if perplexity else means[..., 0] / means[..., 1] - 1

    pair = Estimate(np.stack([rows["loss"], base["loss"]], 1), rows["weight"][:, None], relative)
    interval = intervals({"": pair})[""]
    with np.errstate(over="ignore"):
        value, plain = (float(np.exp(x)) if perplexity else x for x in (loss, before))
    return {
        "value": value,
        "float": plain,
        "relative_change": pair.value,
        "interval": interval and list(interval),
        "samples": {"sequences": len(rows["loss"])},
    }
