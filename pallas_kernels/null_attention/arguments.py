"""The check of null_attention's arguments, the same for every backend: each mistake is one ValueError that names it."""

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.checks import as_array, described, known_number
from pallas_kernels.null_attention.base import AttentionInputs, Masks, Options, Segments, wide_dtype

_LARGEST_WINDOW = 2**24  # places are 32-bit numbers, of which kernels take multiples


class Null(NamedTuple):
    """The null option: its logit in float32 or better, and keys and values [P, K, H] or None."""

    logit: Float[Array, " N"] | Float[Array, "B T N"]
    key: Float[Array, "P K H"] | None
    value: Float[Array, "P K H"] | None


def check_arguments(
    query,
    key,
    value,
    *,
    null_logit,
    null_key,
    null_value,
    is_causal,
    window,
    segment_ids,
    mask,
    bias,
    query_offset,
    kv_lengths,
    logit_softcap,
    scale,
) -> tuple[AttentionInputs, Null]:
    """The arguments of `null_attention` as backends take them, without a null, and the null."""
    query, key, value = (as_array(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    _check_arrays(query, key, value)
    options = _check_options(query, is_causal, window, logit_softcap, scale)
    masks = Masks(
        segments=_check_segments(segment_ids, query, key),
        mask=None if mask is None else _check_mask(mask, query, key),
        bias=None if bias is None else _check_bias(bias, query, key),
        query_offset=None if query_offset is None else _check_offset(query_offset, query, key, kv_lengths, options),
        kv_lengths=None if kv_lengths is None else _check_lengths(kv_lengths, key),
    )
    null = Null(_check_null_logit(null_logit, query), *_check_null_arrays(null_key, null_value, query, key))
    no_null = jnp.full(query.shape[2:3], -jnp.inf, wide_dtype(query.dtype))
    return AttentionInputs(query, key, value, no_null, masks, options), null


def _is(x, kind) -> bool:
    return jnp.issubdtype(x.dtype, kind)


def _check_arrays(query, key, value) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name}: must be [batch, length, heads, head size], got shape {x.shape}")
        if not _is(x, jnp.floating) or x.dtype != query.dtype:
            raise ValueError(
                f"{name}: query, key and value must share one floating-point dtype, got {x.dtype} (query: "
                f"{query.dtype})"
            )
    if key.shape != value.shape:
        raise ValueError(f"value: must have the shape of key {key.shape}, got {value.shape}")
    if (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]):
        raise ValueError(f"key: must have query's batch and head size {query.shape}, got shape {key.shape}")
    if 0 in (*query.shape[2:], key.shape[2]):
        raise ValueError(
            f"query: heads and head size must be at least 1, got {query.shape} with {key.shape[2]} key heads"
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"key: the number of query heads {query.shape[2]} must be a multiple of key heads, got shape {key.shape}"
        )


def _check_segments(segment_ids, query, key) -> Segments | None:
    if segment_ids is None:
        return None
    given = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids,)
    if len(given) not in (1, 2) or (len(given) == 1 and given is segment_ids):
        raise ValueError(f"segment_ids: must be one array or a pair (queries, keys), got {len(given)} arrays")
    given = tuple(as_array("segment_ids", ids) for ids in given)
    pair = (given[0], given[-1])  # one array stays one: every key is seen by the query at its place
    for ids, owner, wanted in zip(pair, ("queries", "keys"), (query.shape[:2], key.shape[:2])):
        if ids.shape != wanted or not _is(ids, jnp.integer):
            raise ValueError(
                f"segment_ids: those of the {owner} must be integers of shape {wanted}, got {ids.dtype} of shape "
                f"{ids.shape}"
            )
    return pair


def _check_against_scores(name: str, x, query, key, kind, word: str) -> Array:
    x, full = as_array(name, x), (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    if x.ndim != 4 or any(size not in (1, wanted) for size, wanted in zip(x.shape, full)) or not _is(x, kind):
        raise ValueError(
            f"{name}: must be {word}, [batch, heads, queries, keys] with each dimension 1 or that of {full}, got "
            f"{x.dtype} of shape {x.shape}"
        )
    return x


def _check_mask(mask, query, key) -> Bool[Array, "#B #N #T #S"]:
    return _check_against_scores("mask", mask, query, key, jnp.bool_, "boolean")


def _check_bias(bias, query, key) -> Float[Array, "#B #N #T #S"]:
    return _check_against_scores("bias", bias, query, key, jnp.floating, "floating-point").astype(
        wide_dtype(query.dtype)
    )


def _check_lengths(kv_lengths, key) -> Int[Array, " B"]:
    lengths, keys = as_array("kv_lengths", kv_lengths), key.shape[1]
    if lengths.shape != key.shape[:1] or not _is(lengths, jnp.integer):
        raise ValueError(
            f"kv_lengths: must be integers, one per row of the batch {key.shape[:1]}, got {lengths.dtype} of shape "
            f"{lengths.shape}"
        )
    if not isinstance(lengths, jax.core.Tracer):
        wrong = [int(x) for x in np.asarray(lengths) if not 0 <= x <= keys]
        if wrong:
            raise ValueError(f"kv_lengths: must lie between 0 and the number of keys {keys}, got {wrong[0]}")
    return jnp.clip(lengths.astype(jnp.int32), 0, keys)


def _check_offset(query_offset, query, key, kv_lengths, options: Options) -> Int[Array, " B"] | None:
    """The offset of every row, or None where it says nothing new: what no mask reads, or the last query on the last
    key.
    """
    batch, length = query.shape[:2]
    offset = as_array("query_offset", query_offset)
    if offset.shape not in ((), (batch,)) or not _is(offset, jnp.integer):
        raise ValueError(
            f"query_offset: must be one whole number or one per row of the batch ({batch},), got {offset.dtype} of "
            f"shape {offset.shape}"
        )
    known = isinstance(query_offset, int | np.integer) and kv_lengths is None
    by_place = options.causal or options.window is not None
    if not by_place or (known and query_offset == key.shape[1] - length):
        return None
    return jnp.broadcast_to(offset.astype(jnp.int32), (batch,))


def _check_options(query, is_causal, window, logit_softcap, scale) -> Options:
    if not isinstance(is_causal, bool | np.bool_):
        raise ValueError(f"is_causal: must be True or False, got {described(is_causal)}")
    if isinstance(window, jax.core.Tracer):
        raise ValueError(f"window: must be known when the call is traced, got a traced {window.dtype}")
    if window is not None:
        whole = not isinstance(window, bool | np.bool_) and hasattr(window, "__index__")
        whole = whole and not np.ndim(window) and np.issubdtype(np.asarray(window).dtype, np.integer)
        if not whole or not 1 <= window <= _LARGEST_WINDOW:
            raise ValueError(
                f"window: must be None or a whole number from 1 to {_LARGEST_WINDOW}, got {described(window)}"
            )
        window = operator.index(window)
    softcap = None if logit_softcap is None else known_number("logit_softcap", logit_softcap)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"logit_softcap: must be greater than 0, got {softcap}")
    scale = query.shape[3] ** -0.5 if scale is None else known_number("scale", scale)
    return Options(causal=bool(is_causal), window=window, softcap=softcap, scale=scale)


def _check_null_logit(null_logit, query) -> Float[Array, " N"] | Float[Array, "B T N"]:
    batch, length, heads, _ = query.shape
    logit = as_array("null_logit", null_logit)
    if logit.shape not in ((), (heads,), (batch, length, heads)) or not (
        _is(logit, jnp.floating) or _is(logit, jnp.integer)
    ):
        raise ValueError(
            f"null_logit: must be a real number, one per query head ({heads},) or one per query and head "
            f"{(batch, length, heads)}, got {logit.dtype} of shape {logit.shape}"
        )
    logit = logit.astype(wide_dtype(query.dtype))
    return logit if logit.ndim else jnp.broadcast_to(logit, (heads,))


def _check_null_arrays(null_key, null_value, query, key) -> tuple[Array | None, Array | None]:
    """Null keys and values as [P, K, H], as many of each."""
    found, wanted = [], key.shape[2:]
    for name, x in (("null_key", null_key), ("null_value", null_value)):
        if x is None:
            found.append(None)
            continue
        x = as_array(name, x)
        if x.ndim not in (2, 3) or x.shape[-2:] != wanted or 0 in x.shape or not _is(x, jnp.floating):
            raise ValueError(
                f"{name}: must be floating-point of shape {wanted} or (P, {wanted[0]}, {wanted[1]}), [key heads, head "
                f"size] of one or several, got {x.dtype} of shape {x.shape}"
            )
        found.append((x if x.ndim == 3 else x[None]).astype(query.dtype))
    null_key, null_value = found
    keys = 1 if null_key is None else len(null_key)
    if null_value is not None and len(null_value) != keys:
        raise ValueError(
            f"null_value: must be as many as null keys ({keys}; without null_key there is one), got shape "
            f"{null_value.shape}"
        )
    return null_key, null_value
