"""Self-attention that can say "nothing here": one pure function, one table of parameters, one NNX module."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from oasis_jax.config import AttentionConfig
from oasis_jax.errors import unknown_name
from oasis_jax.model.normalizers import DENSE_NORMALIZERS, NULL_LOGITS, null_softmax
from oasis_jax.model.norms import rms_norm
from oasis_jax.model.numerics import FLOAT, Numerics
from oasis_jax.model.parameters import ParameterModule, Parameters, ParameterSpec, constant, matrix
from oasis_jax.model.statistics import AttentionStatistics, Static
from pallas_kernels import OperatorSharding, implementations, null_attention, zigzag

Constrain = Callable[[Array, tuple[str | None, ...]], Array]


def unconstrained(x: Array, axes: tuple[str | None, ...]) -> Array:
    """The `constrain` of a model that is not sharded."""
    del axes
    return x


def operator_sharding(constrain: Constrain) -> OperatorSharding | None:
    """How attention is split over devices: what a `constrain` carries as its attribute `operators`, else nothing."""
    return getattr(constrain, "operators", None)


def _positions(length: int, sharding: OperatorSharding | None) -> Int[Array, "1 T"]:
    """0 .. T-1, in the order in which the sequence lies on its devices."""
    positions = jnp.arange(length)[None]
    return zigzag(positions, sharding.ways("sequence")) if sharding and sharding.layout == "zigzag" else positions


def backend(operator: str, name: str) -> str | None:
    """The `implementation` argument for a configured backend name; raises UserError for one that does not exist."""
    if name == "auto":
        return None
    available = implementations(operator)
    if name not in available:
        raise unknown_name(f"implementation of {operator}", name, ("auto", *available))
    return name


def rope(x: Float[Array, "B T N H"], positions: Int[Array, "#B T"], theta: float) -> Float[Array, "B T N H"]:
    """Rotary positions (Su et al., arXiv 2104.09864): channel i of the first half turns with channel i of the
    second.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _allowed(query: Array, key: Array, config: AttentionConfig, segment_ids: Int[Array, "B T"] | None) -> Array:
    """Which of the first S keys a query may see: [1 or B, 1, T, S]."""
    distance = jnp.arange(query.shape[1])[:, None] - jnp.arange(key.shape[1])[None, :]
    allowed = (distance >= 0) & ((distance < config.window) if config.window else True)
    allowed = allowed[None, None]
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, None, :, None] == segment_ids[:, None, None, : key.shape[1]])
    return allowed


def _scores(query: Array, key: Array, config: AttentionConfig) -> Float[Array, "B N T S"]:
    """Scaled, soft-capped scores in float32 or better; key may hold fewer positions than query."""
    batch, length, heads, size = query.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(batch, length, key.shape[2], -1, size)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=wide) * size**-0.5
    if config.logit_softcap:
        scores = config.logit_softcap * jnp.tanh(scores / config.logit_softcap)
    return scores.reshape(batch, heads, length, key.shape[1])


def _fused(query, key, value, null_logit, config: AttentionConfig, segment_ids, sharding) -> AttentionStatistics:
    output, null_mass, lse = null_attention(
        query,
        key,
        value,
        null_logit=null_logit,
        is_causal=True,
        window=config.window or None,
        segment_ids=segment_ids,
        logit_softcap=config.logit_softcap or None,
        sharding=sharding,
        implementation=backend("null_attention", config.attention_implementation),
    )
    first_key = key[:, :1]  # position 0 comes first in every layout
    first = _scores(query, first_key, config)[..., 0]
    allowed = _allowed(query, first_key, config, segment_ids)[..., 0]
    first_token_mass = jnp.where(allowed, jnp.exp(jnp.where(allowed, first - lse, 0.0)), 0.0)
    return AttentionStatistics(query, key, value, output, null_mass, first_token_mass, lse, Static(config))


def _dense(
    query, key, value, null_logit, config: AttentionConfig, segment_ids, numerics: Numerics
) -> AttentionStatistics:
    """Attention through materialized probabilities; `null_logit` is for the normalizers of the fused operator."""
    allowed = _allowed(query, key, config, segment_ids)
    scores = numerics.tap("scores", _scores(query, key, config))
    if config.normalizer in DENSE_NORMALIZERS:
        p, lse = DENSE_NORMALIZERS[config.normalizer](scores, allowed, config), None
        null_mass = jax.nn.relu(1.0 - p.sum(-1))
    else:
        p, null_mass, lse = null_softmax(scores, allowed, null_logit)
    p = numerics.tap("probabilities", p)
    batch, _, length, keys = p.shape
    grouped = p.reshape(batch, key.shape[2], -1, length, keys).astype(value.dtype)
    output = jnp.einsum("BKGTS,BSKH->BTKGH", grouped, value).reshape(query.shape)
    return AttentionStatistics(query, key, value, output, null_mass, p[..., 0], lse, Static(config))


def attention_parameters(config: AttentionConfig) -> dict[str, ParameterSpec]:
    """The parameters of one attention layer; the optional ones only where the config asks for them."""
    width, heads, key_heads, size = config.width, config.num_heads, config.key_heads, config.head_size
    specs = {
        "query": matrix((width, heads, size), ("embed", "heads", None), width),
        "key": matrix((width, key_heads, size), ("embed", "kv_heads", None), width),
        "value": matrix((width, key_heads, size), ("embed", "kv_heads", None), width),
        "output": matrix((heads, size, width), ("heads", None, "embed"), heads * size),
    }
    if config.qk_norm:
        specs |= {"query_norm": constant((size,), 1.0), "key_norm": constant((size,), 1.0)}
    if NULL_LOGITS.get(config.normalizer, 0.0) is None:
        specs["null_logit"] = ParameterSpec((heads,), ("heads",), jax.nn.initializers.zeros)
    if config.gate == "elementwise":
        specs["gate"] = matrix((width, heads, size), ("embed", "heads", None), width)
    elif config.gate == "per_head":
        specs["gate"] = matrix((width, heads), ("embed", "heads"), width)
    return specs


def attention(
    parameters: Parameters,
    config: AttentionConfig,
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "#B T"] | None = None,
    constrain: Constrain = unconstrained,
    numerics: Numerics = FLOAT,
) -> tuple[Float[Array, "B T D"], AttentionStatistics]:
    """Causal self-attention with the normalizer that `config.normalizer` names (OASIS, arXiv 2605.17887).

    Args:
      parameters: as `attention_parameters(config)` lists them.
      config: an AttentionConfig, or a ModelConfig.
      x: [B, T, D], normed already; computed in its type, probabilities in float32 or better.
      segment_ids: [B, T]; attention stays within equal ids.
      positions: [B, T] or [1, T] for the rotary embedding; default 0 .. T-1.
      constrain: function (array, logical axes) -> array that pins the sharding of activations; its attribute
        `operators`, where it has one, splits the operator over devices. With layout="zigzag" x, segment_ids and
        positions are in that order.
      numerics: how linear layers are computed and activations rounded.

    Returns:
      [B, T, D] after the output projection, and the layer's AttentionStatistics.
    """
    x = constrain(x, ("batch", "length", None))
    p = {name: value.astype(x.dtype) for name, value in parameters.items() if name != "null_logit"}
    query, key, value = (numerics.einsum(name, "BTD,DNH->BTNH", x, p[name]) for name in ("query", "key", "value"))
    if config.qk_norm:
        query, key = rms_norm(query, parameters["query_norm"]), rms_norm(key, parameters["key_norm"])
    if config.rope_theta:
        positions = _positions(x.shape[1], operator_sharding(constrain)) if positions is None else positions
        query, key = rope(query, positions, config.rope_theta), rope(key, positions, config.rope_theta)
    query = constrain(query, ("batch", "length", "heads", None))
    key, value = (constrain(y, ("batch", "length", "kv_heads", None)) for y in (key, value))

    null_logit = NULL_LOGITS.get(config.normalizer)
    if null_logit is None:  # learned, or of no use to this normalizer
        null_logit = parameters.get("null_logit")
    sharding = operator_sharding(constrain)
    if numerics.materializes_attention and sharding and sharding.layout == "zigzag":
        raise ValueError(
            "attention: numerics that see scores and probabilities need the sequence in order, not layout='zigzag'"
        )
    if config.normalizer in DENSE_NORMALIZERS or numerics.materializes_attention:
        statistics = _dense(query, key, value, null_logit, config, segment_ids, numerics)
    else:
        statistics = _fused(query, key, value, null_logit, config, segment_ids, sharding)

    heads = numerics.tap("context", statistics.head_output)
    if config.gate == "elementwise":
        heads = heads * jax.nn.sigmoid(numerics.einsum("gate", "BTD,DNH->BTNH", x, p["gate"]))
    elif config.gate == "per_head":
        heads = heads * jax.nn.sigmoid(numerics.einsum("gate", "BTD,DN->BTN", x, p["gate"]))[..., None]
    output = numerics.einsum("output", "BTNH,NHD->BTD", heads, p["output"])
    return constrain(output, ("batch", "length", None)), statistics


class Attention(ParameterModule):
    """`attention` with its parameters, as an NNX module: `Attention(AttentionConfig(width=256, num_heads=8),
    rngs=rngs)`.
    """

    def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
        super().__init__(attention_parameters(config), rngs=rngs)
        self.config = config

    def __call__(self, x: Float[Array, "B T D"], **options) -> tuple[Float[Array, "B T D"], AttentionStatistics]:
        """See `attention` for the options and what comes back."""
        return attention(self.parameters, self.config, x, **options)
