"""Llama 2 and 3, SmolLM2, TinyLlama; Mistral; Qwen2 and Qwen3: one set of tensor names, small differences."""

from typing import Any

from oasis_jax.config import LayerPattern, ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.pretrained.keys import Keys
from oasis_jax.pretrained.mapping import LINEAR, LINEAR_FROM_HEADS, TABLE, VECTOR, Tensor, tensor
from oasis_jax.pretrained.rope import rope_fields


def common_fields(keys: Keys, *, theta: float = 10_000.0, tied: bool = False) -> dict[str, Any]:
    """What the families of this file, and those like them, say in the same words."""
    keys.expect("hidden_act", "silu")
    max_length = int(keys.take("max_position_embeddings", 2048))
    heads = int(keys.take("num_attention_heads"))
    return {
        "width": int(keys.take("hidden_size")),
        "mlp_dim": int(keys.take("intermediate_size")),
        "num_heads": heads,
        "num_kv_heads": int(keys.take("num_key_value_heads", heads)),
        "head_dim": int(keys.take("head_dim", 0)),
        "norm_epsilon": float(keys.take("rms_norm_eps", 1e-6)),
        "tied_head": bool(keys.take("tie_word_embeddings", tied)),
        "context_length": max_length,
        **rope_fields(keys, default_theta=theta, max_length=max_length),
    }


def read_config(keys: Keys) -> dict[str, Any]:
    """Llama: `attention_bias` covers queries, keys, values and the output."""
    bias = bool(keys.take("attention_bias", False))
    keys.take("rope_interleaved", False)  # SmolLM2's files carry it; transformers does not read it
    keys.take("is_llama_config", True)
    return common_fields(keys) | {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bool(keys.take("mlp_bias", False)),
    }


def read_mistral_config(keys: Keys) -> dict[str, Any]:
    """Mistral: a window in every layer where it is given."""
    return common_fields(keys) | {"window": int(keys.take("sliding_window", 0))}


def read_qwen2_config(keys: Keys) -> dict[str, Any]:
    """Qwen2: biases on queries, keys and values."""
    fields = common_fields(keys) | {"qkv_bias": True}
    return _with_windows(keys, fields)


def read_qwen3_config(keys: Keys) -> dict[str, Any]:
    """Qwen3: queries and keys are normed per head; the head size is a key of its own."""
    bias = bool(keys.take("attention_bias", False))
    fields = common_fields(keys) | {"qk_norm": True, "qkv_bias": bias, "output_bias": bias}
    fields["head_dim"] = fields["head_dim"] or 128
    return _with_windows(keys, fields)


def _with_windows(keys: Keys, fields: dict[str, Any]) -> dict[str, Any]:
    """Qwen's sliding_window counts only with use_sliding_window, and from layer max_window_layers on."""
    window, used = int(keys.take("sliding_window", 0)), bool(keys.take("use_sliding_window", False))
    first, layers = int(keys.take("max_window_layers", 28)), int(keys.take("num_hidden_layers"))
    kinds = keys.take("layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if used and window and i >= first else "full_attention" for i in range(layers)]
    return fields | layer_kinds(keys, kinds, window, fields["rope_theta"])


def layer_kinds(keys: Keys, kinds: list[str], window: int, theta: float) -> dict[str, Any]:
    """window, or a layer_pattern, from `layer_types`: full_attention or sliding_attention for every layer."""
    known = ("full_attention", "sliding_attention")
    for kind in kinds:
        if kind not in known:
            raise UserError(f"{keys.where}: layer_types has {kind!r}; allowed: {', '.join(known)}")
    windows = [window if kind == "sliding_attention" else 0 for kind in kinds]
    if len(set(windows)) == 1:
        return {"window": windows[0]}
    return {"layer_pattern": repeating([LayerPattern(window=w, rope_theta=theta) for w in windows])}


def repeating(layers: list[LayerPattern]) -> tuple[LayerPattern, ...]:
    """The shortest group of layers of which all layers are repetitions."""
    count = len(layers)
    for period in range(1, count + 1):
        if count % period == 0 and layers == layers[:period] * (count // period):
            return tuple(layers[:period])
    return tuple(layers)


def tensors(config: ModelConfig) -> list[Tensor]:
    """Where every parameter lies."""
    layer = "model.layers.{layer}."
    found = [
        tensor("model.embed_tokens.weight", TABLE, "embedding/table"),
        tensor("model.norm.weight", VECTOR, "final_norm/scale"),
    ]
    if not config.tied_head:
        found.append(tensor("lm_head.weight", LINEAR, "head/kernel"))
    found += [
        tensor(layer + "input_layernorm.weight", VECTOR, "layers/attention_norm/scale"),
        tensor(layer + "post_attention_layernorm.weight", VECTOR, "layers/mlp_norm/scale"),
    ]
    attention = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    for name, ours in attention.items():
        found.append(tensor(f"{layer}self_attn.{name}.weight", LINEAR, f"layers/attention/{ours}"))
        if config.qkv_bias:
            found.append(tensor(f"{layer}self_attn.{name}.bias", VECTOR, f"layers/attention/{ours}_bias"))
    found.append(tensor(layer + "self_attn.o_proj.weight", LINEAR_FROM_HEADS, "layers/attention/output"))
    if config.output_bias:
        found.append(tensor(layer + "self_attn.o_proj.bias", VECTOR, "layers/attention/output_bias"))
    if config.qk_norm:
        found += [
            tensor(layer + "self_attn.q_norm.weight", VECTOR, "layers/attention/query_norm"),
            tensor(layer + "self_attn.k_norm.weight", VECTOR, "layers/attention/key_norm"),
        ]
    for name in ("gate", "up", "down"):
        found.append(tensor(f"{layer}mlp.{name}_proj.weight", LINEAR, f"layers/mlp/{name}"))
        if config.mlp_bias:
            found.append(tensor(f"{layer}mlp.{name}_proj.bias", VECTOR, f"layers/mlp/{name}_bias"))
    return found
