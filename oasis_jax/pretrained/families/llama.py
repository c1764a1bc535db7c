"""Llama 2 and 3, SmolLM2, TinyLlama; Mistral; Qwen2 and Qwen3: one set of tensor names, small differences."""

from typing import Any

from oasis_jax.config import LayerPattern, ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.pretrained.keys import Keys
from oasis_jax.pretrained.mapping import LINEAR, LINEAR_FROM_HEADS, TABLE, VECTOR, Tensor, tensor
from oasis_jax.pretrained.rope import rope_fields


def common_fields(
    keys: Keys, *, epsilon: float = 1e-6, max_length: int = 2048, kv_heads: int = 0, **rope: Any
) -> dict[str, Any]:
    """What the families of this file, and those like them, say in the same words.

    Args:
      keys: of config.json.
      epsilon, max_length, kv_heads: the family's defaults; 0: as many as num_attention_heads.
      rope: for `rope_fields`.
    """
    keys.expect("hidden_act", "silu")
    length = keys.whole("max_position_embeddings", max_length)
    heads = keys.whole("num_attention_heads")
    return {
        "width": keys.whole("hidden_size"),
        "mlp_dim": keys.whole("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": keys.whole("num_key_value_heads", heads if "num_key_value_heads" in keys else kv_heads),
        "head_dim": keys.whole("head_dim", 0),
        "norm_epsilon": keys.number("rms_norm_eps", epsilon),
        "tied_head": keys.flag("tie_word_embeddings", False),
        "context_length": length,
        **rope_fields(keys, max_length=length, **rope),
    }


def read_config(keys: Keys) -> dict[str, Any]:
    """Llama: `attention_bias` covers queries, keys, values and the output."""
    bias = keys.flag("attention_bias", False)
    keys.take("rope_interleaved", False)  # SmolLM2's files carry it; transformers does not read it
    keys.take("is_llama_config", True)
    return common_fields(keys) | {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": keys.flag("mlp_bias", False),
    }


def read_mistral_config(keys: Keys) -> dict[str, Any]:
    """Mistral: a window in every layer, unless it is null."""
    fields = common_fields(keys, max_length=131072, kv_heads=8)
    return fields | {"window": window_of(keys, 4096)}


def read_qwen2_config(keys: Keys) -> dict[str, Any]:
    """Qwen2: biases on queries, keys and values."""
    keys.expect("use_mrope", False)
    fields = common_fields(keys, max_length=32768, kv_heads=32) | {"qkv_bias": True}
    return _with_windows(keys, fields)


def read_qwen3_config(keys: Keys) -> dict[str, Any]:
    """Qwen3: queries and keys are normed per head; the head size is a key of its own."""
    bias = keys.flag("attention_bias", False)
    fields = common_fields(keys, max_length=32768, kv_heads=32)
    fields |= {"qk_norm": True, "qkv_bias": bias, "output_bias": bias}
    fields["head_dim"] = fields["head_dim"] or 128
    return _with_windows(keys, fields)


def window_of(keys: Keys, default: int) -> int:
    """sliding_window: the family's default where it is absent, 0 where it is null."""
    return keys.whole("sliding_window", 0 if "sliding_window" in keys else default)


def _with_windows(keys: Keys, fields: dict[str, Any]) -> dict[str, Any]:
    """Qwen's sliding_window counts only with use_sliding_window, and from layer max_window_layers on."""
    window, used = window_of(keys, 4096), keys.flag("use_sliding_window", False)
    first, layers = keys.whole("max_window_layers", 28), keys.whole("num_hidden_layers")
    window = window if used else 0
    kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    kinds = keys.texts("layer_types", kinds)
    return fields | layer_kinds(keys, kinds, window, [fields["rope_theta"]] * layers)


def layer_kinds(keys: Keys, kinds: list[str], window: int, thetas: list[float]) -> dict[str, Any]:
    """window and rope_theta, or a layer_pattern.

    Args:
      keys: of config.json.
      kinds: `layer_types`: full_attention or sliding_attention for every layer.
      window: of the latter.
      thetas: the base of rotary positions of every layer; 0: none.

    Raises:
      UserError: another kind, another number of layers, or a sliding_attention without a window.
    """
    known, layers = ("full_attention", "sliding_attention"), keys.whole("num_hidden_layers")
    for kind in kinds:
        if kind not in known:
            raise UserError(f"{keys.where}: layer_types has {kind!r}; allowed: {', '.join(known)}")
    if not len(kinds) == len(thetas) == layers:
        count = len(kinds) if len(kinds) != layers else len(thetas)
        raise UserError(f"{keys.where}: {count} entries for num_hidden_layers={layers}, in a list of layers")
    if "sliding_attention" in kinds and not window:
        raise UserError(f"{keys.where}: layer_types has 'sliding_attention', but no sliding_window is in use")
    pattern = repeating(
        [
            LayerPattern(window=window if kind == "sliding_attention" else 0, rope_theta=theta)
            for kind, theta in zip(kinds, thetas)
        ]
    )
    if len(pattern) == 1:
        return {"window": pattern[0].window, "rope_theta": pattern[0].rope_theta}
    return {"layer_pattern": pattern}


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
