"""Self-attention that can say "nothing here": one pure function, one table of parameters, one NNX module."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from oasis_jax.config import AttentionConfig
from oasis_jax.errors import unknown_name
from oasis_jax.model.context import Context
from oasis_jax.model.masks import context_mask, first_in_document, first_key_scores, scores
from oasis_jax.model.normalizers import DENSE_NORMALIZERS, NULL_LOGITS, null_softmax
from oasis_jax.model.norms import rms_norm
from oasis_jax.model.parameters import ParameterModule, Parameters, ParameterSpec, constant, matrix
from oasis_jax.model.rotary import rotary_angles, rotate
from oasis_jax.model.statistics import AttentionStatistics, Static
from pallas_kernels import NullAttention, implementations, null_attention
from pallas_kernels.null_attention import add_null_value, null_scores

_NO_CONTEXT = Context()
# Parameters that are no part of a product in the compute type: the null's, whose scores are float32 or better, and
# gains.
_WIDE = ("null_logit", "null_key", "null_value", "query_norm", "key_norm")


def backend(operator: str, name: str) -> str | None:
    """The `implementation` argument for a configured backend name; raises UserError for one that does not exist."""
    if name == "auto":
        return None
    available = implementations(operator)
    if name not in available:
        raise unknown_name(f"implementation of {operator}", name, ("auto", *available))
    return name


class Null(NamedTuple):
    """The null option of a layer, as `pallas_kernels.null_attention` takes it."""

    logit: float | Float[Array, " N"] | Float[Array, "B T N"]
    key: Float[Array, "P K H"] | None = None
    value: Float[Array, "P K H"] | None = None


def attention_parameters(config: AttentionConfig) -> dict[str, ParameterSpec]:
    """The parameters of one attention layer; the optional ones only where the config asks for them."""
    width, heads, key_heads, size = config.width, config.num_heads, config.key_heads, config.head_size
    specs = {
        "query": matrix((width, heads, size), ("embed", "heads", None), width),
        "key": matrix((width, key_heads, size), ("embed", "kv_heads", None), width),
        "value": matrix((width, key_heads, size), ("embed", "kv_heads", None), width),
        "output": matrix((heads, size, width), ("heads", None, "embed"), heads * size),
    }
    if config.qkv_bias:
        specs["query_bias"] = constant((heads, size), 0.0, "bias", ("heads", None))
        specs["key_bias"] = constant((key_heads, size), 0.0, "bias", ("kv_heads", None))
        specs["value_bias"] = constant((key_heads, size), 0.0, "bias", ("kv_heads", None))
    if config.output_bias:
        specs["output_bias"] = constant((width,), 0.0, "bias")
    if config.qk_norm:
        specs |= {"query_norm": constant((size,), 1.0, "norm"), "key_norm": constant((size,), 1.0, "norm")}
    null = {
        "null_logit": constant((heads,), 0.0, "null", ("heads",)),
        "null_key": null_rows(config),
        "null_projection": constant((width, heads), 0.0, "null", ("embed", "heads")),
    }
    made_of = NULL_LOGITS.get(config.normalizer)
    if made_of in null:
        specs[made_of] = null[made_of]
    if config.null_bias:
        specs["null_logit"] = null["null_logit"]
    if config.normalizer == "null_key_value":
        specs["null_value"] = constant((config.null_keys, key_heads, size), 0.0, "null", (None, "kv_heads", None))
    if config.gate == "elementwise":
        specs["gate"] = matrix((width, heads, size), ("embed", "heads", None), width)
    elif config.gate == "per_head":
        specs["gate"] = matrix((width, heads), ("embed", "heads"), width)
    return specs


def null_rows(config: AttentionConfig) -> ParameterSpec:
    """Null keys [P, K, H]. One starts at zero; several would stay alike for ever and are drawn."""
    shape, axes = (config.null_keys, config.key_heads, config.head_size), (None, "kv_heads", None)
    if config.null_keys == 1:
        return constant(shape, 0.0, "null", axes)
    return matrix(shape, axes, config.head_size, "null")


def attention(
    parameters: Parameters, config: AttentionConfig, x: Float[Array, "B T D"], context: Context = _NO_CONTEXT
) -> tuple[Float[Array, "B T D"], AttentionStatistics]:
    """Causal self-attention with the normalizer that `config.normalizer` names (OASIS, arXiv 2605.17887).

    Args:
      parameters: as `attention_parameters(config)` lists them.
      config: an AttentionConfig, or a ModelConfig.
      x: [B, T, D], normed already; computed in its type, probabilities in float32 or better.
      context: see Context.

    Returns:
      [B, T, D] after the output projection, and the layer's AttentionStatistics.

    Raises:
      UserError: positions or segment_ids that do not fit x.
    """
    context.check(*x.shape[:2])
    x = context.constrain(x, "batch", "length", None)
    p = {name: value if name in _WIDE else value.astype(x.dtype) for name, value in parameters.items()}
    query, key, value = project(p, config, x, context)
    key, value = context.with_cached(key, value)
    null = null_option(p, config, x, context)
    if config.normalizer in DENSE_NORMALIZERS or context.numerics.materializes_attention:
        statistics = _dense(query, key, value, null, config, context)
    else:
        statistics = _fused(query, key, value, null, config, context)
    heads = context.numerics.tap("context", statistics.head_output)
    return output_projection(p, config, x, heads, context), statistics


def project(p: Parameters, config: AttentionConfig, x: Float[Array, "B T D"], context: Context) -> tuple[Array, ...]:
    """Queries [B, T, N, H], keys and values [B, T, K, H]: projected, normed and turned."""
    found = []
    for name in ("query", "key", "value"):
        y = context.numerics.einsum(name, "BTD,DNH->BTNH", x, p[name])
        found.append(y + p[f"{name}_bias"] if config.qkv_bias else y)
    query, key, value = found
    if config.qk_norm:
        query = rms_norm(query, p["query_norm"], config.norm_epsilon)
        key = rms_norm(key, p["key_norm"], config.norm_epsilon)
    if config.rope_theta:
        cos, sin = rotary_angles(config, context.positions_of(x.shape[1]), x.dtype)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    query = context.constrain(query, "batch", "length", "heads", None)
    key, value = (context.constrain(y, "batch", "length", "kv_heads", None) for y in (key, value))
    return query, key, value


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
    weight = config.null_weight if context.null_weight is None else context.null_weight
    if isinstance(weight, float) and weight == 1.0:
        return null
    logit = null.logit + jnp.log(weight)
    return null._replace(logit=logit if jnp.ndim(logit) else jnp.full(config.num_heads, logit))


def _fused(query, key, value, null: Null, config: AttentionConfig, context: Context) -> AttentionStatistics:
    output, null_mass, lse = null_attention(
        query,
        key,
        value,
        null_logit=null.logit,
        null_key=null.key,
        null_value=null.value,
        is_causal=True,
        window=config.window or None,
        segment_ids=None if context.segment_ids is None else (context.segment_ids, context.key_segments),
        logit_softcap=config.logit_softcap or None,
        scale=config.score_scale,
        sharding=context.placement.attention,
        implementation=backend("null_attention", config.attention_implementation),
    )
    first, visible = first_key_scores(query, key, config, context)
    first_token_mass = jnp.exp(jnp.where(visible, first - lse, -jnp.inf))
    return AttentionStatistics(query, key, value, output, null_mass, first_token_mass, lse, Static(config))


def _dense(query, key, value, null: Null, config: AttentionConfig, context: Context) -> AttentionStatistics:
    """Attention through materialized probabilities."""
    allowed = context_mask(context, config, query.shape[1])
    logits, lse, shares = context.numerics.tap("scores", scores(query, key, config)), None, None
    if config.normalizer in DENSE_NORMALIZERS:
        p = DENSE_NORMALIZERS[config.normalizer](logits, allowed, config)
        null_mass = jax.nn.relu(1.0 - p.sum(-1))
    else:
        null_logit, shares = null_scores(
            query, null.logit, null.key, scale=config.score_scale, softcap=config.logit_softcap or None
        )
        p, null_mass, lse = null_softmax(logits, allowed, null_logit)
    p = context.numerics.tap("probabilities", p)
    batch, _, length, keys = p.shape
    grouped = p.reshape(batch, key.shape[2], -1, length, keys).astype(value.dtype)
    output = jnp.einsum("BKGTS,BSKH->BTKGH", grouped, value).reshape(query.shape)
    if null.value is not None:
        output = add_null_value(NullAttention(output, null_mass, lse), null.value, shares).output
    return AttentionStatistics(query, key, value, output, null_mass, _first_mass(p, context), lse, Static(config))


def _first_mass(p: Float[Array, "B N T S"], context: Context) -> Float[Array, "B N T"]:
    """Each query's probability of the first key of its own document."""
    if context.segment_ids is None:
        return p[..., 0]
    first = jnp.broadcast_to(first_in_document(context, p.shape[2])[:, None, :, None], (*p.shape[:3], 1))
    return jnp.take_along_axis(p, first, axis=-1)[..., 0]


def output_projection(
    p: Parameters,
    config: AttentionConfig,
    x: Float[Array, "B T D"],
    heads: Float[Array, "B T N H"],
    context: Context,
) -> Float[Array, "B T D"]:
    """Gates the heads' outputs and projects them back to the width."""
    numerics = context.numerics
    if config.gate == "elementwise":
        heads = heads * jax.nn.sigmoid(numerics.einsum("gate", "BTD,DNH->BTNH", x, p["gate"]))
    elif config.gate == "per_head":
        heads = heads * jax.nn.sigmoid(numerics.einsum("gate", "BTD,DN->BTN", x, p["gate"]))[..., None]
    output = numerics.einsum("output", "BTNH,NHD->BTD", heads, p["output"])
    if config.output_bias:
        output = output + p["output_bias"]
    return context.constrain(output, "batch", "length", None)


class Attention(ParameterModule):
    """`attention` with its parameters, as an NNX module: `Attention(AttentionConfig(width=256, num_heads=8),
    rngs=rngs)`.
    """

    def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
        super().__init__(attention_parameters(config), rngs=rngs)
        self.config = config

    def __call__(
        self, x: Float[Array, "B T D"], context: Context = _NO_CONTEXT
    ) -> tuple[Float[Array, "B T D"], AttentionStatistics]:
        """See `attention`."""
        return attention(self.parameters, self.config, x, context)
