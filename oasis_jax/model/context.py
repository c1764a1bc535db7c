"""What a forward pass needs beside activations and parameters, as one value that every function passes on."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oasis_jax.errors import UserError
from oasis_jax.model.numerics import FLOAT, Numerics
from oasis_jax.placement import UNSHARDED, Placement


class Cache(NamedTuple):
    """Keys and values of S tokens that come before a pass's own, of one layer, as `AttentionStatistics` of
    their pass has them.

    segment_ids: theirs, where the pass has segment_ids.
    """

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    segment_ids: Int[Array, "B S"] | None = None


@dataclasses.dataclass(frozen=True)
class Context:
    """What travels from the decoder to every sublayer. Modules of a foreign model may leave it out.

    A pytree: its arrays are leaves, placement and numerics are static.

    Attributes:
      positions: [B, T] or [1, T], what rotary and learned positions see; default: the places of the tokens in their
        row. They confine nothing: which keys a query sees follows from places and segment_ids.
      segment_ids: [B, T]; attention stays within equal ids. Documents lie in a row one after the other.
      cache: keys and values of earlier tokens: of one layer for `attention`, of all layers, in order, for a decoder.
      null_weight: in place of the config's, where it changes while a model trains.
      placement: how arrays and operators are split over devices. With a zigzag layout all arrays [B, T, ...] are in its
        order.
      numerics: how linear layers are computed and activations rounded. Other than FLOAT it is for inference.
    """

    positions: Int[Array, "#B T"] | None = None
    segment_ids: Int[Array, "B T"] | None = None
    cache: Cache | tuple[Cache, ...] | None = None
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
            wanted = cache.key.shape[:2] if self.segment_ids is not None else None
            if (cache.segment_ids is None) != (wanted is None) or (wanted and cache.segment_ids.shape != wanted):
                raise UserError(
                    "context.cache: needs segment_ids [B, S] where the context has segment_ids, and only there"
                )
        if self._caches and self.placement.attention and self.placement.attention.sequence:
            raise UserError("context.cache: a sequence that is split over devices cannot follow a cache")

    @property
    def _caches(self) -> tuple[Cache, ...]:
        return () if self.cache is None else (self.cache,) if isinstance(self.cache, Cache) else self.cache

    @property
    def cached(self) -> int:
        """How many tokens come before this pass's own."""
        return self._caches[0].key.shape[1] if self._caches else 0

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """x with its sharding pinned; axes are the logical names of its dimensions."""
        return self.placement.constrain(x, axes)

    def order(self, length: int) -> Int[Array, "1 T"]:
        """The place of every token in its row, in the order in which the tokens lie on the devices."""
        return self.cached + self.placement.order(length)

    def key_order(self, length: int) -> Int[Array, "1 S"]:
        """The places of all keys, the cached ones first."""
        return jnp.concatenate([jnp.arange(self.cached)[None], self.order(length)], axis=1)

    @property
    def key_segments(self) -> Int[Array, "B S"] | None:
        """The segment ids of all keys, the cached ones first."""
        if self.segment_ids is None or not self.cached:
            return self.segment_ids
        return jnp.concatenate([self._caches[0].segment_ids, self.segment_ids], axis=1)

    def positions_of(self, length: int) -> Int[Array, "#B T"]:
        """What rotary and learned positions see."""
        return self.order(length) if self.positions is None else self.positions

    def with_cached(
        self, key: Float[Array, "B T K H"], value: Float[Array, "B T K H"]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """The keys and values that queries see: the cached ones, then these."""
        if self.cache is None:
            return key, value
        return tuple(jnp.concatenate([x.astype(y.dtype), y], axis=1) for x, y in zip(self.cache, (key, value)))

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
