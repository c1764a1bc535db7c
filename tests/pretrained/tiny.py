"""Tiny Llamas of odd sizes, written by hand: no other library is asked how; and random models of any config."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import tokenizers
from flax import nnx

from oasis_jax import Decoder, ModelConfig
from oasis_jax.model.layout import stack_layers
from oasis_jax.pretrained import Pretrained

# 211 tokens, 3 query heads on 1 key head, a head larger than width / heads.
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "rms_norm_eps": 1e-4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "vocab_size": 211,
}


def tensors(config: dict[str, Any] = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors under the names and shapes of a Llama; of a Qwen where model_type says so."""
    random = np.random.default_rng(seed)
    width, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    size = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    for layer in range(config["num_hidden_layers"]):
        own = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (queries, width),
            "self_attn.k_proj.weight": (keys, width),
            "self_attn.v_proj.weight": (keys, width),
            "self_attn.o_proj.weight": (width, queries),
            "mlp.gate_proj.weight": (hidden, width),
            "mlp.up_proj.weight": (hidden, width),
            "mlp.down_proj.weight": (width, hidden),
        }
        if config["model_type"] == "qwen2":
            own |= {f"self_attn.{x}_proj.bias": (keys if x in "kv" else queries,) for x in "qkv"}
        if config["model_type"] == "qwen3":
            own |= {f"self_attn.{x}_norm.weight": (size,) for x in "qk"}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(
    folder: pathlib.Path,
    config: dict[str, Any] = CONFIG,
    values: dict[str, np.ndarray] | None = None,
    shards: int = 1,
    **changes: Any,
) -> pathlib.Path:
    """A folder of config.json and safetensors, in shards with an index where there are several.

    Args:
      folder: made where it is missing.
      config: of the model; `changes` are merged into it.
      values: its tensors; default: random ones.
      shards: how many files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config | changes
    (folder / "config.json").write_text(json.dumps(config))
    values = tensors(config) if values is None else values
    if shards == 1:
        safetensors.numpy.save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, index = sorted(values), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        own = {name: values[name] for name in names[shard::shards]}
        safetensors.numpy.save_file(own, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def random_model(config: ModelConfig, seed: int = 0, begin_token: int | None = None) -> Pretrained:
    """A model whose every parameter, gains, biases and nulls too, is away from its start."""
    params = stack_layers(Decoder(config, rngs=nnx.Rngs(seed)).parameters())
    leaves, structure = jax.tree.flatten(params)
    random = np.random.default_rng(seed)
    moved = [leaf + 0.3 * random.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return Pretrained(config, jax.tree.unflatten(structure, moved), begin_token=begin_token)


def small_checkpoint(folder: pathlib.Path, family: str) -> pathlib.Path:
    """A checkpoint of a family, with a tokenizer of one token a word."""
    config = CONFIG | dict(model_type=family, tie_word_embeddings=True)
    values = tensors(config)
    if family == "phi3":
        config |= {"partial_rotary_factor": 0.75, "head_dim": 8}
        values = tensors(config)
        for layer in range(2):
            at = f"model.layers.{layer}."
            for new, parts in (("self_attn.qkv_proj", "self_attn.{}_proj"), ("mlp.gate_up_proj", "mlp.{}_proj")):
                old = [parts.format(x) for x in ("qkv" if "qkv" in new else ("gate", "up"))]
                joined = [values.pop(f"{at}{x}.weight") for x in old]
                values[f"{at}{new}.weight"] = np.concatenate(joined)
    write(folder, config, {name: x if x.ndim == 1 else 0.1 * x for name, x in values.items()})
    words = {f"w{i}": i for i in range(config["vocab_size"])}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(folder / "tokenizer.json"))
    return folder
