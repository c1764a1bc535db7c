"""Forward and backward TFLOP/s of null_attention against jax.nn's softmax attention through cuDNN, causal."""

import jax
import jax.numpy as jnp

from _first_light import timing
from _first_light.report import Report
from pallas_kernels import explain, implementations, null_attention

TOKENS, WIDTH = 2**14, 2048  # of a batch, and of all heads together
# length and head size, what matters most first
SHAPES = ((4096, 128), (8192, 128), (4096, 64), (16384, 128), (2048, 128), (2048, 64), (8192, 64), (16384, 64))
SECONDS = 0.25  # of measuring, each peer


def run(report: Report, toy: bool, _) -> None:
    """One line a shape and peer: times, rates, and speeds as ratios to the baseline, which took its turns beside it."""
    for i, (length, size) in enumerate(((256, 64),) if toy else SHAPES):
        if report.late(0.8):
            report.say("left out", shapes=SHAPES[i:])
            return
        batch, heads = (1, 2) if toy else (TOKENS // length, WIDTH // size)
        one_shape(report, batch, length, heads, size)


def one_shape(report: Report, batch: int, length: int, heads: int, size: int) -> None:
    """The peers at one shape, taking turns."""
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = tuple(jax.random.normal(key, (batch, length, heads, size), jnp.bfloat16) for key in keys)
    calls = peers(*arrays[:3])
    functions = {(name, "forward"): lambda q, k, v, _, f=f: f(q, k, v) for name, f in calls.items()}
    functions |= {(name, "both"): _with_gradients(f) for name, f in calls.items()}
    runs, errors = timing.compile_all(functions, arrays)
    times, more = timing.in_turns(runs, SECONDS)
    errors |= more
    flop, baseline = 2 * batch * heads * length**2 * size, next(iter(calls))  # two products over half of the square
    for name in calls:
        label = f"{name} T={length} H={size}"
        failed = [error for (peer, _), error in errors.items() if peer == name]
        if failed:
            report.say(label, failed=f"{type(failed[0]).__name__}: {str(failed[0]).strip()[:400]}")
        if (name, "forward") not in times or (name, "both") not in times:
            continue
        forward, both = times[name, "forward"], times[name, "both"]
        facts = {"T": length, "H": size, "B": batch, "N": heads, "forward_ms": forward, "both_ms": both}
        facts |= {"forward_tflop_per_s": 1e-9 * flop / forward, "both_tflop_per_s": 3.5e-9 * flop / both}
        if both > forward:
            facts["backward_tflop_per_s"] = 2.5e-9 * flop / (both - forward)
        for what, taken in (("forward", forward), ("both", both)):
            if (baseline, what) in times:
                facts[f"{what}_speed_to_baseline"] = times[baseline, what] / taken
        report.say(label, baseline=baseline, **facts)


def peers(query, key, value) -> dict:
    """The baseline first, then every fast backend that can serve, its null per head; at one length what a null per
    query costs beside it, and XLA's own attention.
    """
    gpu = jax.default_backend() == "gpu"
    library = "cudnn" if gpu else None
    softmax = lambda q, k, v, by=library: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=by)
    found = {f"jax.nn softmax {library or ''}".strip(): softmax}
    reasons = explain("null_attention", query, key, value).reasons
    able = [name for name in implementations("null_attention") if name != "reference" and not reasons[name]]
    fast = [name for name in able if name != "xla"] or ["xla"]
    (batch, length, heads, _) = query.shape
    nulls = {"": jnp.zeros(heads)}
    if length == 4096 or not gpu:
        nulls[", null per query"] = jnp.zeros((batch, length, heads))
        if gpu and query.shape[3] == 128:
            found["jax.nn softmax xla"] = lambda q, k, v: softmax(q, k, v, "xla")
    for name in fast:
        for kind, null in nulls.items():
            found[f"{name}{kind}"] = lambda q, k, v, name=name, null=null: (
                null_attention(q, k, v, null_logit=null, implementation=name).output
            )
    return found


def _with_gradients(function):
    def compute(query, key, value, d_output):
        output, pull = jax.vjp(function, query, key, value)
        return output, pull(d_output)

    return compute
