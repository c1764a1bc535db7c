"""Other tile sizes, ring depths and splits of the Mosaic GPU kernels, timed beside the ones that are set."""

import contextlib
import importlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from _first_light import timing
from _first_light.report import Report
from pallas_kernels import depth_route, explain, null_attention

ATTENTION, ROUTE = "pallas_kernels.null_attention.mosaic_gpu", "pallas_kernels.depth_route.mosaic_gpu_kernels"


class Variant(NamedTuple):
    """A value for one of the constants that the kernels read when they are traced.

    case: which call of CASES it is for.
    module, constant: where it stands; `key` is the entry of a dict.
    value: instead of the one that is set.
    """

    case: str
    module: str
    constant: str
    key: int | None
    value: object

    @property
    def name(self) -> str:
        key = "" if self.key is None else f"[{self.key}]"
        return f"{self.case}: {self.constant}{key}={self.value}"


def _tiles(size: int, *values: tuple[int, int]) -> list[Variant]:
    return [Variant(f"forward {size}", f"{ATTENTION}.forward", "TILES", size, value) for value in values]


def _stages(size: int, *values: int) -> list[Variant]:
    return [Variant(f"both {size}", f"{ATTENTION}.backward", "STAGES", None, value) for value in values]


def _route(constant: str, *values: int) -> list[Variant]:
    return [Variant(case, ROUTE, constant, None, value) for value in values for case in ("route 2048", "route token")]


# All compile for an H100 (tests/aot/test_kernel_variants.py). What is likeliest to win first.
VARIANTS = (
    *_tiles(128, (64, 4), (64, 5)),  # keys a tile, a multiple of 64, and slots of the ring
    *_stages(128, 3),
    *_tiles(64, (128, 3), (64, 8), (192, 2)),
    *_stages(64, 3, 4),
    *_route("_RING_BYTES", 24 * 1024, 64 * 1024, 96 * 1024),
    *_route("_MAX_STAGES", 2, 8),
    Variant("route 2048", ROUTE, "_BLOCKS_PER_PARTIAL", None, 1),
    Variant("route 2048", ROUTE, "_BLOCKS_PER_PARTIAL", None, 16),
    Variant("decode", ATTENTION, "_PROCESSORS", None, 66),
    Variant("decode", ATTENTION, "_PROCESSORS", None, 264),
)


class Call(NamedTuple):
    """An operator, a function of its arrays, and those as shapes."""

    operator: str
    function: Callable
    arrays: tuple


def _attention(size: int, batch: int, length: int, keys: int, *, gradients: bool) -> Call:
    heads = 2048 // size
    arrays = [jax.ShapeDtypeStruct((batch, n, heads, size), jnp.bfloat16) for n in (length, keys, keys)]

    def forward(query, key, value):
        return null_attention(query, key, value, implementation="mosaic_gpu").output

    def both(query, key, value):
        output, pull = jax.vjp(forward, query, key, value)
        return output, *pull(output)

    return Call("null_attention", both if gradients else forward, tuple(arrays))


def _routed(per_token: bool) -> Call:
    rows = jax.ShapeDtypeStruct((8, 2048, 2048), jnp.bfloat16)
    query = jax.ShapeDtypeStruct(rows.shape if per_token else rows.shape[-1:], jnp.float32)

    def both(query, *sources):
        gain = None if per_token else jnp.ones(query.shape)
        route = lambda u, *v: depth_route(v, u, key_norm_scale=gain, score_scale=0.01, implementation="mosaic_gpu")
        output, pull = jax.vjp(lambda *x: route(*x).output, query, *sources)
        return output, *pull(output)

    return Call("depth_route", both, (query, *[rows] * 29))


CASES = {
    "forward 128": _attention(128, 2, 8192, 8192, gradients=False),
    "forward 64": _attention(64, 2, 8192, 8192, gradients=False),
    "both 128": _attention(128, 2, 8192, 8192, gradients=True),
    "both 64": _attention(64, 2, 8192, 8192, gradients=True),
    "decode": _attention(128, 4, 1, 32768, gradients=False),
    "route 2048": _routed(per_token=False),
    "route token": _routed(per_token=True),
}


def run(report: Report, toy: bool, _) -> None:
    """One line a variant: its time, its speed to the values that are set, and how far its results are from theirs."""
    if refused := unavailable():
        report.say("variants", refused=refused, left_out=[variant.name for variant in VARIANTS])
        return
    for case in dict.fromkeys(variant.case for variant in VARIANTS):
        variants = [variant for variant in VARIANTS if variant.case == case]
        if report.late(0.7):
            report.say("left out", variants=[variant.name for variant in variants])
            continue
        report.attempt(f"{case}: as set", lambda case=case, variants=variants: one_case(report, case, variants))


def unavailable() -> str:
    """Why the kernels do not run here; "" where they do."""
    call = CASES["forward 128"]
    return explain(call.operator, *call.arrays).reasons["mosaic_gpu"]


def one_case(report: Report, case: str, variants: list[Variant]) -> dict:
    """All variants of a call, taking turns with what is set; returns that one's time."""
    call = CASES[case]
    arrays = tuple(jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(call.arrays))
    functions = {"": call.function} | {variant.name: as_variant(variant) for variant in variants}
    runs, errors = timing.compile_all(functions, arrays)
    times, more = timing.in_turns(runs, 0.2)
    errors |= more
    if "" in errors:
        raise errors[""]
    set_results = jax.tree.leaves(runs[""]())
    for variant in variants:
        if variant.name in errors:
            error = errors[variant.name]
            report.say(variant.name, failed=f"{type(error).__name__}: {str(error).strip()[:400]}")
            continue
        apart = max(float(_apart(x, y)) for x, y in zip(jax.tree.leaves(runs[variant.name]()), set_results))
        ms = times[variant.name]
        report.say(variant.name, ms=ms, speed_to_set=times[""] / ms, apart=apart, ok=apart <= 2.0**-6)
    return {"ms": times[""]}


@jax.jit
def _apart(x, y):
    """The largest difference over the largest number of y, found on the device: the arrays are large."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), 1e-6)


def as_variant(variant: Variant) -> Callable:
    """The case's function, traced with the variant's constant; a new function, so that no trace is reused."""
    function = CASES[variant.case].function

    def traced(*arrays):
        with replaced(variant):
            return function(*arrays)

    return traced


@contextlib.contextmanager
def replaced(variant: Variant):
    """Sets the constant, and back at the end.

    Raises:
      LookupError: the kernels no longer have a constant of this name.
    """
    module = importlib.import_module(variant.module)
    holder, key = vars(module), variant.constant
    if variant.key is not None:
        holder, key = holder.get(variant.constant, {}), variant.key
    if key not in holder:
        raise LookupError(f"{variant.module} has no {variant.name.partition(': ')[2].partition('=')[0]}")
    before = holder[key]
    holder[key] = variant.value
    try:
        yield
    finally:
        holder[key] = before
