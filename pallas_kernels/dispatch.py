"""Which backend serves a call: one table per operator, from the fastest backend to the plainest."""

import contextlib
import contextvars
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax.sharding import AxisType

from pallas_kernels.checks import described
from pallas_kernels.sharding import mesh_of


class Unavailable(Exception):
    """A backend cannot serve this call; the message says why. Raised by a backend before it computes anything."""


class CannotServe(ValueError):
    """No backend, or not the named one, can serve the call. `reasons` maps each backend that was asked to why not."""

    def __init__(self, message: str, reasons: Mapping[str, str]):
        super().__init__(message)
        self.reasons = dict(reasons)


def check_axes(*arrays) -> None:
    """Raises Unavailable where arrays lie on mesh axes of type Explicit, where every operation says its sharding."""
    mesh = mesh_of(arrays)
    if mesh is None:
        return
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
    explicit = [axis for axis, size, kind in axes if size > 1 and kind == AxisType.Explicit]
    if explicit:
        raise Unavailable(
            f"the sharding of its arrays is explicit over the mesh axes {', '.join(explicit)}: make them of "
            "AxisType.Auto, or call it inside jax.shard_map"
        )


_INTERPRET = contextvars.ContextVar("interpret_kernels", default=False)


@contextlib.contextmanager
def interpret_kernels():
    """Runs accelerator backends in Pallas' interpreters, on any platform: for tests of numbers, slow. Enter
    it around tracing as well as calling.
    """
    token = _INTERPRET.set(True)
    try:
        yield
    finally:
        _INTERPRET.reset(token)


def interpreting() -> bool:
    """Whether the caller is inside `interpret_kernels`."""
    return _INTERPRET.get()


class Device(NamedTuple):
    """What a call is compiled for: platform is "cpu", "gpu" or "tpu", kind is JAX's name of the chip."""

    platform: str
    kind: str


_TARGET_MESH = contextvars.ContextVar("target_mesh", default=None)


@contextlib.contextmanager
def target_mesh(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh):
    """Within it, calls are for the devices of this mesh."""
    token = _TARGET_MESH.set(mesh)
    try:
        yield
    finally:
        _TARGET_MESH.reset(token)


def target_device() -> Device:
    """The device of a call's sharding, else of the mesh in whose context it is traced (`jax.set_mesh`,
    `jax.shard_map`), else JAX's default.

    With a mesh of a topology the call is compiled for hardware that is not there.
    """
    mesh = _TARGET_MESH.get() or jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_mesh", mesh).abstract_device
    if device is None:
        device = jax.config.jax_default_device or jax.devices()[0]
        if isinstance(device, str):
            device = jax.devices(device)[0]
    return Device(device.platform, device.device_kind)


def dispatch(operator: str, table: Mapping[str, Callable], implementation: str | None) -> Callable:
    """The function that serves `operator`: the named backend, or the first of the table that can.

    Args:
      operator: name of the operator, for messages.
      table: backend name -> function, fastest first.
      implementation: a name of the table, or None for the fastest backend that can serve the call.

    Returns:
      A function of the backends' arguments. With `implementation=None` it falls through to the next backend where one
      raises `Unavailable`; with a name it raises CannotServe, a ValueError, with the reason instead.

    Raises:
      ValueError: the name is not in the table.
    """
    if implementation is not None and not (isinstance(implementation, str) and implementation in table):
        close = difflib.get_close_matches(str(implementation), table, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"implementation: {operator} has no {described(implementation)}{hint}; there are: {', '.join(table)}"
        )

    def serve(*args, **kwargs):
        reasons = {}
        for name in table if implementation is None else (implementation,):
            try:
                return table[name](*args, **kwargs)
            except Unavailable as reason:
                reasons[name] = str(reason)
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise CannotServe(
            f"implementation: {operator} cannot be served by {why}; there are: {', '.join(table)}", reasons
        )

    return serve


def differentiated_once(operator: str, name: str, function: Callable) -> Callable:
    """function(options, *arrays) of kernels that JAX cannot differentiate: where a second derivative of the operator
    (`jax.hessian`, a gradient of a gradient) would, a TypeError says what can.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def once(options, *arrays):
        return function(options, *arrays)

    @once.defjvp
    def refuse(options, primals, tangents):
        raise TypeError(
            f"implementation: {operator} by {name} has first derivatives only; a second one (jax.hessian, jax.jvp of "
            'jax.grad) needs implementation="reference" or "xla"'
        )

    return once


_REMARKS = contextvars.ContextVar("remarks", default=None)


def remark(text: str) -> None:
    """What `explain` adds about the backend that says it, and serves: what its user pays without asking for it."""
    remarks = _REMARKS.get()
    if remarks is not None:
        remarks.append(text)


class Explanation(NamedTuple):
    """Which backend serves a call.

    implementation: the backend that `implementation=None` runs.
    reasons: backend -> why it cannot serve this call, fastest first; "" for those that can.
    device: what the call is compiled for.
    remarks: backend -> what it does beside what it was asked for, as padding heads, for those that can serve and do.
    """

    implementation: str
    reasons: dict[str, str]
    device: Device
    remarks: dict[str, str]

    def __str__(self) -> str:
        def line(name: str, reason: str) -> str:
            serves = "runs" if name == self.implementation else "could serve"
            return f"  {name}: " + (reason or ", ".join([serves, *filter(None, [self.remarks.get(name)])]))

        return "\n".join(
            [f"on {self.device.kind} ({self.device.platform}):", *(line(*item) for item in self.reasons.items())]
        )


def explain_call(function: Callable, table: Mapping[str, Callable], args: tuple, kwargs: Mapping) -> Explanation:
    """Asks every backend of `table` whether it can serve `function(*args, **kwargs)`; traces, but computes nothing.

    Raises:
      ValueError: the arguments are wrong for every backend.
    """
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    shapes = {name: x for name, x in kwargs.items() if any(map(is_shape, jax.tree.leaves(x)))}
    known, reasons, remarks = {name: x for name, x in kwargs.items() if name not in shapes}, {}, {}

    def call(implementation, args, shapes):
        return function(*args, **known, **shapes, implementation=implementation)

    for name in table:
        said = []
        token = _REMARKS.set(said)
        try:
            jax.eval_shape(functools.partial(call, name), args, shapes)
            reasons[name] = ""
            if said:
                remarks[name] = "; ".join(said)
        except CannotServe as error:
            reasons[name] = error.reasons[name]
        finally:
            _REMARKS.reset(token)
    chosen = next((name for name, reason in reasons.items() if not reason), None)
    if chosen is None:
        raise CannotServe("; ".join(f"{name}: {reason}" for name, reason in reasons.items()), reasons)
    sharding = kwargs.get("sharding")
    mesh = mesh_of(args, shapes) if sharding is None else sharding.mesh
    with contextlib.nullcontext() if mesh is None else target_mesh(mesh):
        return Explanation(chosen, reasons, target_device(), remarks)
