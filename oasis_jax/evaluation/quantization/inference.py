"""Inference under a quantization scheme, and what it costs in perplexity.

`Quantized(scheme, calibration)` is a `Numerics` that any model takes. Parameters stay float where they lie; their codes
are part of the calibration.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError, unknown_name
from oasis_jax.evaluation.bootstrap import Estimate, intervals
from oasis_jax.evaluation.evaluator import Batch
from oasis_jax.evaluation.measures.perplexity import PERPLEXITY
from oasis_jax.evaluation.numerics import Named, stack_layers
from oasis_jax.evaluation.passes import DecoderPass, collect
from oasis_jax.evaluation.quantization.calibration import (
    Calibration,
    Recorder,
    Recording,
    Rounder,
    behind_first,
    calibration_for,
    tokens_axis,
)
from oasis_jax.evaluation.quantization.quantizers import (
    Codes,
    as_matrices,
    asymmetric,
    grouped,
    integer_product,
    product,
    symmetric,
)
from oasis_jax.evaluation.quantization.schemes import (
    SCHEMES,
    Scheme,
    describe,
    describe_activation,
    parse_scheme,
)
from oasis_jax.evaluation.quantization.weights import Rounded, round_table, round_weight, turned
from oasis_jax.model.context import Context
from oasis_jax.model.decoder import forward, parameter_roles
from oasis_jax.model.wiring import schedule
from oasis_jax.placement import Placement
from oasis_jax.pretrained.load import Pretrained


class Quantized(Named):
    """The numerics of a scheme; `records` maps the full name of every tensor seen to how it was rounded.

    A pytree: the arrays of its calibration are leaves. Without a calibration weights are rounded as they are used.
    """

    def __init__(self, scheme: Scheme, calibration: Calibration | None = None):
        super().__init__()
        if not isinstance(scheme, Scheme):
            raise UserError(f"scheme: expected a Scheme, as parse_scheme('w8a8') makes it, got {scheme!r}")
        self.scheme: Scheme = scheme
        self.calibration: Calibration = calibration or Calibration()
        self.materializes_attention: bool = scheme.everywhere
        self.loops: bool = not scheme.site.startswith("layer")  # a loop does not tell layers apart
        self.records: dict[str, str] = {}

    def layer_arrays(self, scopes: Sequence[str]) -> Any:
        return Calibration(*(stack_layers(values, scopes) for values in self.calibration))

    def in_layer(self, arrays: Any) -> "Quantized":
        return Quantized(self.scheme, arrays)

    def _record(self, name: str, text: str) -> None:
        self.records[self.scope + name] = text

    def _left_out(self, name: str) -> bool:
        return not self.scheme.rounds(self.scope + name)

    def _range(self, name: str, seen: Array) -> tuple[Array, Array]:
        """Of a whole tensor: from calibration, or that of what is seen of it."""
        if not self.scheme.static:
            return seen.min(), seen.max()
        if self.scope + name not in self.calibration.ranges:
            raise UserError(
                f"quantization: the scheme takes the range of {self.scope + name} from calibration, which has none of "
                "it; see calibration_for"
            )
        return self.calibration.ranges[self.scope + name]

    def _activation(self, name: str, rows: Float[Array, "R G g"], length: int) -> Codes:
        """The input of a linear layer, rows of T tokens each: one range, or a scale per token and group."""
        scheme = self.scheme
        if scheme.per_tensor:
            seen = rows
            if self._keeps_first(name) and not scheme.static:
                seen = behind_first("", rows.reshape(-1, length, *rows.shape[1:]))
            return asymmetric(rows, scheme.activations.bits, *self._range(name, seen))
        whole = None
        if scheme.scales == "e4m3":
            low, high = self._range(name, rows)
            whole = jnp.maximum(-low, high)
        return symmetric(rows, scheme.activations, (2,), clip=scheme.clip, scales=scheme.scales, whole=whole)

    def _keeps_first(self, name: str) -> bool:
        return self.scheme.sink_float and name != "head"  # whose rows may be any part of the positions

    def _weight(self, name: str, columns: Float[Array, "D M"]) -> Rounded:
        full, scheme = self.scope + name, self.scheme
        factors = self.calibration.factors.get(full)
        if full in self.calibration.weights or (scheme.weights is None and factors is not None):
            return Rounded(self.calibration.weights.get(full), factors)
        if missing := [option for option in ("gptq", "awq", "smooth") if getattr(scheme, option)]:
            raise UserError(
                f"quantization: +{missing[0]} needs a calibration that has seen {full}, and this one has not; "
                "see calibration_for"
            )
        return round_weight(scheme, columns.astype(jnp.float32))

    def einsum(self, name: str, equation: str, x: Array, weight: Array, **options: Any) -> Array:
        scheme = self.scheme
        if self._left_out(name) or (name == "head" and scheme.float_head):
            self._record(name, "float, by option")
            return super().einsum(name, equation, x, weight, **options)
        self._record(name, describe(scheme))
        rows, columns, shape = as_matrices(equation, x, weight)
        codes, factors = self._weight(name, columns)
        rows = rows.astype(jnp.float32)
        if scheme.rotate:
            rows, columns = turned(rows), turned(columns.astype(jnp.float32).T).T
        rows = rows if factors is None else rows / factors
        rows = grouped(rows, 1, scheme.group)
        if scheme.integer:
            y = integer_product(self._activation(name, rows, x.shape[1]), codes)
        else:
            if scheme.activations is not None:
                values = self._activation(name, rows, x.shape[1]).values()
                first = jnp.arange(len(rows)) % x.shape[1] == 0
                rows = jnp.where(first[:, None, None], rows, values) if self._keeps_first(name) else values
            y = product(rows, self._float_columns(columns, factors) if codes is None else codes.values())
        return y.reshape(shape).astype(options.get("preferred_element_type") or x.dtype)

    def _float_columns(self, columns: Float[Array, "D M"], factors: Float[Array, " D"] | None) -> Array:
        columns = columns.astype(jnp.float32)
        return grouped(columns if factors is None else columns * factors[:, None], 0, self.scheme.group)

    def lookup(self, name: str, table: Array, ids: Array) -> Array:
        scheme = self.scheme
        if not scheme.everywhere or self._left_out(name):
            self._record(name, "float")
            return super().lookup(name, table, ids)
        self._record(name, f"{scheme.weights}, one scale a tensor")
        codes = self.calibration.weights.get(self.scope + name) or round_table(scheme, table)
        return codes._replace(codes=codes.codes[ids]).values().astype(table.dtype)

    def tap(self, name: str, x: Array) -> Array:
        if not self.scheme.everywhere or self._left_out(name):
            self._record(name, "float")
            return x
        self._record(name, describe_activation(self.scheme))
        seen = behind_first(name, x) if self._keeps_first(name) else x
        rounded = asymmetric(x, self.scheme.activations.bits, *self._range(name, seen)).values().astype(x.dtype)
        if not self._keeps_first(name):
            return rounded
        axis = tokens_axis(name)
        return jnp.concatenate([jax.lax.slice_in_dim(x, 0, 1, axis=axis), behind_first(name, rounded)], axis)


def _unflatten(static: tuple[Scheme, str], arrays: tuple[Calibration]) -> Quantized:
    numerics = Quantized(static[0], *arrays)
    numerics.scope = static[1]
    return numerics


jax.tree_util.register_pytree_node(Quantized, lambda x: ((x.calibration,), (x.scheme, x.scope)), _unflatten)


def check_texts(scheme: str) -> Scheme:
    """The scheme of a name; raises UserError for one under which no text is made, see `quantized`."""
    parsed = parse_scheme(scheme)
    if parsed.per_tensor and not parsed.static:
        raise UserError(
            f"--quantize: {scheme} takes ranges of a whole batch, so that a text would depend on its neighbours; take "
            f"one with ranges from calibration: {', '.join(name for name, x in SCHEMES.items() if x.static)}"
        )
    if parsed.sink_float:
        raise UserError(f"--quantize: {scheme}: which token is a text's first is not known here; leave out +sink_float")
    return parsed


def quantized(model: Pretrained, scheme: str, calibration_batches: Iterable[Batch] = ()) -> Pretrained:
    """The model as it makes and scores text under a scheme; its weights are rounded here, once.

    Args:
      scheme: by name, such as "w4a4_g32" or "w8a8+smooth".
      calibration_batches: see `calibration_for` and `oasis_jax.evaluation.subjects.calibration_batches`.

    Raises:
      UserError: no such scheme; one whose ranges are of a whole batch, under which what a text gets depends on what it
        is computed with; +sink_float, which only whole texts have; a site that the model does not have.
    """
    parsed = check_texts(scheme)
    if parsed.site:
        check_site(
            scheme, parsed, rounded_tensors(model.params, model.config, {"inputs": np.zeros((1, 2), int)}, parsed)
        )
    calibration = calibration_for(parsed, model.params, model.config, model.placement, calibration_batches)
    numerics = Quantized(parsed, calibration)
    return model.changed(model.config, model.params, f"quantized: {scheme}", numerics=numerics)


@dataclasses.dataclass(frozen=True)
class _WithScheme:
    """Makes the numerics of a pass from a calibration; equal for equal schemes."""

    scheme: Scheme

    def __call__(self, calibration: Calibration) -> Quantized:
        return Quantized(self.scheme, calibration)


def losses(
    params: Mapping[str, Any],
    config: ModelConfig,
    placement: Placement,
    batches: Sequence[Batch],
    scheme: Scheme | None = None,
    calibration: Calibration | None = None,
) -> dict[str, np.ndarray]:
    """Per sequence the summed "loss" (nats, or squared error of vectors) and its "weight", under a scheme; None: in
    float.
    """
    if scheme and scheme.sink_float and any("segment_ids" in batch for batch in batches):
        raise UserError(
            "--quantize: +sink_float leaves a row's first token out, but rows of these data hold several texts"
        )
    model = DecoderPass(config, placement, scheme and _WithScheme(scheme))
    ((rows,), _) = collect(model, params, batches, (PERPLEXITY,), calibration)
    return {"loss": rows["nats" if config.inputs == "tokens" else "squared_error"], "weight": rows["weight"]}


DESTROYED = 10.0  # times float's perplexity: a model that is no model any more
ALWAYS_FLOAT = (
    "norms and gatednorm's gate",
    "rotary positions",
    "the normalizer itself: exponentials, their sum, the null logit and the null mass",
    "sigmoid gates, SiLU and their products, affine scaling and its mean of values",
    "the scores, bias, evidence and weights of depth routers",
)


def tensor_roles(config: ModelConfig) -> dict[str, str]:
    """Full name of every parameter, as numerics see it -> its role."""
    roles = parameter_roles(config)
    groups = {f"layer{i}.": roles["layers"] for i in range(config.num_layers)} | {
        "final_norm.": roles.get("final_norm", {})
    }
    groups |= {f"{name}.router.": roles.get("routers", {}) for name in schedule(config).routers}
    found = {"embedding": roles["embedding"]["table"]}
    found |= {f"embedding.{name}": role for name, role in roles["embedding"].items() if name != "table"}
    for scope, group in groups.items():
        for path, role in jax.tree_util.tree_leaves_with_path(group):
            found[scope + ".".join(key.key for key in path)] = role
    return found | ({"head": roles["head"]["kernel"]} if "head" in roles else {})


def rounded_tensors(params: Mapping[str, Any], config: ModelConfig, batch: Batch, scheme: Scheme) -> dict[str, str]:
    """Full name of every parameter, and of every activation that a scheme meets -> how it is rounded; nothing is
    computed.
    """
    records = {}

    def recorded(params, inputs) -> Calibration:
        recorder = Recorder(Recording(products=True))
        forward(params, config, inputs, Context(numerics=recorder))
        rounder = Rounder(scheme, recorder.seen)
        forward(params, config, inputs, Context(numerics=rounder))
        return rounder.seen._replace(ranges=recorder.ranges)

    def run(params, inputs, calibration):
        numerics = Quantized(scheme, calibration)
        forward(params, config, inputs, Context(numerics=numerics))
        records.update(numerics.records)

    inputs = jax.ShapeDtypeStruct(batch["inputs"].shape, batch["inputs"].dtype)
    jax.eval_shape(run, params, inputs, jax.eval_shape(recorded, params, inputs))
    kept = {name: f"float: {role}" for name, role in tensor_roles(config).items() if name not in records}
    return records | kept


def check_site(text: str, scheme: Scheme, tensors: Mapping[str, str]) -> None:
    """Raises UserError where a scheme rounds nothing at its site, or there is none of this name.

    Args:
      text: what the scheme was called.
      tensors: as `rounded_tensors` says.
    """
    if any(scheme.rounds(name) and not how.startswith("float") for name, how in tensors.items()):
        return
    places = {name.split(".", 1)[1] if name.startswith("layer") else name for name in tensors}
    if any(map(scheme.rounds, tensors)):
        raise UserError(f"--quantize: {text}: nothing at {scheme.site} is rounded by this scheme")
    raise unknown_name(f"--quantize: site of {text}", scheme.site, sorted(places))


def quantization(
    params: Mapping[str, Any],
    config: ModelConfig,
    placement: Placement,
    batches: Iterable[Batch],
    calibration_batches: Iterable[Batch],
    schemes: Mapping[str, Scheme],
    base: Mapping[str, np.ndarray] | None = None,
) -> dict[str, dict[str, Any]]:
    """Every scheme beside float on the same batches.

    Args:
      params, config, placement, batches: see `oasis_jax.evaluation.evaluate`; batches have targets.
      calibration_batches: of training data; read by schemes with static ranges and with +smooth, +awq and +gptq.
      schemes: by name, as `parse_schemes` gives them.
      base: what `losses` gives in float, where it is known.

    Returns:
      Name -> {"value": perplexity, or the squared error of vectors; "float": the same in float; "relative_change":
      value / float - 1;
      "interval": of the relative change, as `bootstrap.DESCRIPTION` says, paired by sequence; of token models "nats",
      what it adds to the loss, "nats_interval", and "destroyed", whether the perplexity is above ten times float's:
      such a model is not to be interpreted; "samples"; "tensors": as `rounded_tensors`; where NAME+sink_float is among
      the schemes too, "d_sink" and "d_sink_interval" of NAME: by how much its loss is higher}.

    Raises:
      UserError: a scheme rounds nothing at its site.
    """
    model, batches = (params, config, placement), list(batches)
    base, rows, found = base or losses(*model, batches), {}, {}
    tokens = config.inputs == "tokens"
    tensors = {name: rounded_tensors(params, config, batches[0], scheme) for name, scheme in schemes.items()}
    for name, scheme in schemes.items():
        check_site(name, scheme, tensors[name])
    for name, scheme in schemes.items():
        rows[name] = losses(*model, batches, scheme, calibration_for(scheme, *model, calibration_batches))
        found[name] = beside_float(rows[name], base, perplexity=tokens) | {"tensors": tensors[name]}
    for name, scheme in schemes.items():
        if scheme.sink_float:
            continue
        for other, kept in rows.items():
            if schemes[other] == dataclasses.replace(scheme, sink_float=True):
                pair = beside_float(rows[name], kept, perplexity=True)
                found[name] |= {"d_sink": pair["nats"], "d_sink_interval": pair["nats_interval"]}
    return found


def beside_float(rows: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], *, perplexity: bool) -> dict:
    """Value, float value and relative change with its interval, from per-sequence sums of losses and weights."""
    loss, before = (float(part["loss"].sum() / part["weight"].sum()) for part in (rows, base))

    def relative(means: Float[np.ndarray, "*draws 2"]) -> Float[np.ndarray, "*draws"]:
        with np.errstate(over="ignore"):
            return np.expm1(means[..., 0] - means[..., 1]) if perplexity else means[..., 0] / means[..., 1] - 1

    sums = np.stack([rows["loss"], base["loss"]], 1), rows["weight"][:, None]
    pair, difference = Estimate(*sums, relative), Estimate(*sums, lambda means: means[..., 0] - means[..., 1])
    found = intervals({"relative": pair, "nats": difference})
    with np.errstate(over="ignore"):
        value, plain = (float(np.exp(x)) if perplexity else x for x in (loss, before))
    nats = {
        "nats": difference.value,
        "nats_interval": found["nats"] and list(found["nats"]),
        "destroyed": not value <= DESTROYED * plain,
    }
    return {
        "value": value,
        "float": plain,
        "relative_change": pair.value,
        "interval": found["relative"] and list(found["relative"]),
        **(nats if perplexity else {}),
        "samples": {"sequences": len(rows["loss"])},
    }
