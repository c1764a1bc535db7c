"""Where arrays lie: the mesh, the one table of logical axes, and the shardings that follow from them.

Nothing here is global. The mesh is passed on, the model gets `constrain`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from oasis_jax.config import Config, MeshConfig, ModelConfig
from oasis_jax.errors import UserError, unknown_name
from oasis_jax.model.layout import initial_params, stacked_axes
from oasis_jax.model.normalizers import DENSE_NORMALIZERS
from pallas_kernels import OperatorSharding, zigzag

MESH_AXES = ("data", "fsdp", "sequence", "tensor")  # neighbours last
# The logical axes of parameters and activations; those without a rule are not split.
LOGICAL_AXES = ("batch", "length", "stream", "embed", "vocab", "heads", "kv_heads", "mlp")

Rules = Sequence[tuple[str, tuple[str, ...]]]
LogicalAxes = tuple[str | None, ...]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with axes data, fsdp, sequence and tensor that a config asks for.

    Args:
      config: sizes of the axes; data=-1 takes all devices that the others leave.
      devices: what to build it from; all devices where not given. A smaller mesh takes the first ones.

    Raises:
      UserError: more mesh than devices, devices that cannot be dealt out evenly, or rules with unknown names.
    """
    devices = list(jax.devices() if devices is None else devices)
    check_rules(config.rules)
    rest = config.fsdp * config.sequence * config.tensor
    others = (
        f"fsdp={config.fsdp} x "
        + (f"sequence={config.sequence} x " if config.sequence > 1 else "")
        + f"tensor={config.tensor}"
    )
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


def logical_to_spec(rules: Rules, axes: LogicalAxes) -> PartitionSpec:
    """The mesh axes of every dimension: (batch, length, heads) -> PartitionSpec(("data", "fsdp"), None, "tensor").

    Raises:
      UserError: two dimensions of one array claim the same mesh axis.
    """
    table = dict(rules)
    split = [tuple(table.get(name, ())) for name in axes]
    claimed = [axis for dimension in split for axis in dimension]
    for axis in claimed:
        if claimed.count(axis) > 1:
            raise UserError(
                f"mesh.rules: mesh axis {axis!r} is claimed more than once by an array with the logical axes {axes}"
            )
    return PartitionSpec(*(None if not names else names[0] if len(names) == 1 else names for names in split))


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a model's activations and operators are split: the `constrain` of `Decoder.__call__`.

    operators: how attention is split; None on a single device.
    routing: how depth routing is split.
    """

    mesh: Mesh
    rules: Rules
    operators: OperatorSharding | None
    routing: OperatorSharding | None

    def __call__(self, x: Array, axes: LogicalAxes) -> Array:
        """x with its sharding pinned; axes are the logical names of its dimensions."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, logical_to_spec(self.rules, axes)))

    def ways(self, axis: str) -> int:
        """Into how many parts a logical axis is split."""
        return _ways(logical_to_spec(self.rules, (axis,))[0], self.mesh)[0]

    def ordered(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays [B, T, ...] with their positions split over devices, in the order that balances causal attention."""
        sharding = self.operators
        if sharding is None or not sharding.sequence:
            return dict(batch)
        if sharding.layout == "zigzag":
            batch = {name: zigzag(x, sharding.ways("sequence")) for name, x in batch.items()}
        return {name: self(x, ("batch", "length", *(None,) * (x.ndim - 2))) for name, x in batch.items()}


def placement(config: Config, mesh: Mesh) -> Placement:
    """The placement of a run on a mesh.

    Causal attention over a split sequence is balanced by the zigzag order. A window is balanced in the order of the
    text, and the normalizers that make all probabilities are partitioned by XLA and mask by index: they keep that
    order.

    Raises:
      UserError: examples that the sequence axis does not divide, or a rule that the operators cannot follow.
    """
    rules, model = config.mesh.rules, config.model
    table = {name: tuple(axis for axis in axes if mesh.shape[axis] > 1) for name, axes in rules}
    sequence = table.get("length", ())
    if len(sequence) > 1:
        raise UserError(f"mesh.rules, length: attention passes keys around one mesh axis, got {', '.join(sequence)}")
    if mesh.size == 1:
        return Placement(mesh, rules, None, None)
    split = bool(sequence)
    layout = "zigzag" if split and not model.window and model.normalizer not in DENSE_NORMALIZERS else "contiguous"
    parts = math.prod(mesh.shape[axis] for axis in sequence) * (2 if layout == "zigzag" else 1)
    if config.data.sequence_length % parts:
        halves = " in two parts each" if layout == "zigzag" else ""
        raise UserError(
            f"data.sequence_length: {config.data.sequence_length} is not divisible by "
            f"mesh.{sequence[0]}={mesh.shape[sequence[0]]}{halves}; "
            f"take a multiple of {parts}"
        )
    stream, batch = table.get("stream", ()), table.get("batch", ())
    ways, text = _ways(stream, mesh)
    if config.data.sequence_length % ways:
        raise UserError(
            f"data.sequence_length: {config.data.sequence_length} is not divisible by {text}, over which "
            "mesh.rules split the stream between "
            f"sublayers; take a multiple of {math.lcm(ways, parts)}, another mesh or another rule of 'stream'"
        )
    operators = OperatorSharding(mesh, batch, table.get("heads", ()), sequence, layout)
    return Placement(mesh, rules, operators, OperatorSharding(mesh, batch, sequence=stream))


def parameter_shapes(config: ModelConfig) -> dict:
    """Shape and type of every parameter of a training state: stacked, see `oasis_jax.model.layout`."""
    return jax.eval_shape(lambda: initial_params(config, jax.random.key(0)))


def parameter_shardings(config: ModelConfig, mesh: Mesh, rules: Rules) -> dict:
    """The sharding of every parameter, in the structure of `parameter_shapes(config)`.

    Raises:
      UserError: a dimension that its mesh axes do not divide.
    """

    def place(path, shape, logical):
        spec = logical_to_spec(rules, logical)
        _check_divisible(".".join(str(key.key) for key in path), shape.shape, logical, spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, parameter_shapes(config), stacked_axes(config))


def _check_divisible(name: str, shape: tuple[int, ...], logical: LogicalAxes, spec: PartitionSpec, mesh: Mesh) -> None:
    for dimension, (size, axis, names) in enumerate(zip(shape, logical, spec)):
        ways, text = _ways(names, mesh)
        if size % ways:
            raise UserError(
                f"mesh: dimension {dimension} ({axis}) of parameter {name} has size {size}, not divisible by {text}; "
                f"change the mesh, the model or the rule of {axis!r} in mesh.rules"
            )


def _ways(names: str | tuple[str, ...] | None, mesh: Mesh) -> tuple[int, str]:
    """Into how many parts one entry of a PartitionSpec splits, and that in words."""
    names = () if names is None else (names,) if isinstance(names, str) else names
    return math.prod(mesh.shape[name] for name in names), " x ".join(f"{name}={mesh.shape[name]}" for name in names)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(config: Config, mesh: Mesh) -> NamedSharding:
    """The sharding of a batch [B, ...]: its examples are split.

    Raises:
      UserError: a micro-batch cannot be dealt out evenly.
    """
    spec = logical_to_spec(config.mesh.rules, ("batch",))
    ways, text = _ways(spec[0], mesh)
    steps, size = config.optimizer.accumulation_steps, config.data.batch_size
    if size // steps % ways:
        micro = f" / optimizer.accumulation_steps={steps} = {size // steps}" if steps > 1 else ""
        raise UserError(
            f"data.batch_size: {size}{micro} is not divisible by the {ways} devices of {text}; take a multiple of "
            f"{ways * steps}"
        )
    return NamedSharding(mesh, spec)


def put_batch(batch: dict, sharding: NamedSharding, *, parts: int = 1) -> dict[str, Array]:
    """This process's part [B / parts, ...] of a batch as global arrays [B, ...]; see `distributed.batch_part`."""
    return {
        name: jax.make_array_from_process_local_data(sharding, x, (x.shape[0] * parts, *x.shape[1:]))
        for name, x in batch.items()
    }
