"""From files to a model: `load_pretrained` reads one tensor at a time, each straight onto its sharding."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from oasis_jax.config.run import model_from_dict
from oasis_jax.data import Tokenizer
from oasis_jax.data.tokenizers import LibraryTokenizer
from oasis_jax.errors import UserError
from oasis_jax.model.decoder import Decoder, check_model, parameter_specs, with_parameters
from oasis_jax.model.layout import STACKS, unstack_layers
from oasis_jax.model.parameters import ParameterSpec
from oasis_jax.model.wiring import schedule
from oasis_jax.placement import UNSHARDED, Placement, make_mesh, place
from oasis_jax.pretrained.families import family_of, read_model_config
from oasis_jax.pretrained.mapping import Tensor, file_shape, file_specs, fit_vocabulary, spec_of, split
from oasis_jax.pretrained.source import Source, open_source

MODEL_TYPE = "oasis"  # of config.json, for models that no other library computes


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that was trained elsewhere, or here.

    Attributes:
      config: what it computes.
      params: stacked, see `oasis_jax.model.layout`; as `placement` lays them out.
      placement: where they lie.
      tokenizer: None where the source has none.
      begin_token: the id that comes before every text; None: this model's texts begin without one.
      card: where it came from and what has been done to it, for reports.
      source_config: its config.json, which `save_pretrained` writes again; {} for models that have none.
    """

    config: ModelConfig
    params: dict[str, Any]
    placement: Placement = UNSHARDED
    tokenizer: Tokenizer | None = None
    begin_token: int | None = None
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def decoder(self) -> Decoder:
        """An NNX Decoder of the same parameters: decoder()(ids) -> logits [B, T, V], statistics."""
        return with_parameters(self.config, unstack_layers(self.params))

    def replace(self, **changes) -> "Pretrained":
        """This model with other values for some of its fields."""
        return dataclasses.replace(self, **changes)

    def changed(self, config: ModelConfig, params: Mapping[str, Any], change: str, **changes) -> "Pretrained":
        """What a transformation makes of this model; its card says so."""
        card = {**self.card, "changes": [*self.card.get("changes", ()), change]}
        return self.replace(config=config, params=dict(params), card=card, **changes)


def load_pretrained(source: str | os.PathLike, *, dtype: str = "float32", mesh: MeshConfig | None = None) -> Pretrained:
    """Reads a pretrained model.

    Args:
      source: a folder of safetensors with config.json and, where there is one, tokenizer.json; a .gguf file; a workdir
        of this library; or the name of a model on a hub.
      dtype: of parameters and computations, "float32" or "bfloat16".
      mesh: how parameters are split over devices; None: they lie on one.

    Raises:
      UserError: an unknown family or config key, a tensor that is missing, left over, damaged, not finite or of another
        shape than config.json says, a tokenizer larger than the vocabulary, a pickle, a hub that cannot be reached.
    """
    if isinstance(source, os.PathLike | str) and (pathlib.Path(source) / "checkpoints").is_dir():
        return _from_workdir(source, mesh)
    files = open_source(source)
    if files.config.get("model_type") == MODEL_TYPE:
        return _own_format(files, source, dtype, mesh)
    kind, _ = family_of(files.config, files.where)
    config = dataclasses.replace(read_model_config(files.config, files.where), dtype=dtype)
    check_model(config)
    tokenizer, begin = _tokenizer(files, config)
    placement = UNSHARDED if mesh is None else _placement(config, mesh)
    params = load_params(files, config, placement)
    card = {
        "source": str(source),
        "family": kind,
        "name": files.config.get("_name_or_path") or pathlib.Path(source).name,
    }
    return Pretrained(config, params, placement, tokenizer, begin, card, files.config)


def _own_format(files: Source, source: str | os.PathLike, dtype: str, mesh: MeshConfig | None) -> Pretrained:
    """What `save_pretrained` writes of models that no other library computes."""
    own = files.config.get("oasis")
    if not isinstance(own, dict) or not isinstance(own.get("model"), dict):
        raise UserError(f"{files.where}: model_type={MODEL_TYPE}, but there is no 'oasis' section with a 'model'")
    config = dataclasses.replace(model_from_dict(own["model"], str(own.get("version", ""))), dtype=dtype)
    check_model(config)
    placement = UNSHARDED if mesh is None else _placement(config, mesh)
    builder, specs = _Builder(config, parameter_specs(config), placement), parameter_specs(config)
    paths = {".".join(path): path for path in _leaves(specs)}
    names = _present(files, paths, lambda name: name, config)
    for name, path in paths.items():
        builder.put_stacked("/".join(path), files, names[name])
    fields = files.tokenizer()
    tokenizer = LibraryTokenizer(**fields) if fields else _trained_tokenizer(pathlib.Path(source))
    card = {"source": str(source), "family": MODEL_TYPE, "name": pathlib.Path(source).resolve().name}
    return Pretrained(config, builder.finish(), placement, tokenizer, own.get("begin_token"), card, files.config)


def _trained_tokenizer(folder: pathlib.Path) -> Tokenizer | None:
    file = folder / "oasis_tokenizer.json"
    return Tokenizer.from_json(file.read_text(encoding="utf-8")) if file.exists() else None


def _from_workdir(workdir: str | os.PathLike, mesh: MeshConfig | None) -> Pretrained:
    from oasis_jax.training.load import load_run

    axes = ("data", "fsdp", "tensor", "sequence")
    run = load_run(
        workdir, overrides=[f"mesh.{axis}={getattr(mesh, axis)}" for axis in axes] if mesh else ["mesh.data=1"]
    )
    begin = run.tokenizer.begin_id if run.tokenizer and run.config.data.begin_token else None
    card = {"source": str(workdir), "family": "oasis", "name": pathlib.Path(workdir).resolve().name, "step": run.step}
    return Pretrained(run.config.model, run.params, run.placement, run.tokenizer, begin, card)


def _placement(config: ModelConfig, mesh: MeshConfig) -> Placement:
    """Lengths are checked when batches come; here any length will do that every mesh divides."""
    length = 64 * mesh.sequence * mesh.tensor
    return place(Config(model=config, data=DataConfig(sequence_length=length), mesh=mesh), make_mesh(mesh))


def _tokenizer(files: Source, config: ModelConfig) -> tuple[Tokenizer | None, int | None]:
    fields = files.tokenizer()
    if fields is None:
        return None, None
    found = LibraryTokenizer(**fields)
    if found.vocab_size > config.vocab_size:
        raise UserError(
            f"{files.where}: the tokenizer has {found.vocab_size} tokens, the model's vocabulary {config.vocab_size}"
        )
    return found, found.begin_id


def load_params(files: Source, config: ModelConfig, placement: Placement) -> dict[str, Any]:
    """The stacked parameters of a residual model, in the type that config computes in.

    Host memory holds one tensor at a time.

    Raises:
      UserError: see `load_pretrained`.
    """
    _, family = family_of(files.config, files.where)
    tensors, specs = family.tensors(config), parameter_specs(config)
    wanted = {name: (entry, layer) for entry in tensors for name, layer in _names(entry, config.num_layers)}
    names = _present(files, wanted, family.normalize, config)
    builder = _Builder(config, specs, placement)
    for name, (entry, layer) in wanted.items():
        own = file_specs(entry, specs, config.vocab_size)
        shape, found = file_shape(entry, own), files.shapes[names[name]]
        if tuple(found) != shape:
            raise UserError(f"{files.where}: tensor {name!r} has shape {tuple(found)}, its config says {shape}")
        array = files.read(names[name])
        if not _finite(array):
            raise UserError(f"{files.where}: tensor {name!r} has values that are not finite")
        for parameter, piece in zip(entry.parameters, split(array, entry, own)):
            builder.put(parameter, piece, layer)
        del array, piece  # before the next one is read
    return builder.finish()


def _finite(array: np.ndarray) -> bool:
    """Whether all values are; by rows, so that no second copy of a large tensor exists."""
    rows = array.reshape(len(array), -1) if array.ndim else array[None, None]
    return all(np.isfinite(row).all() for row in rows)


def _names(entry: Tensor, layers: int) -> Iterable[tuple[str, int | None]]:
    if not entry.of_layers:
        return [(entry.name, None)]
    return [(entry.name.format(layer=layer), layer) for layer in range(layers)]


def _present(files: Source, wanted: Mapping[str, Any], normalize, config: ModelConfig) -> dict[str, str]:
    """The name in the files of every wanted tensor."""
    names = {}
    for name in files.shapes:
        plain = normalize(name)
        if plain is not None:
            names[plain] = name
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UserError(f"{files.where}: tensor {missing[0]!r} is missing{_more(missing)}")
    # A tied model may carry its head a second time.
    left = sorted(name for name in names if name not in wanted and not (config.tied_head and name == "lm_head.weight"))
    if left:
        raise UserError(
            f"{files.where}: tensor {left[0]!r} is not one of the model that its config describes{_more(left)}"
        )
    return names


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


class _Builder:
    """Collects parameters; those of layers are written into arrays of all layers, in place."""

    def __init__(self, config: ModelConfig, specs: Mapping, placement: Placement):
        self._config, self._specs, self._placement = config, specs, placement
        self._found: dict[str, Any] = {}
        self._expected = {"/".join(path) for path in _leaves(specs)}

    def put(self, parameter: str, array: np.ndarray, layer: int | None) -> None:
        """One parameter, or one layer's part of it."""
        spec = spec_of(self._specs, parameter)
        axes = tuple(spec.axes)
        own = _to_device(fit_vocabulary(array, spec), self._config.dtype, parameter, spec, axes, self._placement)
        if layer is None:
            self._found[parameter] = own
            return
        if parameter not in self._found:
            sharding = self._placement.sharding((None, *axes))
            shape, dtype = (self._config.num_layers, *spec.shape), self._config.dtype
            self._found[parameter] = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
        self._found[parameter] = _write(self._found[parameter], own, layer)

    def put_stacked(self, parameter: str, files: Source, name: str) -> None:
        """A parameter that lies in the files as it does here, those of layers and routers in one array of all."""
        spec, group = spec_of(self._specs, parameter), parameter.split("/")[0]
        if group in STACKS:
            counts = {"layers": self._config.num_layers, "routers": len(schedule(self._config).routers)}
            spec = spec._replace(shape=(counts[group], *spec.shape), axes=(None, *spec.axes))
        if files.shapes[name] != spec.shape:
            raise UserError(
                f"{files.where}: tensor {name!r} has shape {files.shapes[name]}, its config says {spec.shape}"
            )
        array = files.read(name)
        if not _finite(array):
            raise UserError(f"{files.where}: tensor {name!r} has values that are not finite")
        own = _to_device(array, self._config.dtype, parameter, spec, spec.axes, self._placement)
        self._found[parameter] = own

    def finish(self) -> dict[str, Any]:
        """The nested dicts."""
        if lacking := sorted(self._expected - set(self._found)):
            raise UserError(f"this family's tensors do not give the parameter {lacking[0]}{_more(lacking)}")
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
