"""A pretrained model as one value, and `load_pretrained`, which makes it from files."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from oasis_jax.config.run import model_from_dict
from oasis_jax.data import Tokenizer
from oasis_jax.data.tokenizers import LibraryTokenizer
from oasis_jax.errors import UserError
from oasis_jax.model.decoder import Decoder, check_model, with_parameters
from oasis_jax.model.layout import unstack_layers
from oasis_jax.model.numerics import FLOAT, Numerics
from oasis_jax.placement import UNSHARDED, Placement, make_mesh, place
from oasis_jax.pretrained.families import read_model_config
from oasis_jax.pretrained.reference import has_routers, with_routers
from oasis_jax.pretrained.source import ChatTemplate, Source, open_source
from oasis_jax.pretrained.tensors import MODEL_TYPE, load_params
from oasis_jax.storage import as_path, in_words, is_remote, reach


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
      chat: the template by which messages become a text; None where the source has none.
      numerics: how its layers are computed where text is made and scored; a pytree. See
        `oasis_jax.evaluation.quantization.quantized`.
    """

    config: ModelConfig
    params: dict[str, Any]
    placement: Placement = UNSHARDED
    tokenizer: Tokenizer | None = None
    begin_token: int | None = None
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    numerics: Numerics = FLOAT
    chat: ChatTemplate | None = None

    def decoder(self) -> Decoder:
        """An NNX Decoder of the same parameters: decoder()(ids) -> logits [B, T, V], statistics."""
        return with_parameters(self.config, unstack_layers(self.params))

    def replace(self, **changes: Any) -> "Pretrained":
        """This model with other values for some of its fields."""
        return dataclasses.replace(self, **changes)

    def changed(self, config: ModelConfig, params: Mapping[str, Any], change: str, **changes: Any) -> "Pretrained":
        """What a transformation makes of this model; its card says so."""
        card = {**self.card, "changes": [*self.card.get("changes", ()), change]}
        return self.replace(config=config, params=dict(params), card=card, **changes)


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: MeshConfig | None = None,
    normalizers: Mapping[str, Any] | None = None,
) -> Pretrained:
    """Reads a pretrained model.

    Args:
      source: a folder of safetensors with config.json and, where there is one, tokenizer.json; a .gguf file; a workdir
        of this library; each here or in gs:// or s3://; or the name of a model on a hub.
      dtype: of parameters and computations, "float32" or "bfloat16"; None: float32, and what a run computed in.
      mesh: how parameters are split over devices; None: they lie on one.
      normalizers: of a checkpoint of OASIS' published code, and only of one, what its files do not say, by the names of
        a ModelConfig's fields: {"normalizer": "softmax1", "depth_normalizer": "softmax1"}; of clipped softmax also
        clip_gamma, clip_zeta, clip_alpha.

    Raises:
      UserError: an unknown family or config key, a tensor that is missing, left over, damaged, not finite or of another
        shape than config.json says, a tokenizer larger than the vocabulary, a pickle, a hub that cannot be reached.
    """
    if isinstance(source, os.PathLike | str) and _is_workdir(source):
        if normalizers:
            raise UserError(f"normalizers: {source} is a run, which says itself with which it was trained")
        return _from_workdir(source, dtype, mesh)
    files = open_source(source)
    config = dataclasses.replace(source_model(files, normalizers), dtype=dtype or "float32")
    check_model(config)
    tokenizer, begin = source_tokenizer(files, config)
    placement = UNSHARDED if mesh is None else _placement(config, mesh)
    params = load_params(files, config, placement)
    name = files.config.get("_name_or_path") or as_path(source, "model").resolve().name
    card = {"source": str(source), "family": files.config["model_type"], "name": name}
    chat = files.chat_template()
    return Pretrained(config, params, placement, tokenizer, begin, card, files.config, chat=chat)


def _is_workdir(source: str | os.PathLike) -> bool:
    path = as_path(source, "model")
    with in_words(path, f"model {str(source)!r}"):
        return (not is_remote(path) or reach(path, "model") == "directory") and (path / "checkpoints").is_dir()


def source_model(files: Source, normalizers: Mapping[str, Any] | None = None) -> ModelConfig:
    """The ModelConfig of a source's config.json.

    Args:
      normalizers: see `load_pretrained`.

    Raises:
      UserError: an unknown family, a key or value that is not understood; normalizers that are missing or too many.
    """
    if files.config.get("model_type") != MODEL_TYPE:
        backbone = read_model_config(files.config, files.where)
        if has_routers(files):
            return with_routers(backbone, files, normalizers)
        if normalizers:
            raise UserError(f"normalizers: {files.where} has no depth routers, so its family says which they are")
        return backbone
    if normalizers:
        raise UserError(f"normalizers: {files.where} says itself which they are")
    own = files.config.get("oasis")
    if not isinstance(own, dict) or not isinstance(own.get("model"), dict):
        raise UserError(f"{files.where}: model_type={MODEL_TYPE}, but there is no 'oasis' section with a 'model'")
    return model_from_dict(own["model"], str(own.get("version", "")))


def _from_workdir(workdir: str | os.PathLike[str], dtype: str | None, mesh: MeshConfig | None) -> Pretrained:
    from oasis_jax.training.load import load_run

    axes = ("data", "fsdp", "tensor", "sequence")
    run = load_run(
        workdir, overrides=[f"mesh.{axis}={getattr(mesh, axis)}" for axis in axes] if mesh else ["mesh.data=1"]
    )
    begin = run.tokenizer.begin_id if run.tokenizer and run.config.data.begin_token else None
    card = {
        "source": str(workdir),
        "family": "oasis",
        "name": as_path(workdir, "model").resolve().name,
        "step": run.step,
    }
    config, params = run.config.model, run.params
    if dtype is not None:
        config, params = dataclasses.replace(config, dtype=dtype), jax.tree.map(lambda x: x.astype(dtype), params)
    return Pretrained(config, params, run.placement, run.tokenizer, begin, card)


def _placement(config: ModelConfig, mesh: MeshConfig) -> Placement:
    """Lengths are checked when batches come; here any length will do that every mesh divides."""
    length = 64 * mesh.sequence * mesh.tensor
    return place(Config(model=config, data=DataConfig(sequence_length=length), mesh=mesh), make_mesh(mesh))


def source_tokenizer(files: Source, config: ModelConfig) -> tuple[Tokenizer | None, int | None]:
    """The tokenizer of a source, and the token that its texts begin with; None where there is none.

    Raises:
      UserError: more tokens than the model's vocabulary has.
    """
    fields = files.tokenizer()
    found = (
        None
        if fields is None
        else Tokenizer.from_json(fields)
        if isinstance(fields, str)
        else LibraryTokenizer(**fields)
    )
    if found is not None and found.vocab_size > config.vocab_size:
        raise UserError(
            f"{files.where}: the tokenizer has {found.vocab_size} tokens, the model's vocabulary {config.vocab_size}"
        )
    own = files.config.get(MODEL_TYPE, {})
    return found, own.get("begin_token", found and found.begin_id)
