"""Every result and gradient of the backends of depth_route against the reference in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from _first_light.correctness import errors_of
from _first_light.report import Report
from _first_light.routing import backends
from pallas_kernels import depth_route


class Case(NamedTuple):
    """A call of depth_route.

    shape: L, B, T, D.
    query: "static" (one for all tokens, normalized keys) or "token" (one each, plain keys).
    live: how many sources are live; None: all.
    form: sources as "list" or "array".
    evidence: whether null evidence takes part, with a coupling, and a bias.
    """

    shape: tuple[int, int, int, int]
    query: str = "static"
    dtype: str = "bfloat16"
    form: str = "list"
    live: int | None = None
    evidence: bool = False

    @property
    def name(self) -> str:
        changed = {k: v for k, v in self._asdict().items() if k != "shape" and v != self._field_defaults[k]}
        return " ".join(["x".join(map(str, self.shape)), *(f"{k}={v}" for k, v in changed.items())])


CASES = (
    Case((5, 2, 64, 2048), query="token", evidence=True),
    Case((28, 1, 128, 2048), form="array", live=11, evidence=True),
    Case((8, 2, 63, 576)),
    Case((3, 3, 7, 640), dtype="float16", form="array"),
    Case((29, 1, 64, 4096), query="token"),
    Case((65, 1, 32, 1024), query="token", live=40),
    Case((5, 1, 64, 8192), query="token", evidence=True),
    Case((4, 1, 63, 4096), dtype="float32", form="array"),
)


def run(report: Report, toy: bool, _) -> None:
    """One line a case and backend, as for attention."""
    for i, case in enumerate(CASES):
        if report.late():
            report.say("left out", cases=[case.name for case in CASES[i:]])
            return
        if toy:
            (L, B, T, _) = case.shape
            case = case._replace(shape=(min(L, 4), B, min(T, 8), 128), live=None if case.live is None else 2)
        for backend in backends():
            name = f"{backend} {case.name}"
            report.attempt(name, lambda case=case, backend=backend, i=i: compare(case, backend, seed=i))


def compare(case: Case, backend: str, *, seed: int) -> dict:
    """A case's errors, the first call's time, and whether further calls give the same bits."""
    rng, (L, B, T, D) = np.random.default_rng(seed), case.shape
    normal = lambda *shape, by=1.0, dtype="float32": jnp.asarray(by * rng.normal(size=shape), dtype)
    arrays = {"sources": normal(L, B, T, D, dtype=case.dtype)}
    if case.query == "token":
        arrays["query"] = normal(B, T, D, by=D**-0.5)
    else:
        arrays |= {"query": normal(D, by=D**-0.5), "key_norm_scale": 1.0 + normal(D, by=0.1)}
    if case.evidence:
        arrays |= {"null_evidence": jnp.asarray(rng.uniform(size=(L, B, T)), jnp.float32), "bias": normal(L)}
        arrays |= {"coupling": jnp.float32(1.3), "null_logit": jnp.float32(0.4)}
    if case.form == "list":
        arrays["sources"] = list(arrays["sources"])
    live = {} if case.live is None else {"num_sources": jnp.int32(case.live)}
    cotangents = (normal(B, T, D), normal(B, T, L), normal(B, T))

    def compute(arrays: dict, backend: str) -> dict:
        result, pull = jax.vjp(lambda arrays: depth_route(**arrays, **live, implementation=backend), arrays)
        (gradients,) = pull(type(result)(*(d.astype(x.dtype) for d, x in zip(cotangents, result))))
        gradients["sources"] = jnp.stack(gradients["sources"])
        return result._asdict() | {f"d_{name}": x for name, x in gradients.items()}

    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    return errors_of(lambda x: compute(x, backend), lambda x: compute(x, "reference"), arrays, wide, case.dtype)
