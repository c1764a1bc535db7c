"""What the backends of null_attention share: arguments and results, what a kernel cannot serve, and which keys a query
may see.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Unavailable, check_axes
from pallas_kernels.sharding import OperatorSharding, unmapped_axes

Segments = tuple[Int[Array, "B T"], Int[Array, "B S"]]


class NullAttention(NamedTuple):
    """The results of attention with a null.

    output: [B, T, N, H] in the dtype of the inputs.
    null_mass: [B, N, T], omega, the probability of the null; float32, or float64 for float64 inputs.
    lse: [B, N, T], log(exp(b) + sum_j exp(s_j)), so that log omega = b - lse; dtype as null_mass.
    """

    output: Float[Array, "B T N H"]
    null_mass: Float[Array, "B N T"]
    lse: Float[Array, "B N T"]


class Options(NamedTuple):
    """The static arguments of null_attention, checked. A window implies causality: 0 <= i - j < window.
    Kernels never see a sharding.
    """

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    sharding: OperatorSharding | None = None


class Masks(NamedTuple):
    """What beside Options says which keys a query sees, and what is added to its scores; None where not given.

    segments: ids of the queries and of the keys; a query sees keys of its own id.
    mask, bias: four dimensions, each 1 or full against [B, N, T, S]; the bias in float32 or better.
    query_offset: the place of the first query among the keys; without it the last query sits on the last live key.
    kv_lengths: how many keys of a row are live.
    """

    segments: Segments | None = None
    mask: Bool[Array, "#B #N #T #S"] | None = None
    bias: Float[Array, "#B #N #T #S"] | None = None
    query_offset: Int[Array, " B"] | None = None
    kv_lengths: Int[Array, " B"] | None = None

    def first_place(self, length: int, keys: int) -> Int[Array, " #B"]:
        """The place of the first of `length` queries among the keys, for all rows or for each."""
        if self.query_offset is not None:
            return self.query_offset
        return jnp.full((1,), keys - length, jnp.int32) if self.kv_lengths is None else self.kv_lengths - length

    @property
    def beyond_segments(self) -> list[str]:
        """The names of those that are given, segments left out."""
        return [name for name in self._fields[1:] if getattr(self, name) is not None]


class AttentionInputs(NamedTuple):
    """The checked arguments of null_attention, as every backend takes them; null keys are in the logit of each query,
    null values are added outside of the backends (outside.py).
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    null_logit: Float[Array, " N"] | Float[Array, "B N T"]
    masks: Masks
    options: Options


def check_kernel(inputs: AttentionInputs) -> None:
    """Raises Unavailable for what no Pallas or cuDNN kernel serves, whatever the device."""
    if inputs.masks.beyond_segments:
        raise Unavailable(f"has no {' or '.join(inputs.masks.beyond_segments)}")
    if 0 in inputs.query.shape:
        raise Unavailable("there are no queries")
    check_axes(inputs.query, inputs.key, inputs.value)
    axes = unmapped_axes(inputs.options.sharding, inputs.query, inputs.key, inputs.value)
    if axes:
        raise Unavailable(
            f"XLA cannot partition it over the mesh axes {', '.join(axes)}; give sharding=, or call it inside "
            "jax.shard_map over them"
        )


def wide_dtype(dtype) -> jnp.dtype:
    """The dtype of statistics and accumulators: float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)


def allowed_keys(
    rows: Int[Array, "*#B t"],
    columns: Int[Array, "*#B s"],
    segments: tuple[Int[Array, "B t"], Int[Array, "B s"]] | None,
    *,
    causal: bool,
    window: int | None,
) -> Bool[Array, "#B t s"] | None:
    """Which of some keys some queries may see, or None for all. The one definition of every mask.

    Args:
      rows: the places of the queries, counted in keys, for all rows of a batch or for each; with T queries of S keys
        the i-th has place i + S - T, so that the last query sits on the last key.
      columns: the places of the keys, likewise.
      segments: ids of those queries and keys.
      causal: a query sees keys up to its own place.
      window: a query sees keys with 0 <= row - column < window, causal or not.
    """
    allowed = None
    if causal or window is not None:
        rows, columns = (x if x.ndim == 2 else x[None] for x in (rows, columns))
        distance = rows[:, :, None] - columns[:, None, :]
        allowed = distance >= 0
        if window is not None:
            allowed &= distance < window
    if segments is not None:
        same = segments[0][:, :, None] == segments[1][:, None, :]
        allowed = same if allowed is None else allowed & same
    return allowed


def grouped(x: Array, heads: int, key_heads: int) -> Array:
    """[B or 1, N or 1, T or 1, S or 1] -> the same by key head and query head of its group."""
    by_key_head = (key_heads, heads // key_heads) if x.shape[1] > 1 else (1, 1)
    return x.reshape(x.shape[0], *by_key_head, *x.shape[2:])


def visible_only(x: Float[Array, "B s K H"], allowed: Bool[Array, "#B #K #G t s"]) -> Float[Array, "B s K H"]:
    """Keys or values, zero where none of these queries may see them: 0 * NaN is NaN, so a probability of zero does not
    hide what a masked entry holds.
    """
    seen = allowed.any(axis=(2, 3)).swapaxes(1, 2)[..., None]
    return jnp.where(seen, x, jnp.zeros((), x.dtype))


def attention_scores(
    query: Float[Array, "B K G t H"],
    key: Float[Array, "B K s H"],
    *,
    scale: float,
    softcap: float | None,
    precision=None,
) -> Float[Array, "B K G t s"]:
    """Scores of grouped queries in float32 or better: scaled, then soft-capped, not masked."""
    scores = jnp.einsum(
        "BKGTH,BKSH->BKGTS", query, key, precision=precision, preferred_element_type=wide_dtype(query.dtype)
    )
    return scaled(scores, scale, softcap)


def scaled(products: Array, scale: float, softcap: float | None) -> Array:
    """Scores of products q.k."""
    scores = products * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def heads_first(x: Float[Array, "B T N H"], key_heads: int) -> Float[Array, "B K G T H"]:
    """N query heads as G consecutive ones for each of K key heads, heads before positions."""
    batch, length, heads, size = x.shape
    return x.reshape(batch, length, key_heads, heads // key_heads, size).transpose(0, 2, 3, 1, 4)


def heads_last(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    """The inverse of `heads_first`."""
    batch, key_heads, group, length, size = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, key_heads * group, size)
