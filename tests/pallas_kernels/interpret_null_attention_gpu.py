"""Runs the Hopper kernels of null_attention in Pallas' interpreter and prints their errors as JSON: see
test_null_attention_gpu.py.

A process of its own: the interpreter runs a program's warpgroups as threads that wait for each other, and XLA's pool
must have one for each.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from test_null_attention import as_float64, make, plain, results_and_gradients

from pallas_kernels import null_attention
from pallas_kernels.dispatch import interpret_kernels

# batch, queries, keys, query heads, key heads, head size. Tiles are 64 rows and 64 or 128 keys, rings 2 or 4 tiles
# long.
CASES = {
    "causal_grouped": dict(shape=(1, 141, 141, 3, 1, 64), per_head=True),
    "head_128_float16_more_keys": dict(shape=(1, 75, 333, 2, 2, 128), null_logit=-1.5, dtype="float16"),
    "head_80": dict(shape=(1, 67, 75, 2, 1, 80), null_logit=0.3),
    "head_96": dict(shape=(1, 75, 141, 2, 1, 96), window=60, segments="pair"),
    "head_112": dict(shape=(1, 67, 75, 1, 1, 112), is_causal=False),
    "head_192": dict(shape=(1, 67, 141, 2, 1, 192), logit_softcap=3.0, null_logit=-0.5),
    "head_256": dict(shape=(1, 67, 141, 1, 1, 256), null_logit=0.5),
    "window": dict(shape=(2, 203, 203, 2, 1, 64), window=77),
    "segments_softcap_both_directions": dict(
        shape=(2, 71, 150, 2, 1, 64), segments="pair", is_causal=False, logit_softcap=3.0, per_head=True
    ),
    "window_segments_more_queries": dict(
        shape=(1, 150, 71, 2, 1, 64), window=60, segments="pair", null_logit=0.7, scale=0.2
    ),
    "decoding": dict(shape=(2, 3, 531, 6, 3, 64), per_head=True),
    "decoding_window_segments": dict(shape=(1, 5, 1051, 4, 1, 64), window=601, segments="pair", null_logit=0.3),
    "loss_on_the_null_mass": dict(shape=(1, 70, 70, 1, 1, 64), only_null=True),
}


def difference(actual, wanted) -> float:
    """The largest error, relative to the largest value; NaN where either is not finite."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    return float(np.abs(actual - wanted).max() / max(np.abs(wanted).max(), 1e-30))


def compare(dtype="bfloat16", only_null=False, **case) -> dict:
    """Errors of the results and gradients against float64 autodiff of the plain definition at the rounded inputs."""
    arrays, options, cotangents = make(**case)
    halves = [jnp.asarray(x, dtype) for x in arrays[:3]]
    b = jnp.broadcast_to(arrays[3], (case["shape"][3],))
    cotangents = (jnp.asarray(cotangents[0], dtype) * (not only_null), cotangents[1], cotangents[2] * (not only_null))
    function = lambda q, k, v, b: null_attention(q, k, v, null_logit=b, implementation="mosaic_gpu", **options)
    with interpret_kernels():
        actual = jax.block_until_ready(results_and_gradients(function, (*halves, b), cotangents))
    with jax.enable_x64(True):
        wanted = results_and_gradients(
            lambda q, k, v, b: plain(q, k, v, b, **options), as_float64((*halves, b)), as_float64(tuple(cotangents))
        )
        names = ("output", "null_mass", "lse", "query", "key", "value", "null_logit")
        return {name: difference(a, w) for name, a, w in zip(names, jax.tree.leaves(actual), jax.tree.leaves(wanted))}


def extreme_scores() -> dict:
    """Scores of +-1e4, with a null of 0 and without any: the values of output, null mass and lse, and whether
    gradients are finite.
    """
    found = {}
    query = jnp.full((1, 65, 1, 64), 100.0, jnp.bfloat16)
    value = jnp.broadcast_to(jnp.arange(1.0, 66.0)[None, :, None, None], query.shape).astype(jnp.bfloat16)
    for sign in (1, -1):
        for b in (0.0, -jnp.inf):

            def loss(key, b):
                result = null_attention(query, key, value, null_logit=b, scale=1 / 64, implementation="mosaic_gpu")
                return result.output[0, 2].astype(jnp.float32).sum() + result.null_mass.sum() + result.lse.sum(), result

            with interpret_kernels():
                gradients, result = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(sign * query, b)
            last = [float(x) for x in (result.output[0, 2, 0, 0], result.null_mass[0, 0, 2], result.lse[0, 0, 2])]
            found[f"{sign} {b}"] = [*last, all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradients))]
    return found


def empty_rows() -> dict:
    """Queries of a segment that no key has: their output, null mass and gradient, with a null of 0.5 and
    without any.
    """
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in make((1, 67, 67, 1, 1, 64))[0][:3])
    ids = jnp.where(jnp.arange(67) < 9, 7, 1)[None], jnp.ones((1, 67), jnp.int32)
    found = {}
    for b in (0.5, -jnp.inf):

        def loss(query, b):
            result = null_attention(query, key, value, null_logit=b, segment_ids=ids, implementation="mosaic_gpu")
            finite = jnp.where(jnp.isfinite(result.lse), result.lse, 0.0)
            return (result.output.astype(jnp.float32) ** 2).sum() + result.null_mass.sum() + finite.sum(), result

        with interpret_kernels():
            gradient, result = jax.jit(jax.grad(loss, has_aux=True))(query, b)
        largest = [float(jnp.abs(x[:, :9]).max()) for x in (result.output, gradient)]
        found[str(b)] = [
            *largest,
            float(result.null_mass[0, 0, :9].max()),
            float(result.lse[0, 0, :9].max()),
            bool(jnp.isfinite(gradient).all()),
        ]
    return found


def unseen() -> dict:
    """Keys and values that no query may see, by a window, by segment ids and in decoding, hold NaN: differences to
    zeros.
    """
    found = {}
    cases = dict(
        window=((1, 70, 203), dict(window=45), np.arange(203) < 203 - 70 - 45 + 1),
        segments=((1, 70, 203), dict(segment_ids="third", is_causal=False), np.arange(203) % 3 != 0),
        decoding=(
            (1, 2, 531),
            dict(segment_ids="third", window=300),
            (np.arange(531) % 3 != 0) | (np.arange(531) < 230),
        ),
    )
    for name, ((batch, length, keys), options, hidden) in cases.items():
        query, key, value, b = make((batch, length, keys, 2, 1, 64), per_head=True)[0]
        if "segment_ids" in options:
            ids = np.zeros((batch, length), np.int32), np.arange(keys, dtype=np.int32)[None] % 3
            options = options | dict(segment_ids=ids)

        def loss(query, key, value, options=options, b=b):
            result = null_attention(query, key, value, null_logit=b, implementation="mosaic_gpu", **options)
            return (result.output.astype(jnp.float32) ** 2).sum() + (result.null_mass * result.lse).sum(), result

        run, both = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True)), []
        for held in (0.0, np.nan):
            arrays = (query, *(np.where(hidden[None, :, None, None], held, x) for x in (key, value)))
            with interpret_kernels():
                both.append(jax.block_until_ready(run(*(jnp.asarray(x, jnp.bfloat16) for x in arrays))))
        found[name] = max(difference(y, x) for x, y in zip(*map(jax.tree.leaves, both)))
    return found


def vmapped() -> dict:
    """Gradients of a call mapped over queries and nulls by vmap, against one call at a time (the interpreter refuses
    remat).
    """
    query, key, value, b = make((1, 70, 70, 2, 1, 64), per_head=True)[0]
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in (query, key, value))

    def loss(query, b):
        result = null_attention(query, key, value, null_logit=b, implementation="mosaic_gpu")
        return (result.output.astype(jnp.float32) ** 2).sum() + (result.null_mass * result.lse).sum()

    queries, nulls = jnp.stack([query, -query]), jnp.stack([b, b + 1])
    with interpret_kernels():
        gradients = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(queries, nulls)
        single = jax.jit(jax.grad(loss, (0, 1)))(queries[1], nulls[1])
    return {name: difference(many[1], one) for name, many, one in zip(("query", "null_logit"), gradients, single)}


if __name__ == "__main__":
    programs = dict(extreme_scores=extreme_scores, empty_rows=empty_rows, vmapped=vmapped, unseen=unseen)
    report = {}
    for name in sys.argv[1:]:
        report[name] = programs[name]() if name in programs else compare(**CASES[name])
        report[name]["races"] = gpu_callbacks.get_races().races_found
    print(json.dumps(report))
