"""The model families that can be loaded: a new one is one file and one line in `FAMILIES`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError, unknown_name
from oasis_jax.pretrained.families import llama
from oasis_jax.pretrained.keys import Keys
from oasis_jax.pretrained.mapping import Tensor


class Family(NamedTuple):
    """How models of one kind are read.

    Attributes:
      read_config: (keys of config.json) -> the fields of a ModelConfig that differ from a residual model's defaults.
      tensors: (config) -> where every parameter lies.
      normalize: (name in the file) -> the name that `tensors` uses, or None for what is no parameter.
    """

    read_config: Callable[[Keys], dict[str, Any]]
    tensors: Callable[[ModelConfig], list[Tensor]]
    normalize: Callable[[str], str | None] = lambda name: None if name.endswith("rotary_emb.inv_freq") else name


# By config.json's model_type.
FAMILIES: dict[str, Family] = {
    "llama": Family(llama.read_config, llama.tensors),
    "mistral": Family(llama.read_mistral_config, llama.tensors),
    "qwen2": Family(llama.read_qwen2_config, llama.tensors),
    "qwen3": Family(llama.read_qwen3_config, llama.tensors),
}


def family_of(config: dict[str, Any], where: str) -> tuple[str, Family]:
    """The name and the family of a config.json.

    Raises:
      UserError: a model_type that is not known.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{where}: has no 'model_type'; known families: {', '.join(FAMILIES)}")
    if kind not in FAMILIES:
        raise unknown_name(f"{where}: model_type", kind, FAMILIES)
    return kind, FAMILIES[kind]


def read_model_config(config: dict[str, Any], where: str) -> ModelConfig:
    """The ModelConfig that computes what a config.json says.

    Raises:
      UserError: an unknown family, a key or value that is not understood, or numbers that do not fit together.
    """
    _, family = family_of(config, where)
    keys = Keys(config, where)
    common = {
        "preset": "residual",
        "num_layers": int(keys.take("num_hidden_layers", None) or keys.take("n_layer")),
        "vocab_size": int(keys.take("vocab_size")),
    }
    try:
        fields = common | family.read_config(keys)
        keys.finish()
        return ModelConfig(**fields)
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: a value has the wrong type: {error}") from None
