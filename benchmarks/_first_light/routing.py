"""Forward and backward of depth_route as shares of the bandwidth that a plain copy reaches."""

import jax
import jax.numpy as jnp

from _first_light import timing
from _first_light.report import Report
from pallas_kernels import depth_route, explain

BATCH, LENGTH = 8, 2048
# sources, width, query: what matters most first
SHAPES = tuple(
    (count, width, query)
    for query in ("static", "token")
    for count, width in ((29, 2048), (8, 2048), (29, 576), (29, 4096), (8, 576), (8, 4096))
)
SECONDS = 0.2


def run(report: Report, toy: bool, _) -> None:
    """One line a shape and backend. The bytes counted are those that a route must move: every source and the output's
    gradient read once, the output and every source's gradient written once, a query per token and its gradient.
    """
    copy = timing.copy_rate(toy)
    report.say("copy", gb_per_s=1e-9 * copy)
    shapes = [(3, 128, "static"), (3, 128, "token")] if toy else SHAPES
    for i, (count, width, query) in enumerate(shapes):
        if report.late(0.8):
            report.say("left out", shapes=shapes[i:])
            return
        batch, length = (1, 64) if toy else (BATCH, LENGTH)
        one_shape(report, copy, (count, batch, length, width), query)


def backends() -> tuple[str, ...]:
    """Those of depth_route that this device can have."""
    return {"gpu": ("mosaic_gpu", "xla"), "tpu": ("mosaic_tpu", "xla")}.get(jax.default_backend(), ("xla",))


def one_shape(report: Report, copy: float, shape: tuple[int, int, int, int], query: str) -> None:
    """The backends at one shape, taking turns; `copy` is in bytes a second."""
    (count, batch, length, width), per_token = shape, query == "token"
    keys = jax.random.split(jax.random.key(0), count + 2)
    sources = [jax.random.normal(key, (batch, length, width), jnp.bfloat16) for key in keys[2:]]
    u = jax.random.normal(keys[0], (batch, length, width) if per_token else (width,), jnp.float32) * width**-0.5
    gain = None if per_token else jnp.ones(width)
    arrays = (sources, u, jax.random.normal(keys[1], sources[0].shape, jnp.bfloat16))
    reasons, functions = explain("depth_route", sources, u, key_norm_scale=gain).reasons, {}
    label = f"L={count} D={width} {query}"
    for name in backends():
        if reasons[name]:
            report.say(f"{name} {label}", refused=reasons[name])
            continue

        def call(sources, u, name=name):
            return depth_route(sources, u, key_norm_scale=gain, implementation=name).output

        def both(sources, u, d_output, call=call):
            output, pull = jax.vjp(call, sources, u)
            return output, pull(d_output)

        functions |= {(name, "forward"): lambda s, u, _, call=call: call(s, u), (name, "both"): both}
    runs, errors = timing.compile_all(functions, arrays)
    times, more = timing.in_turns(runs, SECONDS)
    for (name, what), error in (errors | more).items():
        report.say(f"{name} {label} {what}", failed=f"{type(error).__name__}: {str(error).strip()[:400]}")
    unit, queries = sources[0].nbytes, u.nbytes if per_token else 0
    share = lambda moved, ms: moved / (1e-3 * ms) / copy
    for name in dict.fromkeys(name for name, _ in functions):
        if (name, "forward") not in times or (name, "both") not in times:
            continue
        forward, both = times[name, "forward"], times[name, "both"]
        facts = {"L": count, "D": width, "query": query, "tokens": batch * length, "forward_ms": forward}
        facts |= {"both_ms": both, "forward_share_of_copy": share((count + 1) * unit + queries, forward)}
        facts["both_share_of_copy"] = share((3 * count + 2) * unit + 3 * queries, both)
        if both > forward:
            facts["backward_share_of_copy"] = share((2 * count + 1) * unit + 2 * queries, both - forward)
        report.say(f"{name} {label}", **facts)
