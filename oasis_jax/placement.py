"""Where arrays lie: the mesh, the one table of logical axes, and what follows from them, as one value that is passed
on.

Nothing here is global. `UNSHARDED`, the default everywhere, leaves every array where it is.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from oasis_jax.config import Config, MeshConfig
from oasis_jax.errors import UserError, unknown_name
from pallas_kernels import OperatorSharding, zigzag

MESH_AXES = ("data", "fsdp", "sequence", "tensor")  # neighbours last
# The logical axes of parameters and activations; those without a rule are not split.
LOGICAL_AXES = ("batch", "length", "stream", "embed", "vocab", "heads", "kv_heads", "mlp")

Rules = Sequence[tuple[str, tuple[str, ...]]]
LogicalAxes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """How arrays and operators are split over devices.

    Attributes:
      mesh: the devices; None: whatever holds the arrays.
      rules: logical axis -> mesh axes.
      attention: how null_attention is split; None on a single device.
      routing: how depth_route is split; None on a single device.
    """

    mesh: Mesh | None = None
    rules: Rules = ()
    attention: OperatorSharding | None = None
    routing: OperatorSharding | None = None

    def constrain(self, x: Array, axes: LogicalAxes) -> Array:
        """x with its sharding pinned; axes are the logical names of its dimensions."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(axes)))

    def spec(self, axes: LogicalAxes) -> PartitionSpec:
        """The mesh axes of every dimension: (batch, length, heads) -> PartitionSpec(("data", "fsdp"), None,
        "tensor").

        Raises:
          UserError: two dimensions of one array claim the same mesh axis.
        """
        table = dict(self.rules)
        split = [tuple(table.get(name, ())) for name in axes]
        claimed = [axis for dimension in split for axis in dimension]
        for axis in claimed:
            if claimed.count(axis) > 1:
                raise UserError(
                    f"mesh.rules: mesh axis {axis!r} is claimed more than once by an array with the logical axes {axes}"
                )
        return PartitionSpec(*(None if not names else names[0] if len(names) == 1 else names for names in split))

    def sharding(self, axes: LogicalAxes = ()) -> NamedSharding | None:
        """The sharding of an array with these logical axes, () for what every device holds whole; None
        without a mesh.
        """
        return None if self.mesh is None else NamedSharding(self.mesh, self.spec(axes))

    def checked_sharding(self, name: str, shape: tuple[int, ...], axes: LogicalAxes) -> NamedSharding:
        """The sharding of a parameter.

        Raises:
          UserError: a dimension that its mesh axes do not divide.
        """
        for dimension, (size, axis, names) in enumerate(zip(shape, axes, self.spec(axes))):
            ways, text = _ways(names, self.mesh)
            if size % ways:
                raise UserError(
                    f"mesh: dimension {dimension} ({axis}) of parameter {name} has size {size}, not divisible by "
                    f"{text}; "
                    f"change the mesh, the model or the rule of {axis!r} in mesh.rules"
                )
        return self.sharding(axes)

    def with_whole_stream(self) -> "Placement":
        """The same, but that the stream between sublayers is not split by positions: a step of decoding has one."""
        if self.mesh is None:
            return self
        rules = tuple((name, () if name == "stream" else tuple(axes)) for name, axes in self.rules)
        routing = self.routing and dataclasses.replace(self.routing, sequence=None)
        return dataclasses.replace(self, rules=rules, routing=routing)

    def ways(self, axis: str) -> int:
        """Into how many parts a logical axis is split."""
        return 1 if self.mesh is None else _ways(self.spec((axis,))[0], self.mesh)[0]

    def order(self, length: int) -> Int[Array, "1 T"]:
        """0 .. T-1, the places of a row's tokens, in the order in which they lie on the devices."""
        return self._reordered(jnp.arange(length)[None])

    def _reordered(self, x: Array) -> Array:
        sharding = self.attention
        return zigzag(x, sharding.ways("sequence")) if sharding and sharding.layout == "zigzag" else x

    def ordered(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays [B, T, ...] with their positions split over devices, in the order that balances causal attention."""
        if self.attention is None or not self.attention.sequence:
            return dict(batch)
        batch = {name: self._reordered(x) for name, x in batch.items()}
        return {name: self.constrain(x, ("batch", "length", *(None,) * (x.ndim - 2))) for name, x in batch.items()}

    def put(self, batch: Mapping[str, Array], *, parts: int = 1) -> dict[str, Array]:
        """This process's part [B / parts, ...] of a batch as global arrays [B, ...] whose examples are split."""
        if self.mesh is None:
            return {name: jnp.asarray(x) for name, x in batch.items()}
        sharding = self.sharding(("batch",))
        return {
            name: jax.make_array_from_process_local_data(sharding, x, (x.shape[0] * parts, *x.shape[1:]))
            for name, x in batch.items()
        }


UNSHARDED = Placement()


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with axes data, fsdp, sequence and tensor that a config asks for.

    Args:
      config: sizes of the axes; data=-1 takes all devices that the others leave.
      devices: what to build it from; all devices where not given. A smaller mesh takes the first ones.

    Raises:
      UserError: more mesh than devices, devices that the axes do not divide, or rules with unknown names.
    """
    devices = list(jax.devices() if devices is None else devices)
    check_rules(config.rules)
    rest = config.fsdp * config.sequence * config.tensor
    sequence = f"sequence={config.sequence} x " if config.sequence > 1 else ""
    others = f"fsdp={config.fsdp} x {sequence}tensor={config.tensor}"
    data = config.data if config.data > 0 else max(len(devices) // rest, 1)
    if data * rest > len(devices):
        raise UserError(f"mesh: data={data} x {others} needs {data * rest} devices, there are {len(devices)}")
    if config.data == -1 and len(devices) % rest:
        raise UserError(
            f"mesh.data: {len(devices)} devices are not divisible by {others} = {rest}; give mesh.data to use fewer"
        )
    sizes = (data, config.fsdp, config.sequence, config.tensor)
    # Split: tensor=4 may take half of an axis of 8 chips of a TPU's torus.
    grid = mesh_utils.create_device_mesh(sizes, devices[: data * rest], allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def check_rules(rules: Rules) -> None:
    """Raises UserError for a rule of an unknown logical or mesh axis, which would otherwise leave arrays unsplit in
    silence.
    """
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[1], tuple | list)):
            raise UserError(f"mesh.rules: expected (logical axis, (mesh axes ...)), got {rule!r}")
        name, axes = rule
        if name not in LOGICAL_AXES:
            raise unknown_name("mesh.rules", name, LOGICAL_AXES)
        for axis in axes:
            if axis not in MESH_AXES:
                raise unknown_name(f"mesh.rules, {name}", axis, MESH_AXES)


def place(config: Config, mesh: Mesh) -> Placement:
    """The placement of a run on a mesh.

    Causal attention over a split sequence is balanced by the zigzag order. Windows are balanced in the order of the
    text.

    Raises:
      UserError: examples that the sequence axis does not divide, or a rule that the operators cannot follow.
    """
    rules, model, length = config.mesh.rules, config.model, config.data.sequence_length
    table = {name: tuple(axis for axis in axes if mesh.shape[axis] > 1) for name, axes in rules}
    sequence = table.get("length", ())
    if len(sequence) > 1:
        raise UserError(f"mesh.rules, length: attention passes keys around one mesh axis, got {', '.join(sequence)}")
    if mesh.size == 1:
        return Placement(mesh, rules)
    windows = any(model.layer(index).window for index in range(model.period))
    layout = "zigzag" if sequence and not windows else "contiguous"
    parts = math.prod(mesh.shape[axis] for axis in sequence) * (2 if layout == "zigzag" else 1)
    if length % parts:
        halves = " in two parts each" if layout == "zigzag" else ""
        raise UserError(
            f"data.sequence_length: {length} is not divisible by mesh.{sequence[0]}={mesh.shape[sequence[0]]}{halves}; "
            f"take a multiple of {parts}"
        )
    stream, batch = table.get("stream", ()), table.get("batch", ())
    ways, text = _ways(stream, mesh)
    if length % ways:
        raise UserError(
            f"data.sequence_length: {length} is not divisible by {text}, over which mesh.rules split the stream "
            "between "
            f"sublayers; take a multiple of {math.lcm(ways, parts)}, another mesh or another rule of 'stream'"
        )
    attention = OperatorSharding(mesh, batch, table.get("heads", ()), sequence, layout)
    return Placement(mesh, rules, attention, OperatorSharding(mesh, batch, sequence=stream))


def check_batch_size(config: Config, placement: Placement) -> None:
    """Raises UserError where a micro-batch cannot be split evenly over the devices."""
    ways, text = _ways(placement.spec(("batch",))[0], placement.mesh)
    steps, size = config.optimizer.accumulation_steps, config.data.batch_size
    if size // steps % ways:
        micro = f" / optimizer.accumulation_steps={steps} = {size // steps}" if steps > 1 else ""
        raise UserError(
            f"data.batch_size: {size}{micro} is not divisible by the {ways} devices of {text}; "
            f"take a multiple of {ways * steps}"
        )


def _ways(names: str | tuple[str, ...] | None, mesh: Mesh) -> tuple[int, str]:
    """Into how many parts one entry of a PartitionSpec splits, and that in words."""
    names = () if names is None else (names,) if isinstance(names, str) else names
    return math.prod(mesh.shape[name] for name in names), " x ".join(f"{name}={mesh.shape[name]}" for name in names)
