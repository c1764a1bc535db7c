"""The null option of a layer: of which parameters it is made, and what the operator takes of it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from oasis_jax.config import AttentionConfig
from oasis_jax.model.context import Context
from oasis_jax.model.normalizers import NULL_LOGITS
from oasis_jax.model.parameters import Parameters, ParameterSpec, constant, matrix


class Null(NamedTuple):
    """The null option of a layer, as `pallas_kernels.null_attention` takes it."""

    logit: float | Float[Array, " N"] | Float[Array, "B T N"]
    key: Float[Array, "P K H"] | None = None
    value: Float[Array, "P K H"] | None = None


def null_parameters(config: AttentionConfig) -> dict[str, ParameterSpec]:
    """The parameters of the null that the config asks for; for softmax and Softmax1 there are none."""
    width, heads, key_heads, size = config.width, config.num_heads, config.key_heads, config.head_size
    every = {
        "null_logit": constant((heads,), 0.0, "null", ("heads",)),
        "null_key": _null_rows(config),
        "null_projection": constant((width, heads), 0.0, "null", ("embed", "heads")),
    }
    specs = {}
    made_of = NULL_LOGITS.get(config.normalizer)
    if made_of in every:
        specs[made_of] = every[made_of]
    if config.null_bias:
        specs["null_logit"] = every["null_logit"]
    if config.normalizer == "null_key_value":
        specs["null_value"] = constant((config.null_keys, key_heads, size), 0.0, "null", (None, "kv_heads", None))
    return specs


def _null_rows(config: AttentionConfig) -> ParameterSpec:
    """Null keys [P, K, H]. One starts at zero; several would stay alike for ever and are drawn."""
    shape, axes = (config.null_keys, config.key_heads, config.head_size), (None, "kv_heads", None)
    if config.null_keys == 1:
        return constant(shape, 0.0, "null", axes)
    return matrix(shape, axes, config.head_size, "null")


def null_option(p: Parameters, config: AttentionConfig, x: Float[Array, "B T D"], context: Context) -> Null:
    """What the null of this layer is; null keys are neither normed nor turned, and scored as every key."""
    made_of = NULL_LOGITS.get(config.normalizer, 0.0)
    if made_of == "null_key":
        null = Null(p["null_logit"] if config.null_bias else 0.0, p["null_key"], p.get("null_value"))
    elif made_of == "null_projection":
        wide = jnp.promote_types(x.dtype, jnp.float32)
        null = Null(jnp.einsum("BTD,DN->BTN", x, p["null_projection"], preferred_element_type=wide))
    else:
        null = Null(p["null_logit"] if made_of == "null_logit" else made_of)
    if null.value is not None:
        weight = config.null_value_weight if context.null_value_weight is None else context.null_value_weight
        null = null._replace(value=null.value * weight)
    weight = config.null_weight if context.null_weight is None else context.null_weight
    if isinstance(weight, float) and weight == 1.0:
        return null
    logit = null.logit + jnp.log(weight)
    return null._replace(logit=logit if jnp.ndim(logit) else jnp.full(config.num_heads, logit))
