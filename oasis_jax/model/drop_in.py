"""The operator in the places of other libraries: the `attention_fn` of Flax' multi-head attention, and
`jax.nn.dot_product_attention`.

Both follow their library where `null_attention` differs: causality counts from the first query and the first key, local
windows may look ahead, masks may be 0 and 1, and there may be any number of batch dimensions. With null_logit=-inf they
compute what the library computes, but for queries without any key: those give 0 (or the null value), where Flax and JAX
give the mean of all values.
"""

import functools
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import OperatorSharding, null_attention


class _AttentionFn:
    """Attention with a null under the signature of Flax' `dot_product_attention`, NNX and Linen.

    call: `null_attention` with what is constant.
    learned: names of the null arguments that are attributes.
    """

    def __init__(self, call: Callable, learned: dict[str, nnx.Variable]):
        self.call, self.learned = call, tuple(learned)
        for name, variable in learned.items():
            setattr(self, name, variable)

    # Linen passes what stands in the signature and drops the rest: everything is written out.
    def __call__(
        self,
        query: Float[Array, "*batch T N H"],
        key: Float[Array, "*batch S K H"],
        value: Float[Array, "*batch S K H"],
        bias: Float[Array, "..."] | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        promote_dtype: Callable = flax_promote_dtype,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable | None = None,
        qk_attn_weights_einsum: Callable | None = None,
        attn_weights_value_einsum: Callable | None = None,
        input_positions: Array | None = None,
    ) -> Float[Array, "*batch T N H"]:
        del broadcast_dropout, dropout_rng, force_fp32_for_softmax  # no dropout; statistics are float32 or better
        if not deterministic and not (isinstance(dropout_rate, numbers.Real) and dropout_rate == 0):
            raise ValueError(
                "dropout_rate: must be 0 where deterministic is False (probabilities are never held, so none can be "
                f"dropped), got {dropout_rate!r}"
            )
        if module is not None:
            raise ValueError("module: must be None (sow_weights=False): the probabilities are never held")
        if precision not in (None, "default", lax.Precision.DEFAULT):
            raise ValueError(f"precision: must be None, the backend chooses its own, got {precision!r}")
        if input_positions is not None:
            raise ValueError("input_positions: must be None: turn query and key before")
        einsums = dict(
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        for name, given in einsums.items():
            if given is not None:
                raise ValueError(f"{name}: must be None, the backend multiplies in its own way, got {given!r}")
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        learned = {name: getattr(self, name)[...] for name in self.learned}
        return _over_batches(functools.partial(self.call, **learned), query, key, value, bias, mask, is_causal)


class _LearnedAttentionFn(_AttentionFn, nnx.Module):
    """With parameters of its own, which become those of the module that it is given to."""


def attention_fn(
    *,
    null_logit: float | Float[Array, " N"] | Float[Array, "*batch T N"] | nnx.Variable[Any] = 0.0,
    null_key: Float[Array, "K H"] | Float[Array, "P K H"] | nnx.Variable[Any] | None = None,
    null_value: Float[Array, "K H"] | Float[Array, "P K H"] | nnx.Variable[Any] | None = None,
    window: int | None = None,
    logit_softcap: float | None = None,
    scale: float | None = None,
    sharding: OperatorSharding | None = None,
    implementation: str | None = None,
) -> Callable[..., Float[Array, "*batch T N H"]]:
    """Attention with a null for `flax.nnx.MultiHeadAttention` and `flax.linen.MultiHeadDotProductAttention`:

        nnx.MultiHeadAttention(num_heads=8, in_features=64, decode=False, attention_fn=attention_fn(), rngs=rngs)
        linen.MultiHeadDotProductAttention(num_heads=8, attention_fn=attention_fn(null_logit=logits))

    A query without any key gives 0, or the null value, where Flax gives the mean of all values.

    Args:
      null_logit, null_key, null_value, window, logit_softcap, scale, sharding, implementation: see
        `pallas_kernels.null_attention`; a window looks back only and needs as many queries as keys. An `nnx.Param` is
        learned: it becomes a parameter of the NNX module that the function is given to. In Linen the
        module around passes its own `self.param`.

    Returns:
      A function of query [..., T, N, H], key and value [..., S, K, H] and the further arguments of Flax'
      `dot_product_attention`. bias and mask are broadcast to [..., N, T, S]; a mask of numbers hides where it is 0.
      It raises ValueError, by name, for dropout_rate > 0 (unless deterministic), module (sow_weights), precision,
      input_positions and einsums of the caller's.
    """
    nulls = dict(null_logit=null_logit, null_key=null_key, null_value=null_value)
    learned = {name: x for name, x in nulls.items() if isinstance(x, nnx.Variable)}
    call = functools.partial(
        null_attention,
        **{name: x for name, x in nulls.items() if name not in learned},
        window=window,
        logit_softcap=logit_softcap,
        scale=scale,
        sharding=sharding,
        implementation=implementation,
    )
    return (_LearnedAttentionFn if learned else _AttentionFn)(call, learned)


def _over_batches(call: Callable, query, key, value, bias, mask, is_causal: bool) -> Float[Array, "*batch T N H"]:
    """`call` over all batch dimensions as one, causality counted from the first query and key."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3 or x.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name}: must be [..., length, heads, head size] with the batch of query {query.shape}, got shape "
                f"{x.shape}"
            )
    batch = query.shape[:-3]
    one_batch = lambda x: x.reshape(math.prod(batch), *x.shape[-3:])
    null_logit = jnp.asarray(call.keywords["null_logit"])
    if null_logit.ndim > 1 and null_logit.shape == query.shape[:-1]:
        call = functools.partial(call, null_logit=null_logit.reshape(-1, *null_logit.shape[-2:]))
    full = (*batch, query.shape[-2], query.shape[-3], key.shape[-3])
    if bias is not None:
        bias = jnp.asarray(bias)
        bias = _scores_like("bias", bias if jnp.issubdtype(bias.dtype, jnp.floating) else bias.astype("float32"), full)
    if mask is not None:
        mask = _scores_like("mask", jnp.asarray(mask).astype(bool), full)
    if call.keywords["window"] is not None and query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"window: {query.shape[-3]} queries and {key.shape[-3]} keys do not say which places queries have; give a "
            "mask instead"
        )
    output = call(
        one_batch(query),
        one_batch(key),
        one_batch(value),
        is_causal=is_causal,
        bias=bias,
        mask=mask,
        query_offset=0 if is_causal else None,
    ).output
    return output.reshape(query.shape)


def _scores_like(name: str, x: Array, full: tuple[int, ...]) -> Array:
    """What can be broadcast to `full`, [*batch, N, T, S], with one batch dimension and each dimension 1 or full."""
    shape = (1,) * (len(full) - x.ndim) + x.shape
    if len(shape) != len(full) or any(size not in (1, wanted) for size, wanted in zip(shape, full)):
        raise ValueError(f"{name}: must have a shape that can be broadcast to {full}, got {x.shape}")
    batch, tail = full[:-3], shape[-3:]
    if all(size == 1 for size in shape[:-3]):
        return x.reshape(1, *tail)
    return jnp.broadcast_to(x.reshape(shape), (*batch, *tail)).reshape(-1, *tail)


def dot_product_attention(
    query: Float[Array, "B T N H"] | Float[Array, "T N H"],
    key: Float[Array, "B S K H"] | Float[Array, "S K H"],
    value: Float[Array, "B S K H"] | Float[Array, "S K H"],
    bias: Float[Array, "#B #N #T #S"] | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, " B"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    null_logit: float | Float[Array, " N"] | Float[Array, "B T N"] = 0.0,
    null_key: Float[Array, "K H"] | Float[Array, "P K H"] | None = None,
    null_value: Float[Array, "K H"] | Float[Array, "P K H"] | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`jax.nn.dot_product_attention` with a null: its arguments, then the null's.

    What differs: a query without any key gives 0, or the null value, where JAX gives the mean of all values; the
    residual is differentiable, where JAX' gradient of it is silently 0; implementations are those of
    `pallas_kernels.null_attention`.

    Args:
      query, key, value: [B, T, N, H] and [B, S, K, H], or all without B; N is a multiple of K.
      bias: added to the scaled scores; each dimension 1 or full, leading ones may be missing.
      mask: True where a query may see a key; likewise.
      scale: factor of the scores; H ** -0.5 where not given.
      is_causal: query i sees keys up to i, whatever T and S are.
      query_seq_lengths: queries beyond them give 0.
      key_value_seq_lengths: keys beyond them are seen by nobody.
      local_window_size: (left, right): query i sees keys i - left to i + right; one number stands for both.
      implementation: a name of `pallas_kernels.implementations("null_attention")`; None: the fastest that can serve.
      return_residual: return log(exp(b) + sum_j exp(s_j)) too, in the dtype of key, b the null's logit.
      null_logit, null_key, null_value: see `null_attention`; -inf: none.

    Returns:
      The output, shaped as query; with return_residual a pair with the residual [B, T, N] or [T, N].

    Raises:
      ValueError: an argument does not fit, or the named implementation cannot serve.
    """
    given, logit = jnp.asarray(query), jnp.asarray(null_logit)
    query, key, value = _four(given), _four(jnp.asarray(key)), _four(jnp.asarray(value))
    padded = _segments(query, key, query_seq_lengths, key_value_seq_lengths)
    live = None if query_seq_lengths is None else (padded[0] == 0)[..., None, None]
    if live is not None:
        query = jnp.where(live, query, jnp.zeros((), query.dtype))  # the null's keys would see what lies there
    result = null_attention(
        query,
        key,
        value,
        null_logit=logit[None] if logit.ndim == 2 else logit,
        null_key=null_key,
        null_value=null_value,
        segment_ids=padded,
        mask=None if mask is None else _four(jnp.asarray(mask)),
        bias=None if bias is None else _four(jnp.asarray(bias)),
        scale=scale,
        implementation=implementation,
        **_places(is_causal, local_window_size),
    )
    output = result.output if live is None else jnp.where(live, result.output, jnp.zeros((), query.dtype))
    output = output.reshape(given.shape)
    if not return_residual:
        return output
    return output, result.lse.swapaxes(1, 2).astype(key.dtype).reshape(given.shape[:-1])


def _four(x: Array) -> Array:
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _places(is_causal: bool, local_window_size) -> dict[str, Any]:
    """Causality and a window (left, right) as the operator says them: i - left <= j <= i + right is a window that looks
    back from i + right.
    """
    if local_window_size is None:
        return dict(is_causal=is_causal, query_offset=0 if is_causal else None)
    sizes = local_window_size if isinstance(local_window_size, tuple | list) else (local_window_size,) * 2
    try:
        left, right = (operator.index(size) for size in sizes)
    except (TypeError, ValueError, jax.errors.TracerIntegerConversionError):
        raise ValueError(
            f"local_window_size: must be a whole number or a pair (left, right), got {local_window_size!r}"
        ) from None
    right = min(right, 0) if is_causal else right
    if left + right < 0:
        raise ValueError(f"local_window_size: no key lies between {left} to the left and {right} to the right")
    return dict(is_causal=is_causal, window=left + right + 1, query_offset=right)


def _segments(query, key, query_lengths, key_lengths) -> tuple[Int[Array, "B T"], Int[Array, "B S"]] | None:
    """Lengths as segment ids, which every backend serves: live queries and keys have id 0."""
    if query_lengths is None and key_lengths is None:
        return None
    ids = []
    names = ("query_seq_lengths", "key_value_seq_lengths")
    for name, lengths, x, dead in zip(names, (query_lengths, key_lengths), (query, key), (1, 2)):
        shape = x.shape[:2]
        if lengths is None:
            ids.append(jnp.zeros(shape, jnp.int32))
            continue
        lengths = jnp.asarray(lengths)
        if lengths.shape != shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(
                f"{name}: must be integers, one per row of the batch {shape[:1]}, got {lengths.dtype} of shape "
                f"{lengths.shape}"
            )
        ids.append(jnp.where(jnp.arange(shape[1])[None] < lengths[:, None], 0, dead))
    return tuple(ids)
