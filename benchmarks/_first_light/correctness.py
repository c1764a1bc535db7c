"""Every result and gradient of a backend of null_attention against the reference in float32."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from _first_light.report import Report
from pallas_kernels import null_attention

# Statistics are float32 sums whose terms come from the hardware's fast exponentials.
STATISTICS, STATISTICS_TOLERANCE = ("null_mass", "lse", "weights"), 2.0**-12
REPEATS = 3


class Case(NamedTuple):
    """A call of null_attention.

    shape: B, T, S, N, K, H.
    null: "head", "query", "key" (a null key), "keys" (two null keys and values) or "none" (-inf).
    masks: "segments", "mask", "bias" or "lengths" (a cache whose rows are live to different lengths); None: without.
    cotangent: which results the gradients come from: "all" or "null_mass".
    magnitude: of queries and keys.
    options: further arguments of the call.
    """

    shape: tuple[int, int, int, int, int, int]
    dtype: str = "bfloat16"
    null: str = "head"
    masks: str | None = None
    cotangent: str = "all"
    magnitude: float = 1.0
    options: tuple[tuple[str, object], ...] = ()

    @property
    def name(self) -> str:
        changed = {k: v for k, v in self._asdict().items() if k != "shape" and v != self._field_defaults[k]}
        changed |= dict(changed.pop("options", ()))
        return " ".join(["x".join(map(str, self.shape)), *(f"{k}={v}" for k, v in changed.items())])


CASES = (
    Case((2, 512, 512, 8, 8, 128)),
    Case((2, 1000, 1000, 8, 2, 64)),
    Case((1, 640, 640, 4, 2, 128), null="query"),
    Case((1, 513, 513, 6, 3, 64), null="query", options=(("window", 63),)),
    Case((1, 1537, 1537, 4, 1, 128), dtype="float16", options=(("window", 200),)),
    Case((2, 700, 700, 4, 2, 64), masks="segments"),
    Case((1, 640, 640, 4, 2, 128), masks="segments", options=(("logit_softcap", 30.0),)),
    Case((1, 512, 512, 4, 2, 128), null="key"),
    Case((1, 512, 512, 4, 2, 64), null="keys"),
    Case((1, 1024, 1024, 4, 4, 64), null="none"),
    Case((1, 512, 512, 4, 4, 128), cotangent="null_mass"),
    Case((4, 1, 4097, 8, 2, 128)),
    Case((1, 300, 1300, 4, 2, 64), options=(("window", 200),)),
    Case((1, 513, 769, 6, 3, 64), options=(("is_causal", False),)),
    Case((1, 512, 512, 4, 4, 128), dtype="float16", magnitude=8.0),
    Case((1, 4096, 4096, 2, 1, 128), options=(("window", 1),)),
    Case((1, 1300, 300, 4, 2, 128)),
    Case((1, 500, 500, 4, 2, 80)),
    Case((1, 500, 500, 4, 2, 96)),
    Case((1, 500, 500, 4, 2, 192)),
    Case((1, 777, 777, 4, 2, 256)),
    Case((3, 2, 2048, 8, 2, 128), masks="lengths"),
    Case((2, 300, 300, 4, 2, 64), masks="mask"),
    Case((2, 300, 300, 4, 2, 64), masks="bias"),
    Case((1, 400, 400, 4, 2, 64), dtype="float32"),
)
TOY = (0, 3, 7, 8, 11, 21)  # of CASES, at most 40 long


def run(report: Report, toy: bool, backend: str) -> None:
    """One line a case: the worst error of every result and gradient, and whether all are as small as the dtype allows.

    One shape first, then another head size, then what is rarer: whatever time allows is worth having.
    """
    cases = [CASES[i] for i in TOY] if toy else CASES
    for i, case in enumerate(cases):
        if report.late():
            report.say("left out", cases=[case.name for case in cases[i:]])
            return
        if toy:
            case = case._replace(shape=tuple(min(x, 40) for x in case.shape))
        report.attempt(case.name, lambda case=case, i=i: compare(case, backend, seed=i))


def compare(case: Case, backend: str, *, seed: int) -> dict:
    """A case's errors, the first call's time, and whether further calls give the same bits."""
    arrays, constants, cotangents = _inputs(case, np.random.default_rng(seed))
    function = _with_gradients(case, constants, cotangents)
    wide = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    return errors_of(
        lambda arrays: function(arrays, backend), lambda arrays: function(arrays, "reference"), arrays, wide, case.dtype
    )


def errors_of(function, reference, arrays: dict, wide: dict, dtype: str) -> dict:
    """What function(arrays) makes of arrays in `dtype` against reference(wide), both dicts of results, jitted."""
    run, start = jax.jit(function), time.perf_counter()
    found = jax.block_until_ready(run(arrays))
    first = time.perf_counter() - start
    same = [all(_equal(x, y) for x, y in zip(found.values(), run(arrays).values())) for _ in range(REPEATS)]
    with jax.default_matmul_precision("highest"):  # a GPU would multiply float32 in TF32
        wanted = jax.jit(reference)(wide)
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    wrong = [name for name, error in errors.items() if not error <= tolerance(name, dtype)]
    return {"ok": not wrong, "wrong": wrong, "errors": errors, "repeats_equal": all(same), "first_s": first}


def tolerance(name: str, dtype: str) -> float:
    """Of a result's worst error, relative to its largest number: two roundings to the dtype for what is computed in it
    or from what was rounded to it.
    """
    if dtype == "float32" or name in STATISTICS:
        # matrix products of float32 may run in TF32, with 11 bits
        return 2.0**-9 if dtype == "float32" and jax.default_backend() != "cpu" else STATISTICS_TOLERANCE
    return 2 * float(jnp.finfo(dtype).eps)


def relative_error(found, wanted) -> float:
    """The largest difference over the largest finite number wanted; equal infinities differ by nothing."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if found.shape != wanted.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):
        difference = np.where(found == wanted, 0.0, np.abs(found - wanted))
    largest = np.abs(np.where(np.isfinite(wanted), wanted, 0.0)).max(initial=0.0)
    return float(difference.max(initial=0.0) / max(largest, 1e-6))


def _equal(x, y) -> bool:
    return bool(jnp.array_equal(x, y, equal_nan=True))


def _inputs(case: Case, rng: np.random.Generator) -> tuple[dict, dict, tuple]:
    """The arrays to differentiate by, other arguments of the call, and cotangents of output, null mass and lse."""
    B, T, S, N, K, H = case.shape
    normal = lambda *shape, by=1.0, dtype=case.dtype: jnp.asarray(by * rng.normal(size=shape), dtype)
    arrays = {
        "query": normal(B, T, N, H, by=case.magnitude),
        "key": normal(B, S, K, H, by=case.magnitude),
        "value": normal(B, S, K, H),
    }
    if case.null != "none":
        arrays["null_logit"] = normal(*((B, T, N) if case.null == "query" else (N,)), dtype="float32")
    if case.null in ("key", "keys"):
        arrays["null_key"] = normal(*((2, K, H) if case.null == "keys" else (K, H)))
    if case.null == "keys":
        arrays["null_value"] = normal(2, K, H)
    if case.masks == "bias":
        arrays["bias"] = normal(1, N, T, S, dtype="float32")
    constants = dict(case.options) | ({"null_logit": -jnp.inf} if case.null == "none" else {})
    if case.masks == "segments":
        constants["segment_ids"] = jnp.asarray(np.sort(rng.integers(0, 3, (B, T)), axis=1), jnp.int32)
    if case.masks == "mask":
        constants["mask"] = jnp.asarray(rng.random((B, 1, T, S)) < 0.7)
    if case.masks == "lengths":
        constants["kv_lengths"] = jnp.asarray(rng.integers(T, S + 1, B), jnp.int32)
    on = lambda name: float(case.cotangent in ("all", name))
    d_output = normal(B, T, N, H, by=on("output"))
    return arrays, constants, (d_output, *(normal(B, N, T, by=on(x), dtype="float32") for x in ("null_mass", "lse")))


def _with_gradients(case: Case, constants: dict, cotangents: tuple):
    """f(arrays, backend) -> every result and gradient by name."""

    def compute(arrays: dict, backend: str) -> dict:
        def call(arrays):
            return null_attention(**arrays, **constants, implementation=backend)

        result, pull = jax.vjp(call, arrays)
        # rows without key and null have an infinite lse, whose gradient is none
        given = [jnp.where(jnp.isfinite(x), d, 0).astype(x.dtype) for x, d in zip(result, cotangents)]
        (gradients,) = pull(type(result)(*given))
        return result._asdict() | {f"d_{name}": x for name, x in gradients.items()}

    return compute
