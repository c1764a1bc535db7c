"""How the operators' arguments are split over devices: told by the caller, read from nowhere else.

XLA cannot partition a Pallas call, so an operator with a sharding runs its kernels inside `jax.shard_map`, one call a
device on that device's part. The derivative stays outside of it: forward and backward kernels are mapped one by one,
and no gradient is taken through a shard_map.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array

LAYOUTS = ("contiguous", "zigzag")


@dataclasses.dataclass(frozen=True)
class OperatorSharding:
    """The mesh axes that split batch, heads and sequence; axes that are not named hold copies.

        mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 3)
        null_attention(query, key, value, sharding=OperatorSharding(mesh, batch="data", heads="tensor",
        sequence="sequence"))

    Attributes:
      mesh: the devices.
      batch: one axis or several.
      heads: one axis or several, for query and key heads alike; `depth_route` has no heads and ignores it.
      sequence: one axis; for `depth_route`, which needs no communication, also several. Attention passes keys and
        values around it (ring attention, arXiv 2310.01889); a window fetches only the keys it can reach.
      layout: the order of the positions. "contiguous": device i of n holds the i-th of n parts; with a causal mask the
        last device then has nearly twice the mean work, and the others wait. "zigzag": the order that `zigzag(x, n)`
        makes, in which device i holds the parts i and 2n-1-i of 2n, and causal work is the same everywhere. Only
        attention reads it: a token's depth routing depends on no other token.

    Raises:
      ValueError: an axis that the mesh has not or that is named twice, or an unknown layout.
    """

    mesh: Mesh | AbstractMesh
    batch: str | tuple[str, ...] = ()
    heads: str | tuple[str, ...] = ()
    sequence: str | tuple[str, ...] | None = None
    layout: str = "contiguous"

    def __post_init__(self) -> None:
        for name in ("batch", "heads"):
            axes = getattr(self, name)
            object.__setattr__(self, name, (axes,) if isinstance(axes, str) else tuple(axes or ()))
        if isinstance(self.sequence, tuple | list) and len(self.sequence) < 2:
            object.__setattr__(self, "sequence", self.sequence[0] if self.sequence else None)
        named = self.axes("batch", "heads", "sequence")
        for axis in named:
            if axis not in self.mesh.axis_names:
                raise ValueError(
                    f"sharding: the mesh has no axis {axis!r}; there are: {', '.join(map(str, self.mesh.axis_names))}"
                )
            if named.count(axis) > 1:
                raise ValueError(f"sharding: mesh axis {axis!r} is named more than once; an axis splits one dimension")
        if self.layout not in LAYOUTS:
            raise ValueError(f"sharding: layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.layout == "zigzag" and not isinstance(self.sequence, str):
            raise ValueError(
                "sharding: layout='zigzag' orders a sequence split over one axis and needs sequence=, got "
                f"{self.sequence!r}"
            )

    def axes(self, *dimensions: str) -> tuple[str, ...]:
        """The mesh axes of some of "batch", "heads" and "sequence", in order."""
        sequence = (self.sequence,) if isinstance(self.sequence, str) else self.sequence or ()
        table = {"batch": self.batch, "heads": self.heads, "sequence": sequence}
        return tuple(axis for dimension in dimensions for axis in table[dimension])

    def ways(self, *dimensions: str) -> int:
        """Into how many parts those dimensions are split together."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(*dimensions))

    def spec(self, *dimensions: str | None) -> PartitionSpec:
        """The PartitionSpec of an array whose dimensions are "batch", "heads", "sequence" or, where they are
        not split, None.
        """
        return PartitionSpec(*((self.axes(dimension) or None) if dimension else None for dimension in dimensions))

    def check(self, name: str, shape: tuple[int, ...], *dimensions: str | None) -> None:
        """Raises ValueError where a dimension of the array called `name` cannot be split evenly."""
        for size, dimension in zip(shape, dimensions):
            ways = self.ways(dimension) if dimension else 1
            parts = 2 * ways if dimension == "sequence" and self.layout == "zigzag" else ways
            if size % parts:
                axes = " x ".join(f"{axis}={self.mesh.shape[axis]}" for axis in self.axes(dimension))
                halves = " in two parts each (layout zigzag)" if parts > ways else ""
                raise ValueError(
                    f"{name}: sharding splits {dimension} over {axes}{halves}: must be a multiple of {parts}, got "
                    f"{size} in shape {shape}"
                )

    def mapped(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` of every device's parts. Not differentiable as it stands: derivatives belong outside."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def mesh_of(*arrays) -> AbstractMesh | None:
    """The mesh on which arrays lie, traced ones included; None where each is on one device."""
    aval = lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    meshes = (getattr(getattr(aval(x), "sharding", None), "mesh", None) for x in jax.tree.leaves(arrays))
    return next((mesh for mesh in meshes if mesh is not None and not mesh.empty), None)


def unmapped_axes(sharding: OperatorSharding | None, *arrays) -> list[str]:
    """The mesh axes over which XLA would have to partition a kernel: those around the call or of its arrays, where no
    sharding maps the kernel over them.
    """
    if sharding is not None:
        return []
    meshes = [jax.sharding.get_abstract_mesh(), mesh_of(*arrays)]
    axes = [
        axis
        for mesh in meshes
        if mesh is not None
        for axis, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
        if size > 1 and kind != AxisType.Manual
    ]
    return list(dict.fromkeys(axes))


def _chunk_order(shards: int) -> list[int]:
    return [chunk for shard in range(shards) for chunk in (shard, 2 * shards - 1 - shard)]


def _reorder(x: Array, order: list[int], axis: int) -> Array:
    axis = range(jnp.ndim(x))[axis]
    if x.shape[axis] % len(order):
        raise ValueError(
            f"x: its length along axis {axis} must be a multiple of {len(order)} for {len(order) // 2} shards, got "
            f"{x.shape}"
        )
    chunks = x.reshape(*x.shape[:axis], len(order), -1, *x.shape[axis + 1 :])
    return jnp.take(chunks, jnp.asarray(order), axis=axis).reshape(x.shape)


def zigzag(x: Array, shards: int, axis: int = 1) -> Array:
    """Puts positions into the order in which causal attention over `shards` devices is balanced.

    The sequence is cut into 2n parts; device i gets the parts i and 2n-1-i. Whatever is per position must be put into
    the same order: tokens, targets, weights, segment ids, and the positions of a rotary embedding
    (`zigzag(jnp.arange(T), n, axis=0)`).

    Args:
      x: its length along `axis` is a multiple of 2 * shards.
      shards: devices along the sequence axis, n.
      axis: the dimension of the positions.
    """
    return _reorder(x, _chunk_order(shards), axis)


def unzigzag(x: Array, shards: int, axis: int = 1) -> Array:
    """The inverse of `zigzag`."""
    order = _chunk_order(shards)
    return _reorder(x, [order.index(chunk) for chunk in range(len(order))], axis)


def varying_alike(arrays, examples):
    """The arrays of a pytree, marked as varying over all axes that any of `examples` varies over: for calls inside a
    caller's `jax.shard_map`.

    A custom derivative must return gradients that vary as its arguments do. Marked outside of it, an argument that all
    devices share gets its gradient summed over them by JAX.
    """

    def over(x) -> frozenset:
        return jax.typeof(x).manual_axis_type.varying

    varying = frozenset().union(*map(over, jax.tree.leaves(examples)))

    def mark(x):
        missing = tuple(sorted(varying - over(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, arrays)
