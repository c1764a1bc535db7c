"""The two programs of decoding: prompts of unequal length at once, and one more token a row behind a cache."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.model.cache import KVCache, RingCache
from oasis_jax.model.context import Context
from oasis_jax.model.decoder import final_stream, parameter_specs
from oasis_jax.model.head import head_kernel, project_outputs
from oasis_jax.model.layer import SUBLAYERS
from oasis_jax.model.layout import is_stacked, unstack_layers
from oasis_jax.model.numerics import FLOAT, Numerics, OutputsFirst

Caches = tuple[KVCache, ...]


def for_length(config: ModelConfig, length: int) -> ModelConfig:
    """The config that decodes up to so many tokens.

    LongRoPE's list of factors depends on the longest position of a text: the one of all `length` tokens serves from the
    first on, or keys in the cache would be turned otherwise than later ones.

    Raises:
      UserError: the model cannot decode, or not so far.
    """
    if config.inputs != "tokens":
        raise UserError(f"generate: needs a model of tokens, but model.inputs={config.inputs}")
    if config.normalizer == "clipped" and not config.clip_gamma:
        raise UserError(
            "generate: clipped softmax with gamma = -clip_alpha / number of keys changes with every token; "
            "set model.clip_gamma"
        )
    if config.context_length and length > config.context_length:
        raise UserError(
            f"generate: prompt and new tokens are {length} together, but the model was made for {config.context_length}"
        )
    room = config.learned_positions - config.position_offset
    if config.learned_positions and length > room:
        raise UserError(f"generate: prompt and new tokens are {length} together, but the model has {room} positions")
    scaling = config.rope_scaling
    if scaling and scaling.kind == "longrope" and length + config.position_offset > scaling.original_length:
        scaling = dataclasses.replace(scaling, short_factors=scaling.long_factors)
        return dataclasses.replace(config, rope_scaling=scaling)
    return config


def for_steps(params: Mapping[str, Any], config: ModelConfig, numerics: Numerics) -> Mapping[str, Any]:
    """Parameters as steps read them: on a CPU a copy, layer by layer and in float with the weights' outputs first.

    A step on a CPU would copy every layer's out of the stack, for every token; why outputs come first, OutputsFirst
    says.
    """
    if jax.default_backend() != "cpu":
        return params
    if numerics is not FLOAT:
        return _unstacked(params) if is_stacked(params) else params
    found = _outputs_first(params, config)
    return found | {"head": {"kernel": OutputsFirst(params["embedding"]["table"])}} if config.tied_head else found


_unstacked = jax.jit(unstack_layers)


@functools.partial(jax.jit, static_argnames="config")
def _outputs_first(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """All but a tied head, which is there already."""
    params, specs = unstack_layers(params) if is_stacked(params) else dict(params), parameter_specs(config)["layers"]

    def turned(group: str, name: str, array: Array) -> Array | OutputsFirst:
        spec = specs[group][name]
        if group not in SUBLAYERS or spec.role != "matrix":
            return array
        return OutputsFirst.of(array, 1 if spec.axes[0] == "embed" else array.ndim - 1)  # out of the stream or into it

    params["layers"] = {
        index: {group: {name: turned(group, name, x) for name, x in own.items()} for group, own in layer.items()}
        for index, layer in params["layers"].items()
    }
    if not config.tied_head:
        params["head"] = {"kernel": OutputsFirst.of(params["head"]["kernel"], 1)}
    return params


def prefill(
    params: Mapping[str, Any],
    config: ModelConfig,
    ids: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    size: int,
    context: Context,
    storage: str = "float",
) -> tuple[Float[Array, "B V"], Caches]:
    """Runs prompts.

    Args:
      ids: of every row the first `lengths` are its prompt; what follows is anything below the vocabulary's size.
      size: places of the caches. A layer whose window is shorter has a ring of as many as its window.
      context: placement and numerics.
      storage: how keys and values are kept, a name of `oasis_jax.model.cache.STORAGES`. The prompts themselves are run
        with them as they are.

    Returns:
      Logits [B, V], float32 or better, of the token behind each prompt, and the caches of all layers.
    """
    context = context.replace(placement=context.placement.with_whole_stream())
    entries = lambda _, layer: (layer.attention.key, layer.attention.value)
    final, run = final_stream(params, config, ids, context, on_layer=entries, loop=True)
    last = jnp.take_along_axis(final, (lengths - 1)[:, None, None], axis=1)
    found = []
    for index, (key, value) in enumerate(run.layers):
        window = config.layer(index).window
        kind, places = (RingCache, window) if 0 < window < size else (KVCache, size)
        found.append(kind.of(key, value, places, lengths=lengths, storage=storage))
    return _logits(params, config, last, context), tuple(found)


def step(
    params: Mapping[str, Any], config: ModelConfig, tokens: Int[Array, " B"], caches: Caches, context: Context
) -> tuple[Float[Array, "B V"], Caches]:
    """Reads one more token a row.

    Returns:
      Logits [B, V], float32 or better, of the token behind it, and the caches with it.
    """
    context = context.replace(cache=caches, placement=context.placement.with_whole_stream())
    kept = lambda _, layer: layer.attention.cache
    final, run = final_stream(params, config, tokens[:, None], context, on_layer=kept)
    return _logits(params, config, final, context), tuple(run.layers)


def _logits(params, config: ModelConfig, final: Float[Array, "B 1 D"], context: Context) -> Float[Array, "B V"]:
    """Without the padding of the vocabulary."""
    outputs = project_outputs(head_kernel(params), config, final, context.replace(cache=None))
    return outputs[:, 0, : config.vocab_size]
