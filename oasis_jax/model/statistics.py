"""What a forward pass tells about itself: its second result, never a side effect.

The tuples refer to arrays the forward pass makes anyway or cheaply could; under `jax.jit` whatever the caller
does not use is not computed.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from oasis_jax.config import AttentionConfig
from oasis_jax.model.cache import KVCache
from oasis_jax.model.context import Context
from oasis_jax.model.masks import first_in_document, first_of_segment, scores_at
from pallas_kernels import NullAttention, null_attention
from pallas_kernels.null_attention.arguments import check_arguments
from pallas_kernels.null_attention.base import AttentionInputs


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A config among arrays: a pytree node without leaves, so that statistics can leave `jax.jit` with it.

    segments: whether segment ids confined the layer.
    """

    config: AttentionConfig
    segments: bool = False


class AttentionStatistics(NamedTuple):
    """One attention layer. N query heads, K key heads, H head size; masses in float32 or better."""

    query: Float[Array, "B T N H"]  # after QK-norm and rotary positions
    key: Float[Array, "B S K H"]  # S = T but for a cache, which holds the pass's own, and keys of another sequence
    value: Float[Array, "B S K H"]
    head_output: Float[Array, "B T N H"]  # before the gate and the output projection
    null_mass: Float[Array, "B N T"]
    first_token_mass: Float[Array, "B N T"]  # probability each query gives to the first key of its own document
    lse: Float[Array, "B N T"] | None  # log(exp(b) + sum exp s); None for normalizers without it
    static: Static | None = None  # how the probabilities follow from query and key; None: not known
    cache: KVCache | None = None  # the layer's cache with this pass's keys and values; None without one

    @classmethod
    def from_operator(
        cls,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        result: NullAttention,
        **options: Any,
    ) -> "AttentionStatistics":
        """The statistics of a layer that calls the operator itself, for `oasis_jax.evaluation.measure`::

            options = dict(null_logit=0.0, window=512)
            result = null_attention(query, key, value, **options)
            statistics = AttentionStatistics.from_operator(query, key, value, result, **options)

        Args:
          query, key, value, options: those of `pallas_kernels.null_attention`.
          result: what it gave.

        Whole rows (the measures `attention_maps` and `joint`) are read for causal self-attention under a window or
        segment ids; under a mask, a bias, an offset or lengths they are not known, and what needs them does not apply.

        Raises:
          ValueError: options do not fit, as from the operator.
        """
        bound = inspect.signature(null_attention).bind(query, key, value, **options)
        bound.apply_defaults()
        given = {name: x for name, x in bound.arguments.items() if name not in ("sharding", "implementation")}
        inputs, _ = check_arguments(**given)
        first = _first_of_document(inputs, given["segment_ids"])
        config = _config_of(inputs, given)
        score = scores_at(inputs.query, inputs.key, first, config)
        if inputs.masks.bias is not None:
            score = score + _at(inputs.masks.bias, first, inputs)
        seen = jnp.where(_sees(inputs, first), score - result.lse, -jnp.inf)
        by_rule = inputs.options.causal and not inputs.masks.beyond_segments and query.shape[1] == key.shape[1]
        known = by_rule and not isinstance(given["segment_ids"], tuple | list)
        return cls(
            query, key, value, result.output, result.null_mass, jnp.exp(seen), result.lse,
            Static(config, given["segment_ids"] is not None) if known else None,
        )  # fmt: skip


def _config_of(inputs: AttentionInputs, given: Mapping[str, Any]) -> AttentionConfig:
    """How an operator's call makes probabilities, as a layer's config says it."""
    (_, _, heads, size), key_heads, options = inputs.query.shape, inputs.key.shape[2], inputs.options
    if options.scale <= 0:
        raise ValueError(f"scale: must be above 0 to be measured, got {options.scale}")
    logit = given["null_logit"]
    known = isinstance(logit, float | np.ndarray | np.generic)
    without = given["null_key"] is None and known and bool(np.all(np.isneginf(logit)))
    return AttentionConfig(
        width=heads * size,
        num_heads=heads,
        num_kv_heads=key_heads,
        head_dim=size,
        normalizer="softmax" if without else "softmax1",  # which null it is stands in lse and null mass
        window=options.window or 0,
        logit_softcap=options.softcap or 0.0,
        attention_scale=options.scale,
        rope_theta=0.0,
    )


def _first_of_document(inputs: AttentionInputs, segment_ids) -> Int[Array, "#B T"] | None:
    """Where the first key of each query's own document lies; None: it is the first of all."""
    segments = inputs.masks.segments
    if segments is None:
        return None
    if isinstance(segment_ids, tuple | list):
        return first_of_segment(*segments)[0]
    return first_in_document(Context(segment_ids=segments[0]), segments[0].shape[1])


def _sees(inputs: AttentionInputs, first: Int[Array, "#B T"] | None) -> Array:
    """Whether a query may see its key `first`, to be broadcast to [B, N, T]."""
    masks, options, (length, keys) = inputs.masks, inputs.options, (inputs.query.shape[1], inputs.key.shape[1])
    place = jnp.zeros((1, length), jnp.int32) if first is None else first
    distance = masks.first_place(length, keys)[:, None] + jnp.arange(length)[None] - place
    sees = jnp.ones_like(distance, bool)
    if options.causal or options.window:
        sees &= distance >= 0
    if options.window:
        sees &= distance < options.window
    if masks.kv_lengths is not None:
        sees = sees & (place < masks.kv_lengths[:, None])
    if masks.segments is not None:
        same = jnp.take_along_axis(masks.segments[1], jnp.broadcast_to(place, masks.segments[0].shape), axis=1)
        sees = sees & (same == masks.segments[0])
    return sees[:, None] if masks.mask is None else sees[:, None] & _at(masks.mask, first, inputs)


def _at(x: Array, first: Int[Array, "#B T"] | None, inputs: AttentionInputs) -> Array:
    """A mask or bias [#B, #N, #T, #S] at each query's key `first`."""
    if first is None or x.shape[3] == 1:
        return x[..., 0]
    batch, length = inputs.query.shape[:2]
    x = jnp.broadcast_to(x, (batch, x.shape[1], length, x.shape[3]))
    return jnp.take_along_axis(x, jnp.broadcast_to(first, (batch, length))[:, None, :, None], axis=-1)[..., 0]


class RouterStatistics(NamedTuple):
    """One depth router over L sources."""

    weights: Float[Array, "B T L"]
    null_mass: Float[Array, "B T"]
    beta: Float[Array, ""] | None  # strength of the inter-layer null signal; None without coupling


class Statistics(NamedTuple):
    """A whole decoder.

    taps: "attention_norm", "attention_output" (after the output projection), "mlp_norm", "mlp_output" and
      "layer_output" (the stream that the next layer or the final norm reads) hold one [B, T, D] a layer,
      "final_norm" holds one.
    """

    attention: list[AttentionStatistics]
    routers: dict[str, RouterStatistics]
    taps: dict[str, list[Float[Array, "B T D"]]]


def layer_telemetry(attention: AttentionStatistics) -> dict[str, Float[Array, ""]]:
    """The scalars that one attention layer gives to the training log: means over batch, heads and tokens."""
    return {name: getattr(attention, name).mean() for name in ("null_mass", "first_token_mass")}


def telemetry(
    layers: Mapping[str, Float[Array, " L"]], betas: Mapping[str, Float[Array, ""]]
) -> dict[str, Float[Array, ""]]:
    """The scalars of the training log.

    Args:
      layers: `layer_telemetry` of all layers.
      betas: strength of the inter-layer null signal by router; empty without coupling.

    Returns:
      "null_mass", "first_token_mass" and, with coupling, "beta"; each also per layer or router ("null_mass/layer0").
    """
    scalars = {}
    for name, values in layers.items():
        scalars |= {name: values.mean()} | {f"{name}/layer{i}": values[i] for i in range(len(values))}
    if betas:
        scalars["beta"] = jnp.stack(list(betas.values())).mean()
        scalars |= {f"beta/{name}": value for name, value in betas.items()}
    return scalars
