"""Parameters from files, one tensor at a time, each straight onto its sharding."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.model.decoder import parameter_specs
from oasis_jax.model.layout import STACKS
from oasis_jax.model.parameters import ParameterSpec
from oasis_jax.model.wiring import schedule
from oasis_jax.placement import Placement
from oasis_jax.pretrained.families import family_of
from oasis_jax.pretrained.mapping import Tensor, file_shape, file_specs, fit_vocabulary, spec_of, split
from oasis_jax.pretrained.reference import router_tensors
from oasis_jax.pretrained.source import Source

MODEL_TYPE = "oasis"  # of config.json, for models that no other library computes
_SHOWN = 16  # names in a message


def load_params(files: Source, config: ModelConfig, placement: Placement) -> dict[str, Any]:
    """The stacked parameters of the model that a source's config.json describes, in the type that config computes in.

    Host memory holds one tensor at a time.

    Raises:
      UserError: see `load_pretrained`.
    """
    if files.config.get("model_type") == MODEL_TYPE:
        return _own_params(files, config, placement)
    _, family = family_of(files.config, files.where)
    tensors, specs = [*family.tensors(config), *router_tensors(config)], parameter_specs(config)
    wanted = {name: (entry, index) for entry in tensors for name, index in _names(entry, config.num_layers)}
    names = _present(files, wanted, family.normalize, config)
    builder = _Builder(config, specs, placement)
    for name, (entry, index) in wanted.items():
        own = file_specs(entry, specs, config.vocab_size)
        shape, found = file_shape(entry, own), files.shapes[names[name]]
        if tuple(found) != shape:
            raise UserError(f"{files.where}: tensor {name!r} has shape {tuple(found)}, its config says {shape}")
        array = files.read(names[name])
        if not _finite(array):
            raise UserError(f"{files.where}: tensor {name!r} has values that are not finite")
        for parameter, piece in zip(entry.parameters, split(array, entry, own)):
            builder.put(parameter, piece, index)
        del array, piece  # before the next one is read
    return builder.finish()


def _own_params(files: Source, config: ModelConfig, placement: Placement) -> dict[str, Any]:
    """Those of files that `save_pretrained` wrote under this library's own names."""
    specs = parameter_specs(config)
    builder, paths = _Builder(config, specs, placement), {".".join(path): path for path in _leaves(specs)}
    names = _present(files, paths, lambda name: name, config)
    for name, path in paths.items():
        builder.put_stacked("/".join(path), files, names[name])
    return builder.finish()


def _finite(array: np.ndarray) -> bool:
    """Whether all values are; by rows, so that no second copy of a large tensor exists."""
    rows = array.reshape(len(array), -1) if array.ndim else array[None, None]
    return all(np.isfinite(row).all() for row in rows)


def _names(entry: Tensor, layers: int) -> Iterable[tuple[str, int | None]]:
    """Names of a tensor, one a layer, and their place among all layers or routers."""
    if not entry.of_layers:
        return [(entry.name, None)]
    return [(entry.name.format(layer=layer), layer * entry.per_layer + entry.place) for layer in range(layers)]


def _present(files: Source, wanted: Mapping[str, Any], normalize, config: ModelConfig) -> dict[str, str]:
    """The name in the files of every wanted tensor."""
    names = {}
    for name in files.shapes:
        plain = normalize(name)
        if plain is not None:
            names[plain] = name
    missing = sorted(name for name in wanted if name not in names)
    # A tied model may carry its head a second time.
    left = sorted(name for name in names if name not in wanted and not (config.tied_head and name == "lm_head.weight"))
    whats = {"missing": missing, "not of the model that its config describes": left}
    if wrong := [f"{_listed(found)} {what}" for what, found in whats.items() if found]:
        raise UserError(f"{files.where}: {'; '.join(wrong)}")
    return names


def _listed(names: list[str]) -> str:
    """ "tensors 'a', 'b' are", for a message."""
    shown = ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown} are"


class _Builder:
    """Collects parameters; those of layers are written into arrays of all layers, in place."""

    def __init__(self, config: ModelConfig, specs: Mapping, placement: Placement):
        self._config, self._specs, self._placement = config, specs, placement
        self._found: dict[str, Any] = {}
        self._expected = {"/".join(path) for path in _leaves(specs)}

    def put(self, parameter: str, array: np.ndarray, index: int | None) -> None:
        """One parameter, or that of one layer or router."""
        spec = spec_of(self._specs, parameter)
        axes = tuple(spec.axes)
        own = _to_device(fit_vocabulary(array, spec), self._config.dtype, parameter, spec, axes, self._placement)
        if index is None:
            self._found[parameter] = own
            return
        if parameter not in self._found:
            sharding = self._placement.sharding((None, *axes))
            shape = (self._count(parameter), *spec.shape)
            self._found[parameter] = jnp.zeros(shape, self._config.dtype, device=sharding)
        self._found[parameter] = _write(self._found[parameter], own, index)

    def put_stacked(self, parameter: str, files: Source, name: str) -> None:
        """A parameter that lies in the files as it does here, those of layers and routers in one array of all."""
        spec = spec_of(self._specs, parameter)
        if parameter.split("/")[0] in STACKS:
            spec = spec._replace(shape=(self._count(parameter), *spec.shape), axes=(None, *spec.axes))
        if files.shapes[name] != spec.shape:
            raise UserError(
                f"{files.where}: tensor {name!r} has shape {files.shapes[name]}, its config says {spec.shape}"
            )
        array = files.read(name)
        if not _finite(array):
            raise UserError(f"{files.where}: tensor {name!r} has values that are not finite")
        own = _to_device(array, self._config.dtype, parameter, spec, spec.axes, self._placement)
        self._found[parameter] = own

    def _count(self, parameter: str) -> int:
        """How many layers or routers there are."""
        counts = {"layers": self._config.num_layers, "routers": len(schedule(self._config).routers)}
        return counts[parameter.split("/")[0]]

    def finish(self) -> dict[str, Any]:
        """The nested dicts."""
        if lacking := sorted(self._expected - set(self._found)):
            raise UserError(f"this family's tensors do not give the parameter {lacking[0]}")
        result: dict[str, Any] = {}
        for name in ["/".join(path) for path in _leaves(self._specs)]:
            group = result
            *parents, last = name.split("/")
            for parent in parents:
                group = group.setdefault(parent, {})
            group[last] = self._found[name]
        return result


def _leaves(specs: Mapping, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(specs, ParameterSpec):
        return [path]
    return [leaf for name, group in specs.items() for leaf in _leaves(group, (*path, name))]


def _to_device(array, dtype: str, name: str, spec: ParameterSpec, axes, placement: Placement) -> jax.Array:
    if placement.mesh is None:
        return jnp.asarray(array, dtype)
    sharding = placement.checked_sharding(name, spec.shape, axes)
    return jax.make_array_from_callback(spec.shape, sharding, lambda index: array[index].astype(dtype))


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, part: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0)
