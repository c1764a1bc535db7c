"""GraniteSWA: a learned sink per head, a window in most layers, a rotary base per layer, and multipliers."""

from typing import Any

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.pretrained.families import llama
from oasis_jax.pretrained.keys import Keys
from oasis_jax.pretrained.mapping import VECTOR, Tensor, tensor


def read_config(keys: Keys) -> dict[str, Any]:
    """GraniteSWA: every fourth layer, the first among them, is full where `layer_types` does not say otherwise."""
    bias, layers = keys.flag("attention_bias", False), keys.whole("num_hidden_layers")
    fields = llama.common_fields(keys, epsilon=1e-5, max_length=8192, kv_heads=4)
    kinds = keys.texts("layer_types", ["sliding_attention" if i % 4 else "full_attention" for i in range(layers)])
    thetas = keys.numbers("layer_rope_theta", [fields["rope_theta"]] * layers)
    multipliers = {
        "embedding_multiplier": keys.number("embedding_multiplier", 1.0),
        "residual_multiplier": keys.number("residual_multiplier", 1.0),
        "attention_scale": keys.number("attention_multiplier", 1.0),
        "logits_multiplier": 1 / (keys.number("logits_scaling", 1.0) or float("nan")),
    }
    if not multipliers["attention_scale"] > 0 or not multipliers["logits_multiplier"] > 0:
        raise UserError(f"{keys.where}: attention_multiplier and logits_scaling must be above 0")
    return (
        fields
        | multipliers
        | llama.layer_kinds(keys, kinds, llama.window_of(keys, 128), thetas)
        | {
            "normalizer": "learned_sink",
            "tied_head": keys.flag("tie_word_embeddings", True),
            "qkv_bias": bias,
            "output_bias": bias,
            "mlp_bias": keys.flag("mlp_bias", False),
        }
    )


def tensors(config: ModelConfig) -> list[Tensor]:
    """Where every parameter lies."""
    sinks = tensor("model.layers.{layer}.self_attn.sinks", VECTOR, "layers/attention/null_logit")
    return [*llama.tensors(config), sinks]
