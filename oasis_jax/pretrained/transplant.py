"""Sink transplant: constant first tokens leave the sequence and become null keys and values of the operator.

In a causal model with full attention the tokens of a fixed prefix see only themselves, so that their keys and values
are constants of every layer. As null keys and values they do to all later tokens what they did before, exactly, and
with them leave the massive activations at their positions (PrefixQuant, arXiv 2410.05265, keeps such tokens as a
prefix of the cache; the numbers are the same).
"""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from oasis_jax.config import ModelConfig
from oasis_jax.data.tokenizers import LibraryTokenizer
from oasis_jax.errors import UserError
from oasis_jax.model.context import Context
from oasis_jax.model.decoder import final_stream
from oasis_jax.pretrained.load import Pretrained
from oasis_jax.pretrained.source import ChatTemplate

# Massive activations (Sun et al., arXiv 2402.17762): above 100, and 1000 times the median magnitude of their layer.
MASSIVE, MASSIVE_RATIO = 100.0, 1000.0
MAX_PREFIX = 8


# What is added to the score of a null key in a head that is to have none: its exponential is 0 in float32.
NO_NULL = -1e9


def transplant_sink(
    model: Pretrained,
    prefix: Sequence[int] | int | None = None,
    *,
    value_scale: float = 1.0,
    heads: Bool[np.ndarray, "L N"] | None = None,
) -> Pretrained:
    """The model whose first tokens are a null option of its attention; called on text alone it computes what it did on
    that text behind them.

    Args:
      model: causal, with full attention in every layer and softmax over tokens.
      prefix: the ids of the tokens, a begin token first; None: the model's begin token.
      value_scale: factor of the null values, from 0 to 1; 1 is exact, less is for experiments.
      heads: which heads get the null; None: all, which is exact, fewer are for experiments. See `sink_heads`.

    Raises:
      UserError: a model for which this is not exact, with the reason; no begin token; ids outside the vocabulary; a
        value_scale outside 0 .. 1, heads of another shape.
    """
    prefix = _checked_prefix(model, prefix)
    config = transplanted(model.config, len(prefix))
    if not 0 <= value_scale <= 1:
        raise UserError(f"transplant: value_scale must lie between 0 and 1, got {value_scale}")
    key, value = prefix_keys(model, prefix)
    attention = {**model.params["layers"]["attention"], "null_key": key, "null_value": value * value_scale}
    names = ", ".join(_token_name(model, token) for token in prefix)
    changes = "" if value_scale == 1.0 else f", value times {value_scale:g}"
    if heads is not None:
        shape, heads = (config.num_layers, config.num_heads), np.asarray(heads)
        if heads.shape != shape or heads.dtype != bool:
            raise UserError(f"transplant: heads must be booleans {list(shape)}, got {heads.dtype} {list(heads.shape)}")
        config = dataclasses.replace(config, null_bias=True)
        attention["null_logit"] = jnp.where(heads, 0.0, NO_NULL).astype(jnp.float32)
        changes += f", in {heads.sum()} of {heads.size} heads"
    layers = {**model.params["layers"], "attention": attention}
    change, params = f"sink transplanted: {names}{changes}", {**model.params, "layers": layers}
    return model.changed(config, params, change, begin_token=None, chat=_without_begin(model, prefix))


def transplanted(config: ModelConfig, count: int) -> ModelConfig:
    """The config of a model whose first `count` tokens have become its null; raises as `check_transplant` does."""
    check_transplant(config)
    return dataclasses.replace(
        config, normalizer="null_key_value", null_keys=count, position_offset=config.position_offset + count
    )


def sink_heads(model: Pretrained, rows: Int[Array, "B T"], above: float = 0.3) -> Bool[np.ndarray, "L N"]:
    """The heads that put more than `above` of their mass on the first token, mean over its later queries and rows.

    Args:
      rows: text without a begin token; the model's comes before it.
    """
    if model.begin_token is None:
        raise UserError("transplant: this model's texts have no begin token, at which heads could be told apart")
    rows = np.insert(np.asarray(rows, np.int32), 0, model.begin_token, axis=1)

    @jax.jit
    def run(params, ids):
        context = Context(placement=model.placement)
        mass = lambda _, layer: layer.attention.first_token_mass[:, :, 1:].mean(axis=(0, 2))
        return jnp.stack(final_stream(params, model.config, ids, context, on_layer=mass, loop=True)[1].layers)

    return np.mean([np.asarray(run(model.params, row[None])) for row in rows], axis=0) > above


def _without_begin(model: Pretrained, prefix: Sequence[int]) -> ChatTemplate | None:
    """The chat template, which writes no begin token where that one is transplanted."""
    if not model.chat or not model.chat.begin or not isinstance(model.tokenizer, LibraryTokenizer):
        return model.chat
    writes = model.tokenizer.encode_with_specials(model.chat.begin).tolist()
    return dataclasses.replace(model.chat, begin="") if writes == list(prefix[:1]) else model.chat


def _token_name(model: Pretrained, token: int) -> str:
    text = model.tokenizer.decode([token]).decode(errors="replace") if model.tokenizer else ""
    return f"{token} ({text!r})" if text else str(token)


def _checked_prefix(model: Pretrained, prefix: Sequence[int] | int | None) -> list[int]:
    if prefix is None:
        if model.begin_token is None:
            raise UserError("transplant: this model's texts have no begin token; name the tokens to be transplanted")
        prefix = model.begin_token
    prefix = [int(prefix)] if isinstance(prefix, int | np.integer) else [int(token) for token in prefix]
    if not prefix:
        raise UserError("transplant: the prefix is empty; name at least one token")
    for token in prefix:
        if not 0 <= token < model.config.vocab_size:
            raise UserError(f"transplant: token {token} is outside the vocabulary 0..{model.config.vocab_size - 1}")
    return prefix


def check_transplant(config: ModelConfig) -> None:
    """Raises UserError where a transplant would not be exact."""
    windows = [index for index in range(config.num_layers) if config.layer(index).window]
    if windows:
        named = ", ".join(map(str, windows[:8])) + (", ..." if len(windows) > 8 else "")
        raise UserError(
            f"transplant: exact only where every token sees the first one, but layers {named} have a window; "
            "a null that is always seen would differ from it"
        )
    if config.normalizer != "softmax":
        raise UserError(f"transplant: needs softmax over tokens, but normalizer={config.normalizer}")
    if config.gate == "affine":
        raise UserError("transplant: exact only where the values' mean counts nothing, but model.gate=affine")
    if config.inputs != "tokens":
        raise UserError(f"transplant: needs token inputs, but model.inputs={config.inputs}")


def prefix_keys(model: Pretrained, prefix: Sequence[int]) -> tuple[Array, Array]:
    """Keys, turned as at their positions, and values [L, P, K, H] of a prefix."""
    config = model.config

    @jax.jit
    def run(params, ids):
        context = Context(placement=model.placement.with_whole_stream())
        _, seen = final_stream(
            params,
            config,
            ids,
            context,
            on_layer=lambda _, layer: (layer.attention.key, layer.attention.value),
            loop=True,
        )
        return tuple(jnp.stack([layer[i][0] for layer in seen.layers]) for i in (0, 1))

    # As many rows as the mesh splits a batch into: one alone could not be.
    key, value = run(model.params, np.asarray([prefix] * model.placement.ways("batch"), np.int32))
    return key.astype(config.dtype), value.astype(config.dtype)


def find_prefix(model: Pretrained, rows: Int[Array, "B T"], *, limit: int = MAX_PREFIX) -> list[int]:
    """The tokens whose transplant leaves no massive activation: the begin token, then, one after the other, the token
    at which most massive activations of the calibration text are left.

    Args:
      rows: text without a begin token.
      limit: of the length of the prefix.

    Raises:
      UserError: see `transplant_sink`.
    """
    prefix = _checked_prefix(model, None) if model.begin_token is not None else []
    rows = np.asarray(rows)
    while len(prefix) < limit:
        now = transplant_sink(model, prefix) if prefix else model
        tokens = collections.Counter(rows[_massive_tokens(now, rows)].tolist())
        new = [token for token, _ in tokens.most_common() if token not in prefix]
        if not new:
            break
        prefix.append(new[0])
    if not prefix:
        raise UserError("transplant: the calibration text shows no massive activation, and there is no begin token")
    return prefix


def _massive_tokens(model: Pretrained, rows: Int[Array, "B T"]) -> np.ndarray:
    """Which tokens of the rows carry a massive activation in some layer [B, T]."""
    config = model.config

    def massive(_, layer):
        size = jnp.abs(layer.layer_output.astype(jnp.float32))
        ratio = MASSIVE_RATIO * jnp.median(size, axis=(1, 2), keepdims=True)
        return ((size > MASSIVE) & (size >= ratio)).any(-1)

    @jax.jit
    def run(params, ids):
        _, seen = final_stream(params, config, ids, Context(placement=model.placement), on_layer=massive, loop=True)
        return jnp.stack(seen.layers).any(0)

    return np.concatenate([np.asarray(run(model.params, row[None])) for row in rows])
