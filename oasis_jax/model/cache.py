"""What is kept of the tokens that were read: keys and values of one layer, where they lie and how they are stored."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from oasis_jax.errors import UserError


class Int8(NamedTuple):
    """Keys or values in 8 bits with a scale for every token and head, symmetric: x is read as values * scale.

    scale is the largest magnitude among the head's H numbers over 127, values are x / scale rounded to the nearest, to
    even at halves, so that no number is off by more than half a scale.
    """

    values: Int[Array, "B S K H"]
    scale: Float[Array, "B S K"]

    @classmethod
    def of(cls, x: Float[Array, "B S K H"]) -> "Int8":
        """x in 8 bits; the scale of what holds a NaN is NaN."""
        wide = x.astype(jnp.float32)
        scale = jnp.abs(wide).max(-1) / 127
        values = jnp.round(wide / jnp.where(scale == 0, 1, scale)[..., None])
        return cls(jnp.where(jnp.isnan(values), 0, values).astype(jnp.int8), scale)

    def read(self, dtype: DTypeLike) -> Float[Array, "B S K H"]:
        """The numbers that it stands for."""
        return (self.values.astype(jnp.float32) * self.scale[..., None]).astype(dtype)


Stored = Float[Array, "B S K H"] | Int8
# How keys and values are stored: "float", in the type that the layer computes in, or as `Int8`.
STORAGES = {"float": lambda x: x, "int8": Int8.of}


class KVCache(NamedTuple):
    """Keys and values of one layer in arrays of S places, of which the first `length` hold tokens.

    A pass writes its own keys behind those and reads all where they lie. Where the caller's `jax.jit` is given the
    arrays away (`donate_argnums`) nothing is copied.

    key, value: of the type that the layer computes in, or Int8; what lies beyond the length never matters.
    length: how many tokens came so far, in all rows or in each.
    segment_ids: of the tokens, where the passes have segment_ids.
    """

    key: Stored
    value: Stored
    length: Int[Array, ""] | Int[Array, " B"]
    segment_ids: Int[Array, "B S"] | None = None

    @classmethod
    def of(
        cls,
        key: Float[Array, "B t K H"],
        value: Float[Array, "B t K H"],
        size: int,
        segment_ids: Int[Array, "B t"] | None = None,
        *,
        lengths: Int[Array, " B"] | None = None,
        storage: str = "float",
    ) -> "KVCache":
        """A cache of `size` places that holds these t tokens, as a pass without a cache has them in its statistics;
        with t = 0 it is empty.

        Args:
          lengths: how many of the t are tokens of their row; None: all.
          storage: a name of STORAGES.
        """
        count = key.shape[1]
        grow = lambda x: jnp.pad(x, [(0, 0), (0, size - count)] + [(0, 0)] * (x.ndim - 2))
        key, value = (jax.tree.map(grow, STORAGES[storage](x)) for x in (key, value))
        ids = None if segment_ids is None else grow(jnp.asarray(segment_ids))
        return cls(key, value, jnp.int32(count) if lengths is None else lengths, ids)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of key and value."""
        return tuple(jax.tree.leaves(x)[0].shape for x in (self.key, self.value))

    @property
    def size(self) -> int:
        """How many places it has."""
        return self.shapes[0][1]

    @property
    def room(self) -> int | None:
        """How many tokens it can hold; None: any number."""
        return self.size

    @property
    def in_order(self) -> bool:
        """Whether a token's place is its number in the row."""
        return True

    def order_after(self, count: int) -> Int[Array, "#B S"]:
        """The number in its row of the token in every place once `count` more have come; what holds none has a number
        that is later than any token's.
        """
        del count
        return jnp.arange(self.size)[None]

    @property
    def live(self) -> Int[Array, ""] | Int[Array, " B"]:
        """How many places hold tokens: the first ones."""
        return self.length

    def read(self, dtype: DTypeLike) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Key and value as arrays."""
        return tuple(x.read(dtype) if isinstance(x, Int8) else x for x in (self.key, self.value))

    def extended(
        self, key: Float[Array, "B T K H"], value: Float[Array, "B T K H"], segment_ids: Int[Array, "B T"] | None
    ) -> "KVCache":
        """With T more tokens behind the others. Where there is no room, which a traced length does not tell, what is
        written is NaN, never a plausible number.

        Raises:
          UserError: they have another type.
        """
        if isinstance(self.key, Int8):
            store = Int8.of
        elif key.dtype == self.key.dtype:
            store = STORAGES["float"]
        else:
            raise UserError(f"context.cache: must have the type of its layer's keys, {key.dtype}, got {self.key.dtype}")
        length = self.length + key.shape[1]
        fits = jnp.reshape(length <= self.room, (-1, 1, 1, 1)) if self.room else True
        put = lambda old, new: jax.tree.map(self._put, old, store(jnp.where(fits, new, jnp.nan)))
        ids = None if segment_ids is None else self.with_segments(segment_ids)
        return self._replace(key=put(self.key, key), value=put(self.value, value), length=length, segment_ids=ids)

    def with_segments(self, segment_ids: Int[Array, "B T"]) -> Int[Array, "B S"]:
        """The ids of all tokens, T more behind the others."""
        return self._put(self.segment_ids, jnp.asarray(segment_ids))

    @property
    def _next(self) -> Int[Array, ""] | Int[Array, " B"]:
        """The place of the next token."""
        return self.length

    def _put(self, into: Array, x: Array) -> Array:
        """`into` with x [B, T, ...] behind the tokens of every row."""
        x = x.astype(into.dtype)
        if self.length.ndim == 0:
            return lax.dynamic_update_slice_in_dim(into, x, self._next, 1)
        return jax.vmap(lambda row, new, at: lax.dynamic_update_slice_in_dim(row, new, at, 0))(into, x, self._next)


class RingCache(KVCache):
    """The last W tokens of a layer whose window is W: token i of a row lies in place i mod W, where it takes the place
    of the one that has left the window. A query sees all that is there, so that no mask is needed.

    Takes one token a pass, and no segment_ids.
    """

    __slots__ = ()

    @classmethod
    def of(
        cls,
        key: Float[Array, "B t K H"],
        value: Float[Array, "B t K H"],
        size: int,
        *,
        lengths: Int[Array, " B"] | None = None,
        storage: str = "float",
    ) -> "RingCache":
        """The last `size` of t tokens; arguments as of `KVCache.of`, size the window."""
        batch, count = key.shape[:2]
        lengths = jnp.full(batch, count, jnp.int32) if lengths is None else lengths
        at = jnp.clip(_ring_order(lengths, size), 0, max(count - 1, 0))[..., None, None]
        if count:
            key, value = (jnp.take_along_axis(x, at, axis=1) for x in (key, value))
        else:
            key, value = (jnp.zeros((batch, size, *x.shape[2:]), x.dtype) for x in (key, value))
        return cls(STORAGES[storage](key), STORAGES[storage](value), lengths)

    @property
    def room(self) -> int | None:
        return None

    @property
    def in_order(self) -> bool:
        return False

    def order_after(self, count: int) -> Int[Array, "#B S"]:
        return _ring_order(jnp.reshape(self.length + count, -1), self.size)

    @property
    def live(self) -> Int[Array, ""] | Int[Array, " B"]:
        return jnp.minimum(self.length, self.size)

    def extended(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> "RingCache":
        if key.shape[1] != 1:
            raise UserError(
                f"context.cache: a ring takes one token a pass, got {key.shape[1]}; "
                "a cache that holds all tokens takes several"
            )
        return super().extended(key, value, segment_ids)

    @property
    def _next(self) -> Int[Array, ""] | Int[Array, " B"]:
        return self.length % self.size


def _ring_order(lengths: Int[Array, " B"], size: int) -> Int[Array, "B W"]:
    """Which token lies in every place of a ring after so many; places that hold none yet are numbered on."""
    newest, place = lengths[:, None] - 1, jnp.arange(size)
    token = newest - (newest - place) % size
    return jnp.where(token < 0, place, token)
