"""Phi-3 and Phi-4-mini: queries, keys and values in one tensor, gate and up in another, part of a head turns."""

from typing import Any

from oasis_jax.config import ModelConfig
from oasis_jax.pretrained.families import llama
from oasis_jax.pretrained.keys import Keys
from oasis_jax.pretrained.mapping import LINEAR, LINEAR_FROM_HEADS, TABLE, VECTOR, Tensor, tensor

# What Phi-4-mini's files carry and no code of transformers reads, with the only value that says nothing.
_UNUSED = {
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
}


def read_config(keys: Keys) -> dict[str, Any]:
    """Phi-3: the original length lies outside the rope parameters; `su` and `yarn` are old names of longrope."""
    for name, value in _UNUSED.items():
        keys.expect(name, value)
    fields = llama.common_fields(
        keys, epsilon=1e-5, max_length=4096, original=4096, partial=True, aliases={"su": "longrope", "yarn": "longrope"}
    )
    return fields | {"window": keys.whole("sliding_window", 0)}


def tensors(config: ModelConfig) -> list[Tensor]:
    """Where every parameter lies."""
    layer = "model.layers.{layer}."
    found = [
        tensor("model.embed_tokens.weight", TABLE, "embedding/table"),
        tensor("model.norm.weight", VECTOR, "final_norm/scale"),
        tensor(layer + "input_layernorm.weight", VECTOR, "layers/attention_norm/scale"),
        tensor(layer + "post_attention_layernorm.weight", VECTOR, "layers/mlp_norm/scale"),
        tensor(
            layer + "self_attn.qkv_proj.weight",
            LINEAR,
            "layers/attention/query",
            "layers/attention/key",
            "layers/attention/value",
        ),
        tensor(layer + "self_attn.o_proj.weight", LINEAR_FROM_HEADS, "layers/attention/output"),
        tensor(layer + "mlp.gate_up_proj.weight", LINEAR, "layers/mlp/gate", "layers/mlp/up"),
        tensor(layer + "mlp.down_proj.weight", LINEAR, "layers/mlp/down"),
    ]
    if not config.tied_head:
        found.append(tensor("lm_head.weight", LINEAR, "head/kernel"))
    return found
