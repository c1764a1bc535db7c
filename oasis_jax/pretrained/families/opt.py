"""OPT: learned positions from row 2 on, LayerNorm, biases, ReLU."""

from typing import Any

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.pretrained.keys import Keys
from oasis_jax.pretrained.mapping import LINEAR, LINEAR_FROM_HEADS, TABLE, VECTOR, Tensor, tensor

# The first rows of the table of positions belong to no position.
_OFFSET = 2
# OPT's name of an activation -> ours.
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}


def read_config(keys: Keys) -> dict[str, Any]:
    """OPT: the epsilon of LayerNorm is not in the config; OPT-350m, which norms after its sublayers, is refused."""
    width, length = keys.whole("hidden_size"), keys.whole("max_position_embeddings", 2048)
    if not keys.flag("do_layer_norm_before", True) or keys.whole("word_embed_proj_dim", width) != width:
        raise UserError(
            f"{keys.where}: do_layer_norm_before=false or word_embed_proj_dim other than hidden_size, as OPT-350m has "
            "them, is not supported"
        )
    keys.expect("_remove_final_layer_norm", False)
    keys.expect("layer_norm_elementwise_affine", True)
    keys.expect("activation_function", *_ACTIVATIONS)
    bias = keys.flag("enable_bias", True)
    return {
        "width": width,
        "mlp_dim": keys.whole("ffn_dim"),
        "mlp_activation": _ACTIVATIONS[keys.take("activation_function", "relu")],
        "mlp_gated": False,
        "mlp_bias": bias,
        "num_heads": keys.whole("num_attention_heads"),
        "qkv_bias": bias,
        "output_bias": bias,
        "norm": "layernorm",
        "norm_epsilon": 1e-5,
        "rope_theta": 0.0,
        "learned_positions": length + _OFFSET,
        "position_offset": _OFFSET,
        "tied_head": keys.flag("tie_word_embeddings", True),
        "context_length": length,
    }


def normalize(name: str) -> str | None:
    """Older files lack the first part of a name."""
    return f"model.{name}" if name.startswith("decoder.") else name


def tensors(config: ModelConfig) -> list[Tensor]:
    """Where every parameter lies."""
    layer = "model.decoder.layers.{layer}."
    found = [
        tensor("model.decoder.embed_tokens.weight", TABLE, "embedding/table"),
        tensor("model.decoder.embed_positions.weight", TABLE, "embedding/positions"),
    ]
    norms = {
        "model.decoder.final_layer_norm": "final_norm",
        layer + "self_attn_layer_norm": "layers/attention_norm",
        layer + "final_layer_norm": "layers/mlp_norm",  # of the MLP, for all its name
    }
    for name, ours in norms.items():
        found += [tensor(f"{name}.weight", VECTOR, f"{ours}/scale"), tensor(f"{name}.bias", VECTOR, f"{ours}/bias")]
    linear = {
        "self_attn.q_proj": ("layers/attention/query", config.qkv_bias),
        "self_attn.k_proj": ("layers/attention/key", config.qkv_bias),
        "self_attn.v_proj": ("layers/attention/value", config.qkv_bias),
        "self_attn.out_proj": ("layers/attention/output", config.output_bias),
        "fc1": ("layers/mlp/up", config.mlp_bias),
        "fc2": ("layers/mlp/down", config.mlp_bias),
    }
    for name, (ours, bias) in linear.items():
        layout = LINEAR_FROM_HEADS if ours == "layers/attention/output" else LINEAR
        found.append(tensor(f"{layer}{name}.weight", layout, ours))
        if bias:
            found.append(tensor(f"{layer}{name}.bias", VECTOR, f"{ours}_bias"))
    if not config.tied_head:
        found.append(tensor("lm_head.weight", LINEAR, "head/kernel"))
    return found
