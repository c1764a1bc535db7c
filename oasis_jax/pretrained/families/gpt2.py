"""GPT-2: matrices [in, out], queries, keys and values in one of them, learned positions, LayerNorm, tanh GELU."""

import re
from typing import Any

from oasis_jax.config import ModelConfig
from oasis_jax.pretrained.keys import Keys
from oasis_jax.pretrained.mapping import CONV1D, CONV1D_FROM_HEADS, LINEAR, TABLE, VECTOR, Tensor, tensor

# GPT-2's name of an activation -> ours.
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}
# Causal masks, which old files hold; c_attn.bias is none.
_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_PREFIX = "transformer."


def read_config(keys: Keys) -> dict[str, Any]:
    """GPT-2: a scale that differs from layer to layer is refused."""
    keys.expect("scale_attn_by_inverse_layer_idx", False)
    keys.expect("add_cross_attention", False)
    keys.expect("activation_function", *_ACTIVATIONS)
    width, length = keys.whole("n_embd"), keys.whole("n_positions", 1024)
    return {
        "width": width,
        "mlp_dim": keys.whole("n_inner", 4 * width),
        "mlp_activation": _ACTIVATIONS[keys.take("activation_function", "gelu_new")],
        "mlp_gated": False,
        "mlp_bias": True,
        "num_heads": keys.whole("n_head"),
        "qkv_bias": True,
        "output_bias": True,
        "attention_scale": 0.0 if keys.flag("scale_attn_weights", True) else 1.0,
        "norm": "layernorm",
        "norm_epsilon": keys.number("layer_norm_epsilon", 1e-5),
        "rope_theta": 0.0,
        "learned_positions": length,
        "tied_head": keys.flag("tie_word_embeddings", True),
        "context_length": length,
    }


def normalize(name: str) -> str | None:
    """The hub's own files lack the first part of a name, and hold masks."""
    name = name.removeprefix(_PREFIX)
    if _MASK.fullmatch(name):
        return None
    return name if name.startswith("lm_head.") else _PREFIX + name


def tensors(config: ModelConfig) -> list[Tensor]:
    """Where every parameter lies."""
    layer = "transformer.h.{layer}."
    found = [
        tensor("transformer.wte.weight", TABLE, "embedding/table"),
        tensor("transformer.wpe.weight", TABLE, "embedding/positions"),
    ]
    norms = {
        "transformer.ln_f": "final_norm",
        layer + "ln_1": "layers/attention_norm",
        layer + "ln_2": "layers/mlp_norm",
    }
    for name, ours in norms.items():
        found += [tensor(f"{name}.weight", VECTOR, f"{ours}/scale"), tensor(f"{name}.bias", VECTOR, f"{ours}/bias")]
    attention = [f"layers/attention/{name}" for name in ("query", "key", "value")]
    found += [
        tensor(layer + "attn.c_attn.weight", CONV1D, *attention),
        tensor(layer + "attn.c_attn.bias", VECTOR, *(f"{name}_bias" for name in attention)),
        tensor(layer + "attn.c_proj.weight", CONV1D_FROM_HEADS, "layers/attention/output"),
        tensor(layer + "attn.c_proj.bias", VECTOR, "layers/attention/output_bias"),
        tensor(layer + "mlp.c_fc.weight", CONV1D, "layers/mlp/up"),
        tensor(layer + "mlp.c_fc.bias", VECTOR, "layers/mlp/up_bias"),
        tensor(layer + "mlp.c_proj.weight", CONV1D, "layers/mlp/down"),
        tensor(layer + "mlp.c_proj.bias", VECTOR, "layers/mlp/down_bias"),
    ]
    if not config.tied_head:
        found.append(tensor("lm_head.weight", LINEAR, "head/kernel"))
    return found
