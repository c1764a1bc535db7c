"""Attention that can say "nothing here", to itself or to another sequence: one pure function, one table of parameters,
one NNX module.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from oasis_jax.config import AttentionConfig
from oasis_jax.errors import UserError, unknown_name
from oasis_jax.model.affine import affine_scaled, linear_clipping
from oasis_jax.model.cache import KVCache
from oasis_jax.model.context import Context
from oasis_jax.model.masks import allowed_keys, context_mask, first_keys, first_of_segment, scores, scores_at
from oasis_jax.model.normalizers import DENSE_NORMALIZERS, null_softmax
from oasis_jax.model.norms import rms_norm
from oasis_jax.model.null import Null, null_option, null_parameters
from oasis_jax.model.parameters import (
    ParameterModule,
    Parameters,
    ParameterSpec,
    constant,
    matrix,
    with_initializers,
)
from oasis_jax.model.rotary import rotary_angles, rotate
from oasis_jax.model.statistics import AttentionStatistics, Static
from pallas_kernels import NullAttention, implementations, null_attention
from pallas_kernels.null_attention import add_null_value, null_scores

_NO_CONTEXT = Context()
# Parameters that are no part of a product in the compute type: the null's, whose scores are float32 or better, and
# gains.
_WIDE = ("null_logit", "null_key", "null_value", "query_norm", "key_norm", "gate_average")


def backend(operator: str, name: str) -> str | None:
    """The `implementation` argument for a configured backend name; raises UserError for one that does not exist."""
    if name == "auto":
        return None
    available = implementations(operator)
    if name not in available:
        raise unknown_name(f"implementation of {operator}", name, ("auto", *available))
    return name


class Keys(NamedTuple):
    """What the queries of a layer attend to.

    segments: ids of queries and keys; a query sees keys of its own id.
    own: of the queries' own sequence, the cached ones first: a query sees none that comes after it. Those of another
      sequence have no place in this one.
    lengths: how many of a cache's places hold tokens, the queries' own among them.
    cache: where they lie, the queries' own among them.
    """

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None
    own: bool
    lengths: Int[Array, " B"] | None = None
    cache: KVCache | None = None

    @property
    def by_place(self) -> bool:
        """Whether a query sees keys by where they lie; else it sees all, but for those of other segments."""
        return self.own and (self.cache is None or self.cache.in_order)


def attention_parameters(config: AttentionConfig, kv_width: int | None = None) -> dict[str, ParameterSpec]:
    """The parameters of one attention layer; the optional ones only where the config asks for them.

    kv_width: width of what keys and values are made of, where it is not config.width.
    """
    width, heads, key_heads, size = config.width, config.num_heads, config.key_heads, config.head_size
    kv_width = width if kv_width is None else kv_width
    specs = {
        "query": matrix((width, heads, size), ("embed", "heads", None), width),
        "key": matrix((kv_width, key_heads, size), ("embed", "kv_heads", None), kv_width),
        "value": matrix((kv_width, key_heads, size), ("embed", "kv_heads", None), kv_width),
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
    specs |= null_parameters(config)
    if config.gate == "elementwise":
        specs["gate"] = matrix((width, heads, size), ("embed", "heads", None), width)
    elif config.gate in ("per_head", "affine"):
        specs["gate"] = matrix((width, heads), ("embed", "heads"), width)
    if config.gate == "affine":
        specs["gate_average"] = constant((heads,), 0.0, "running", ("heads",))
    return specs


def attention(
    parameters: Parameters,
    config: AttentionConfig,
    x: Float[Array, "B T D"],
    context: Context = _NO_CONTEXT,
    *,
    inputs_kv: Float[Array, "B S C"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    own_kv: tuple[Float[Array, "B T D"], Float[Array, "B T D"]] | None = None,
) -> tuple[Float[Array, "B T D"], AttentionStatistics]:
    """Attention with the normalizer that `config.normalizer` names (OASIS, arXiv 2605.17887): causal self-attention, or
    cross-attention to `inputs_kv`.

    Args:
      parameters: as `attention_parameters(config)` lists them.
      config: an AttentionConfig, or a ModelConfig.
      x: [B, T, D], normed already; computed in its type, probabilities in float32 or better.
      context: see Context.
      inputs_kv: another sequence [B, S, C], of which keys and values are made; every query sees all of it. Rotary
        positions (config.rope_theta), a window and a cache have no meaning there.
      kv_segment_ids: its ids, where the context has segment_ids and only there: a query sees keys of its own id.
        Padding has an id that no query has.
      own_kv: of the tokens of x, what keys and what values are made of; None: x. Gates and nulls read x.

    Returns:
      [B, T, D] after the output projection, and the layer's AttentionStatistics.

    Raises:
      UserError: positions, segment_ids or inputs_kv that do not fit x or the config.
    """
    context.check(*x.shape[:2])
    x = context.constrain(x, "batch", "length", None)
    p = {name: value if name in _WIDE else value.astype(x.dtype) for name, value in parameters.items()}
    source = x if inputs_kv is None else _checked_source(p, config, x, context, inputs_kv, kv_segment_ids)
    sources = [context.constrain(y, "batch", "length", None) for y in own_kv] if own_kv else (source, source)
    query, key, value = project(p, config, x, sources, context, own=inputs_kv is None)
    if inputs_kv is None:
        keys = _own_keys(key, value, config, context)
    else:
        segments = None if kv_segment_ids is None else (context.segment_ids, jnp.asarray(kv_segment_ids))
        keys = Keys(key, value, segments, own=False)
    null = null_option(p, config, x, context)
    if config.normalizer in DENSE_NORMALIZERS or context.numerics.materializes_attention:
        statistics = _dense(query, keys, null, config, context)
    else:
        statistics = _fused(query, keys, null, config, context)
    heads = context.numerics.tap("context", statistics.head_output)
    if config.gate == "affine":
        scale = linear_clipping(context.numerics.einsum("gate", "BTD,DN->BTN", x, p["gate"]))
        heads = affine_scaled(heads, _mean_of_values(query, keys, config, context), scale, p["gate_average"])
    return output_projection(p, config, x, heads, context), statistics


def _own_keys(
    key: Float[Array, "B T K H"], value: Float[Array, "B T K H"], config: AttentionConfig, context: Context
) -> Keys:
    """The keys of a pass's own tokens, in the cache where there is one."""
    ids, cache = context.segment_ids, context.cache
    if cache is None:
        return Keys(key, value, None if ids is None else (ids, ids), own=True)
    if not cache.in_order and cache.size != config.window:
        raise UserError(
            f"context.cache: a ring of {cache.size} places is of a window of {cache.size}, got {config.window}"
        )
    cache = cache.extended(key, value, ids)
    segments = None if ids is None else (ids, cache.segment_ids)
    lengths = jnp.broadcast_to(cache.live, key.shape[:1])
    return Keys(*cache.read(key.dtype), segments, own=True, lengths=lengths, cache=cache)


def _checked_source(p: Parameters, config: AttentionConfig, x, context: Context, inputs_kv, kv_segment_ids):
    """inputs_kv in x's type.

    Raises:
      UserError: it, its ids or the config do not fit.
    """
    batch, width = x.shape[0], p["key"].shape[0]
    inputs_kv = jnp.asarray(inputs_kv)
    if inputs_kv.ndim != 3 or (inputs_kv.shape[0], inputs_kv.shape[2]) != (batch, width):
        raise UserError(f"inputs_kv: must have the shape [{batch}, S, {width}], got {inputs_kv.shape}")
    if (kv_segment_ids is None) != (context.segment_ids is None):
        raise UserError("kv_segment_ids: must be given where the context has segment_ids, and only there")
    if kv_segment_ids is not None:
        ids = jnp.asarray(kv_segment_ids)
        if ids.shape != inputs_kv.shape[:2] or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise UserError(
                f"kv_segment_ids: must be integers of shape {inputs_kv.shape[:2]}, got {ids.dtype} of shape {ids.shape}"
            )
    for name in ("rope_theta", "window"):
        if getattr(config, name):
            raise UserError(
                f"attention.{name}: must be 0 where keys come from another sequence, got {getattr(config, name)}"
            )
    if context.cache is not None:
        raise UserError("context.cache: is of self-attention; keys of another sequence are made of inputs_kv")
    return context.constrain(inputs_kv.astype(x.dtype), "batch", None, None)


def project(
    p: Parameters,
    config: AttentionConfig,
    x: Float[Array, "B T D"],
    sources: Sequence[Float[Array, "B S C"]],
    context: Context,
    *,
    own: bool,
) -> tuple[Array, ...]:
    """Queries of x [B, T, N, H], keys and values of one source each [B, S, K, H]: projected, normed and turned.

    own: the sources are of the tokens of x.
    """
    found = []
    for name, inputs in zip(("query", "key", "value"), (x, *sources)):
        y = context.numerics.einsum(name, "BTD,DNH->BTNH", inputs, p[name])
        found.append(y + p[f"{name}_bias"] if config.qkv_bias else y)
    query, key, value = found
    if config.qk_norm:
        query = rms_norm(query, p["query_norm"], config.norm_epsilon)
        key = rms_norm(key, p["key_norm"], config.norm_epsilon)
    if config.rope_theta:
        cos, sin = rotary_angles(config, context.positions_of(x.shape[1]), x.dtype)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    query = context.constrain(query, "batch", "length", "heads", None)
    length = "length" if own else None
    key, value = (context.constrain(y, "batch", length, "kv_heads", None) for y in (key, value))
    return query, key, value


def _attend(query: Array, keys: Keys, null: Null, config: AttentionConfig, context: Context) -> NullAttention:
    return null_attention(
        query,
        keys.key,
        keys.value,
        null_logit=null.logit,
        null_key=null.key,
        null_value=null.value,
        is_causal=keys.by_place,
        window=(config.window or None) if keys.by_place else None,
        segment_ids=keys.segments,
        query_offset=context.cached if keys.cache is not None and keys.by_place else None,
        kv_lengths=keys.lengths,
        logit_softcap=config.logit_softcap or None,
        scale=config.score_scale,
        sharding=context.placement.attention,
        implementation=backend("null_attention", config.attention_implementation),
    )


def _mean_of_values(query: Array, keys: Keys, config: AttentionConfig, context: Context) -> Float[Array, "B T N H"]:
    """Of the values that each query sees: what one of zeros takes of them, in any of the ways that queries see keys."""
    return _attend(jnp.zeros_like(query), keys, Null(-jnp.inf), config, context).output


def _fused(query, keys: Keys, null: Null, config: AttentionConfig, context: Context) -> AttentionStatistics:
    key, value = keys.key, keys.value
    output, null_mass, lse = _attend(query, keys, null, config, context)
    first, visible = _first_keys(keys, config, context, query.shape[1])
    score = scores_at(query, key, None if keys.segments is None else first, config)
    first_token_mass = jnp.exp(jnp.where(visible[:, None], score - lse, -jnp.inf))
    static = _static(keys, config)
    return AttentionStatistics(query, key, value, output, null_mass, first_token_mass, lse, static, keys.cache)


def _dense(query, keys: Keys, null: Null, config: AttentionConfig, context: Context) -> AttentionStatistics:
    """Attention through materialized probabilities."""
    key, value = keys.key, keys.value
    if keys.own:
        allowed = context_mask(context, config, query.shape[1])
    else:
        places = jnp.arange(query.shape[1])[None], jnp.arange(key.shape[1])[None]
        ids = {} if keys.segments is None else dict(zip(("query_segments", "key_segments"), keys.segments))
        allowed = allowed_keys(*places, window=0, causal=False, **ids)
    if keys.lengths is not None:  # a probability of zero does not hide what lies in a cache's empty places
        live = (jnp.arange(key.shape[1]) < keys.lengths[:, None])[:, :, None, None]
        key, value = (jnp.where(live, x, jnp.zeros((), x.dtype)) for x in (key, value))
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
    batch, _, length, count = p.shape
    grouped = p.reshape(batch, key.shape[2], -1, length, count).astype(value.dtype)
    output = jnp.einsum("BKGTS,BSKH->BTKGH", grouped, value).reshape(query.shape)
    if null.value is not None:
        output = add_null_value(NullAttention(output, null_mass, lse), null.value, shares).output
    first, visible = _first_keys(keys, config, context, length)
    at = jnp.broadcast_to(first[:, None, :, None], (*p.shape[:3], 1))
    first_token_mass = jnp.where(visible[:, None], jnp.take_along_axis(p, at, axis=-1)[..., 0], 0.0)
    static = _static(keys, config)
    return AttentionStatistics(
        query, keys.key, keys.value, output, null_mass, first_token_mass, lse, static, keys.cache
    )


def _first_keys(keys: Keys, config: AttentionConfig, context: Context, length: int) -> tuple[Array, Array]:
    """Where the first key of each query's own document lies, and whether the query may see it."""
    if keys.own:
        return first_keys(context, config, length)
    if keys.segments is None:
        return jnp.zeros((1, length), jnp.int32), jnp.ones((1, length), bool)
    return first_of_segment(*keys.segments)


def _static(keys: Keys, config: AttentionConfig) -> Static | None:
    """How the probabilities follow from query and key, which is written down for self-attention by place only."""
    return Static(config, keys.segments is not None) if keys.by_place else None


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
    # S for the size of a head: einsum contracts in the order of the alphabet, and in another order than they lie in, a
    # CPU would turn all weights around first, for every token.
    output = numerics.einsum("output", "BTNS,NSD->BTD", heads, p["output"])
    if config.output_bias:
        output = output + p["output_bias"]
    return context.constrain(output, "batch", "length", None)


class Attention(ParameterModule):
    """`attention` with its parameters, as an NNX module: `Attention(AttentionConfig(width=256, num_heads=8),
    rngs=rngs)`.

    Args:
      config: of the layer; biases are its qkv_bias and output_bias.
      kv_width: width of `inputs_kv`, where it is another than config.width.
      kernel_init, bias_init: initializers as Flax has them, of the projections (as matrices of inputs and outputs) and
        of the biases; None: normal with standard deviation fan_in ** -0.5, and zero.
      param_dtype: of the parameters; the layer computes in the type of its input.
    """

    def __init__(
        self,
        config: AttentionConfig,
        *,
        kv_width: int | None = None,
        kernel_init: Callable | None = None,
        bias_init: Callable | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        specs = with_initializers(attention_parameters(config, kv_width), kernel_init, bias_init)
        super().__init__(specs, param_dtype=param_dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context = _NO_CONTEXT,
        *,
        inputs_kv: Float[Array, "B S C"] | None = None,
        kv_segment_ids: Int[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], AttentionStatistics]:
        """See `attention`."""
        given = dict(inputs_kv=inputs_kv, kv_segment_ids=kv_segment_ids)
        return attention(self.parameters, self.config, x, context, **given)
