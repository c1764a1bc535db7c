"""A GGUF file read as the Hugging Face files it was made from: their config keys, tensor names and order of rows."""

import pathlib
import re
from typing import Any

import numpy as np

from oasis_jax.errors import UserError, unknown_name
from oasis_jax.pretrained import chat_template
from oasis_jax.pretrained.keys import Keys
from oasis_jax.pretrained.source import ChatTemplate, Source

# Key in the file, behind "llama." and the like -> key of config.json.
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "attention.sliding_window": "sliding_window",
}
# What follows from other keys or says nothing about the mathematics.
_IMPLIED = {"vocab_size", "rope.dimension_count", "attention.value_length", "rope.scaling.finetuned"}
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCIES = "rope_freqs.weight"


class GGUFFile(Source):
    """See `Source`. Quantized tensors are read as float32."""

    def __init__(self, path: pathlib.Path):
        import gguf

        self.path, self.where = path, str(path)
        try:
            reader = gguf.GGUFReader(path)
            fields = {name: _decimal(field.contents()) for name, field in reader.fields.items()}
        except Exception as error:  # whatever a damaged header makes of a reader that trusts it
            raise UserError(f"{path}: cannot be read as GGUF: {str(error).splitlines()[0]}") from None
        size = path.stat().st_size
        for tensor in reader.tensors:
            if tensor.data_offset + tensor.n_bytes > size:
                raise UserError(f"{path}: is cut short: tensor {tensor.name!r} ends behind the file's {size} bytes")
        self._fields, self._kind = fields, fields.get("general.architecture")
        if self._kind not in _ARCHITECTURES:
            raise unknown_name(f"{path}: architecture", str(self._kind), _ARCHITECTURES)
        self._tensors = {_name_of(tensor.name): tensor for tensor in reader.tensors}
        if "model.embed_tokens.weight" not in self._tensors:
            raise UserError(f"{path}: tensor 'token_embd.weight' is missing")
        self.config = self._read_config()
        self.shapes = {
            name: tuple(int(x) for x in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
            if name != _FREQUENCIES
        }

    def _read_config(self) -> dict[str, Any]:
        found: dict[str, Any] = {"model_type": self._kind}
        scaling: dict[str, Any] = {}
        for name, value in self._fields.items():
            if not name.startswith(f"{self._kind}."):
                continue
            name = name.removeprefix(f"{self._kind}.")
            if name in _KEYS:
                found[_KEYS[name]] = value
            elif name.startswith("rope.scaling.") and name not in _IMPLIED:
                scaling[name.removeprefix("rope.scaling.")] = value
            elif name not in _IMPLIED:
                found[f"{self._kind}.{name}"] = value  # refused by name, as every key that no family takes
        if found.get("sliding_window") and self._kind != "llama":
            found["use_sliding_window"] = True
        self._head_sizes(found)
        keys = Keys(found, self.where)
        size = keys.whole("head_dim", 0) or keys.whole("hidden_size") // max(keys.whole("num_attention_heads"), 1)
        turning = Keys(self._fields, self.where).whole(f"{self._kind}.rope.dimension_count", size)
        if turning != size:
            found["partial_rotary_factor"] = turning / max(size, 1)
        found["tie_word_embeddings"] = "lm_head.weight" not in self._tensors
        found["vocab_size"] = int(self._tensors["model.embed_tokens.weight"].shape[1])
        if "model.layers.0.self_attn.q_proj.bias" in self._tensors and self._kind == "llama":
            found["attention_bias"] = "model.layers.0.self_attn.o_proj.bias" in self._tensors
        if scaling.pop("type", "none") != "none":
            found["rope_scaling"] = self._scaling(scaling)
        if _FREQUENCIES in self._tensors:
            found["rope_scaling"] = self._factors()
        return found

    def _head_sizes(self, found: dict) -> None:
        for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            if isinstance(found.get(key), list):
                if len(set(found[key])) > 1:
                    raise UserError(f"{self.path}: {key} differs from layer to layer, which is not supported")
                found[key] = found[key][0]

    def _scaling(self, values: dict) -> dict[str, Any]:
        kind = self._fields[f"{self._kind}.rope.scaling.type"]
        names = {
            "factor": "factor",
            "original_context_length": "original_max_position_embeddings",
            "attn_factor": "attention_factor",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
        }
        return {"rope_type": kind} | {names.get(name, name): value for name, value in values.items()}

    def _factors(self) -> dict[str, Any]:
        """Llama 3's scaling as files have it: what every frequency is divided by, at any length."""
        factors = self._read(self._tensors[_FREQUENCIES]).tolist()
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "factor": 1.0,
        }

    @staticmethod
    def _read(tensor) -> np.ndarray:
        import gguf

        return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            found = self._read(tensor)
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"{self.path}: tensor {name!r}: cannot read type {tensor.tensor_type.name}: {error}"
            ) from None
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        for part, key in heads.items():
            if self._kind == "llama" and f"{part}." in name:
                return _halves(found, self.config.get(key, self.config["num_attention_heads"]))
        return found

    def tokenizer(self) -> dict[str, Any] | None:
        from oasis_jax.pretrained.tokenizer import from_gguf

        return from_gguf(self._fields, str(self.path))

    def chat_template(self) -> ChatTemplate | None:
        return chat_template.from_gguf(self._fields)


def _decimal(value: Any) -> Any:
    """A float32 as the decimal number that was meant: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a head in the order in which its halves turn; llama files have them in pairs that turn."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _name_of(name: str) -> str:
    """The name of a tensor in Hugging Face's files; the name itself where it has none."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{_TENSORS[part]}.{kind}" if part in _TENSORS else name
    part, _, kind = name.rpartition(".")
    return f"{_TENSORS[part]}.{kind}" if part in _TENSORS else name
