"""Where this runs, with which versions, and which backends typical calls get there."""

import importlib.metadata
import pathlib
import platform
import subprocess

import jax
import jax.numpy as jnp

from _first_light import timing
from _first_light.report import Report
from pallas_kernels import explain

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "jaxtyping")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "libtpu")
ROOT = pathlib.Path(__file__).parents[2]


def run(report: Report, toy: bool, _) -> None:
    """Facts first: they cost nothing and explain whatever comes after them."""
    device = jax.devices()[0]
    report.say(
        "machine", device=device.device_kind, platform=device.platform, devices=len(jax.devices()),
        driver=_printed("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"),
        commit=_printed("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        changed=bool(_printed("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")),
    )  # fmt: skip
    report.say("versions", python=platform.python_version(), **_versions(), cuda_and_cudnn=_cuda())
    for name, call in _calls().items():
        report.attempt(f"explain {name}", lambda call=call: _explained(*call))
    report.attempt("peaks", lambda: _peaks(toy))


def _versions() -> dict[str, str]:
    found = {}
    for name in (*PACKAGES, *PLUGINS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in PACKAGES:
                found[name] = "not installed"
    return found


def _cuda() -> list[int] | None:
    """The versions that JAX runs with, which need not be those of the packages."""
    try:
        from jax._src.lib import cuda_versions

        return [cuda_versions.cuda_runtime_get_version(), cuda_versions.cudnn_get_version()]
    except Exception:  # a private name, or no CUDA
        return None


def _printed(*command: str) -> str | None:
    """What a program prints; None where there is no such program or it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _calls() -> dict[str, tuple]:
    def attention(size: int, length: int = 4096, dtype="bfloat16", keys: int | None = None, **options):
        heads = 2048 // size
        query, key = (jax.ShapeDtypeStruct((2, n, heads, size), dtype) for n in (length, keys or length))
        return "null_attention", (query, key, key), options

    def route(width: int, count: int):
        source = jax.ShapeDtypeStruct((1, 4096, width), jnp.bfloat16)
        return "depth_route", ([source] * count, jax.ShapeDtypeStruct((width,), jnp.float32)), {}

    per_query = jax.ShapeDtypeStruct((2, 4096, 16), jnp.float32)
    return {
        "attention, head size 128": attention(128),
        "attention, head size 64": attention(64),
        "attention, head size 80": attention(80),
        "attention, a null per query": attention(128, null_logit=per_query),
        "attention, window of 1024": attention(128, window=1024),
        "attention, float32": attention(128, dtype="float32"),
        "attention, one query of a cache": attention(
            128, length=1, keys=32768, kv_lengths=jax.ShapeDtypeStruct((2,), jnp.int32)
        ),
        "depth route, 29 sources of 2048": route(2048, 29),
        "depth route, 29 sources of 576": route(576, 29),
    }


def _explained(operator: str, arguments: tuple, options: dict) -> dict:
    found = explain(operator, *arguments, **options)
    return {"runs": found.implementation, "reasons": {name: why for name, why in found.reasons.items() if why}}


def _peaks(toy: bool) -> dict[str, float]:
    size = 256 if toy else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    runs, _ = timing.compile_all({"matmul": jnp.matmul}, (a, a))
    taken = timing.in_turns(runs, 0.25)[0]["matmul"]
    return {"copy_gb_per_s": 1e-9 * timing.copy_rate(toy), "bf16_matmul_tflop_per_s": 2e-9 * size**3 / taken}
