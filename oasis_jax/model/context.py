"""What a forward pass needs beside activations and parameters, as one value that every function passes on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from oasis_jax.errors import UserError
from oasis_jax.model.cache import KVCache
from oasis_jax.model.numerics import FLOAT, Numerics
from oasis_jax.placement import UNSHARDED, Placement


@dataclasses.dataclass(frozen=True)
class Context:
    """What travels from the decoder to every sublayer. Modules of a foreign model may leave it out.

    A pytree: its arrays are leaves, placement and numerics are static.

    Attributes:
      positions: [B, T] or [1, T], what rotary and learned positions see; default: the places of the tokens in their
        row. They confine nothing: which keys a query sees follows from places and segment_ids.
      segment_ids: [B, T]; attention stays within equal ids. Documents lie in a row one after the other.
      cache: keys and values of earlier tokens: of one layer for `attention`, of all layers, in order, for a decoder.
        The pass adds its own: its statistics have the caches of the next pass.
      null_weight, null_value_weight: in place of the config's, where they change while a model trains.
      placement: how arrays and operators are split over devices. With a zigzag layout all arrays [B, T, ...] are in its
        order.
      numerics: how linear layers are computed and activations rounded. Other than FLOAT it is for inference.
    """

    positions: Int[Array, "#B T"] | None = None
    segment_ids: Int[Array, "B T"] | None = None
    cache: KVCache | tuple[KVCache, ...] | None = None
    null_weight: Float[Array, ""] | None = None
    null_value_weight: Float[Array, ""] | None = None
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
            key, value = cache.shapes
            if key[0] != batch or key != value:
                raise UserError(
                    f"context.cache: key and value must have one shape [{batch}, S, K, H], got {key} and {value}"
                )
            if jnp.shape(cache.length) not in ((), (batch,)) or not jnp.issubdtype(
                jnp.result_type(cache.length), jnp.integer
            ):
                raise UserError(
                    f"context.cache: length must be one integer or {batch} of them, got "
                    f"{jnp.result_type(cache.length)} of shape {jnp.shape(cache.length)}"
                )
            if self.segment_ids is not None and not cache.in_order:
                raise UserError("context.cache: a ring has no segment_ids; a cache that holds all tokens can have them")
            wanted = key[:2] if self.segment_ids is not None else None
            if (cache.segment_ids is None) != (wanted is None) or (wanted and cache.segment_ids.shape != wanted):
                raise UserError(
                    "context.cache: needs segment_ids [B, S] where the context has segment_ids, and only there"
                )
            taken = self.cached_at_most or 0
            if cache.room is not None and taken + length > cache.room:
                raise UserError(
                    f"context.cache: has {cache.room} places, of which {taken} are taken; "
                    f"{length} more tokens do not fit"
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

    def key_order(self, length: int) -> Int[Array, "#B S"]:
        """The places in their row of all keys: of what a layer's cache holds once this pass's own are in it, or of this
        pass's own.
        """
        return self._caches[0].order_after(length) if self._caches else self.order(length)

    @property
    def key_segments(self) -> Int[Array, "B S"] | None:
        """The segment ids of all keys."""
        if self.segment_ids is None or not self._caches:
            return self.segment_ids
        return self._caches[0].with_segments(self.segment_ids)

    def positions_of(self, length: int) -> Int[Array, "#B T"]:
        """What rotary and learned positions see."""
        return self.order(length) if self.positions is None else self.positions

    def replace(self, **changes: Any) -> "Context":
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
    Context,
    data_fields=["positions", "segment_ids", "cache", "null_weight", "null_value_weight"],
    meta_fields=["placement", "numerics"],
)
