"""The model families that can be loaded: a new one is one file and one line in `FAMILIES`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError, unknown_name
from oasis_jax.pretrained.families import gpt2, granite_swa, llama, opt, phi3
from oasis_jax.pretrained.keys import Keys, shortened
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


_MOST_LAYERS = 10_000

# By config.json's model_type.
FAMILIES: dict[str, Family] = {
    "llama": Family(llama.read_config, llama.tensors),
    "mistral": Family(llama.read_mistral_config, llama.tensors),
    "qwen2": Family(llama.read_qwen2_config, llama.tensors),
    "qwen3": Family(llama.read_qwen3_config, llama.tensors),
    "phi3": Family(phi3.read_config, phi3.tensors),
    "granite_swa": Family(granite_swa.read_config, granite_swa.tensors),
    "opt": Family(opt.read_config, opt.tensors, opt.normalize),
    "gpt2": Family(gpt2.read_config, gpt2.tensors, gpt2.normalize),
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
    try:
        layers = keys.whole("n_layer" if "n_layer" in keys else "num_hidden_layers")
        if layers > _MOST_LAYERS:  # what every layer needs is listed before anything is compared with the files
            raise UserError(f"{shortened(layers)} layers; at most {_MOST_LAYERS}")
        fields = {"preset": "residual", "num_layers": layers, "vocab_size": keys.whole("vocab_size")}
        fields |= family.read_config(keys)
        keys.finish()
        return ModelConfig(**fields)
    except UserError as error:  # a check of ModelConfig does not know the file
        message = str(error)
        raise error if message.startswith(where) else UserError(f"{where}: {message}") from None
