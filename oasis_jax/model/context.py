"""What a forward pass needs beside activations and parameters, as one value that every function passes on."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from oasis_jax.errors import UserError
from oasis_jax.model.numerics import FLOAT, Numerics
from oasis_jax.placement import UNSHARDED, Placement


class KVCache(NamedTuple):
    """Keys and values of one layer in arrays of S places, of which the first `length` hold tokens.

    A pass writes its own keys behind those and reads all where they lie. Where the caller's `jax.jit` is given the
    arrays away (`donate_argnums`) nothing is copied.

    key, value: of the type that the layer computes in; what lies beyond the length never matters.
    length: of all rows, or of each.
    segment_ids: of the tokens, where the passes have segment_ids.
    """

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    length: Int[Array, ""] | Int[Array, " B"]
    segment_ids: Int[Array, "B S"] | None = None

    @classmethod
    def of(
        cls,
        key: Float[Array, "B t K H"],
        value: Float[Array, "B t K H"],
        size: int,
        segment_ids: Int[Array, "B t"] | None = None,
    ) -> "KVCache":
        """A cache of `size` places that holds these t tokens, as a pass without a cache has them in its statistics;
        with t = 0 it is empty.
        """
        length = key.shape[1]
        grow = lambda x: jnp.pad(x, [(0, 0), (0, size - length)] + [(0, 0)] * (x.ndim - 2))
        ids = None if segment_ids is None else grow(jnp.asarray(segment_ids))
        return cls(grow(key), grow(value), jnp.int32(length), ids)

    def extended(
        self, key: Float[Array, "B T K H"], value: Float[Array, "B T K H"], segment_ids: Int[Array, "B T"] | None
    ) -> "KVCache":
        """With T more tokens behind the others. Where there is no room, which a traced length does not tell, what is
        written is NaN, never a plausible number.

        Raises:
          UserError: they have another type.
        """
        if key.dtype != self.key.dtype:
            raise UserError(f"context.cache: must have the type of its layer's keys, {key.dtype}, got {self.key.dtype}")
        length = self.length + key.shape[1]
        fits = jnp.reshape(length <= self.key.shape[1], (-1, 1, 1, 1))
        key, value = (self._put(old, jnp.where(fits, x, jnp.nan)) for old, x in ((self.key, key), (self.value, value)))
        ids = None if segment_ids is None else self.with_segments(segment_ids)
        return KVCache(key, value, length, ids)

    def with_segments(self, segment_ids: Int[Array, "B T"]) -> Int[Array, "B S"]:
        """The ids of all tokens, T more behind the others."""
        return self._put(self.segment_ids, jnp.asarray(segment_ids))

    def _put(self, into: Array, x: Array) -> Array:
        """`into` with x [B, T, ...] behind the tokens of every row."""
        x = x.astype(into.dtype)
        if self.length.ndim == 0:
            return lax.dynamic_update_slice_in_dim(into, x, self.length, 1)
        return jax.vmap(lambda row, new, at: lax.dynamic_update_slice_in_dim(row, new, at, 0))(into, x, self.length)


@dataclasses.dataclass(frozen=True)
class Context:
    """What travels from the decoder to every sublayer. Modules of a foreign model may leave it out.

    A pytree: its arrays are leaves, placement and numerics are static.

    Attributes:
      positions: [B, T] or [1, T], what rotary and learned positions see; default: the places of the tokens in their
        row. They confine nothing: which keys a query sees follows from places and segment_ids.
      segment_ids: [B, T]; attention stays within equal ids. Documents lie in a row one after the other.
      cache: keys and values of earlier tokens: of one layer for `attention`, of all layers, in order, for a decoder.
        The pass adds its own; `after` has the caches of the next pass.
      null_weight: in place of the config's, where it changes while a model trains.
      placement: how arrays and operators are split over devices. With a zigzag layout all arrays [B, T, ...] are in its
        order.
      numerics: how linear layers are computed and activations rounded. Other than FLOAT it is for inference.
    """

    positions: Int[Array, "#B T"] | None = None
    segment_ids: Int[Array, "B T"] | None = None
    cache: KVCache | tuple[KVCache, ...] | None = None
    null_weight: Float[Array, ""] | None = None
    placement: Placement = UNSHARDED
    numerics: Numerics = FLOAT

    def check(self, batch: int, length: int) -> None:
        """Raises UserError where positions, segment_ids or cache do not fit activations [batch, length, ...]."""
        for name, rows in (("positions", (1, batch)), ("segment_ids", (batch,))):
            ids = getattr(self, name)
            if ids is None:
                continue
            shapes = list(dict.fromkeys((count, length) for count in rows))
            if jnp.shape(ids) not in shapes or not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
                raise UserError(
                    f"context.{name}: must be integers of shape {' or '.join(map(str, shapes))}, "
                    f"got {jnp.result_type(ids)} of shape {jnp.shape(ids)}"
                )
        for cache in self._caches:
            if cache.key.shape[0] != batch or cache.key.shape != cache.value.shape:
                raise UserError(
                    f"context.cache: key and value must have one shape [{batch}, S, K, H], "
                    f"got {cache.key.shape} and {cache.value.shape}"
                )
            if jnp.shape(cache.length) not in ((), (batch,)) or not jnp.issubdtype(
                jnp.result_type(cache.length), jnp.integer
            ):
                raise UserError(
                    f"context.cache: length must be one integer or {batch} of them, got "
                    f"{jnp.result_type(cache.length)} of shape {jnp.shape(cache.length)}"
                )
            wanted = cache.key.shape[:2] if self.segment_ids is not None else None
            if (cache.segment_ids is None) != (wanted is None) or (wanted and cache.segment_ids.shape != wanted):
                raise UserError(
                    "context.cache: needs segment_ids [B, S] where the context has segment_ids, and only there"
                )
        if self._caches:
            size, taken = self._caches[0].key.shape[1], self.cached_at_most or 0
            if taken + length > size:
                raise UserError(
                    f"context.cache: has {size} places, of which {taken} are taken; {length} more tokens do not fit"
                )
        if self._caches and self.placement.attention and self.placement.attention.sequence:
            raise UserError("context.cache: a sequence that is split over devices cannot follow a cache")

    @property
    def _caches(self) -> tuple[KVCache, ...]:
        return () if self.cache is None else (self.cache,) if isinstance(self.cache, KVCache) else self.cache

    @property
    def cached(self) -> int | Int[Array, ""] | Int[Array, " B"]:
        """How many tokens come before this pass's own, in all rows or in each."""
        return self._caches[0].length if self._caches else 0

    @property
    def cached_at_most(self) -> int | None:
        """How many they are in the row that has most; None where that is traced."""
        return None if isinstance(self.cached, jax.core.Tracer) else int(np.max(self.cached))

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """x with its sharding pinned; axes are the logical names of its dimensions."""
        return self.placement.constrain(x, axes)

    def order(self, length: int) -> Int[Array, "#B T"]:
        """The place of every token in its row, in the order in which the tokens lie on the devices."""
        order = self.placement.order(length)
        return jnp.reshape(self.cached, (-1, 1)) + order if self._caches else order

    def key_order(self, length: int) -> Int[Array, "1 S"]:
        """The places of all keys: those of the cache, in which this pass's own are, or this pass's own."""
        return jnp.arange(self._caches[0].key.shape[1])[None] if self._caches else self.order(length)

    @property
    def key_segments(self) -> Int[Array, "B S"] | None:
        """The segment ids of all keys."""
        if self.segment_ids is None or not self._caches:
            return self.segment_ids
        return self._caches[0].with_segments(self.segment_ids)

    def after(self, layers: Sequence[Any], length: int) -> tuple[KVCache, ...]:
        """The caches of the next pass.

        Args:
          layers: the AttentionStatistics of a pass of `length` tokens in this context, layer by layer.
        """
        changes = dict(length=self.cached + length, segment_ids=self.key_segments)
        return tuple(
            cache._replace(key=layer.key, value=layer.value, **changes) for cache, layer in zip(self._caches, layers)
        )

    def positions_of(self, length: int) -> Int[Array, "#B T"]:
        """What rotary and learned positions see."""
        return self.order(length) if self.positions is None else self.positions

    def replace(self, **changes) -> "Context":
        """This context with other values for some of its fields."""
        return dataclasses.replace(self, **changes)

    def within(self, scope: str) -> "Context":
        """The context of a part of the model, whose tensors' names start with `scope`."""
        numerics = self.numerics.within(scope)
        return self if numerics is self.numerics else self.replace(numerics=numerics)

    def of_layer(self, index: int) -> "Context":
        """The context of one layer, with its own cache."""
        return self if self.cache is None else self.replace(cache=self.cache[index])


jax.tree_util.register_dataclass(
    Context, data_fields=["positions", "segment_ids", "cache", "null_weight"], meta_fields=["placement", "numerics"]
)
