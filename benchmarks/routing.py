"""depth_route over a list of sources against batched einsums over a stack, and the key projection absorbed into the
query or not.

python benchmarks/routing.py [--repetitions 15]
"""

import argparse

import _harness as harness
import jax
import jax.numpy as jnp

from pallas_kernels import depth_route, implementations

KEY_WIDTH = 64
CPU_SHAPES = ((12, 16, 256, 128),)  # sources, batch, length, width; on accelerators 16k tokens
ACCELERATOR_SHAPES = tuple((count, 8, 2048, width) for count in (8, 28, 64) for width in (1024, 2048, 4096))
STACKED = "stacked, key projection made"


def unabsorbed(sources, query, key):
    """Projected routing as it is written down: every source's key is made, in batched einsums over the stack."""
    stack = jnp.stack(sources)
    scores = jnp.einsum("BTC,LBTC->LBT", sources[-1] @ query, jnp.einsum("LBTD,DC->LBTC", stack, key)) * KEY_WIDTH**-0.5
    return jnp.einsum("LBT,LBTD->BTD", softmax1(scores), stack)


def absorbed_query(sources, query, key):
    """u = W_k^T (W_q v_last): the scores are u . v_i and no key is made."""
    return jnp.einsum("BTC,DC->BTD", sources[-1] @ query, key)


def absorbed_stacked(sources, query, key):
    stack = jnp.stack(sources)
    scores = jnp.einsum("BTD,LBTD->LBT", absorbed_query(sources, query, key), stack) * KEY_WIDTH**-0.5
    return jnp.einsum("LBT,LBTD->BTD", softmax1(scores), stack)


def unabsorbed_list(sources, query, key):
    """The same, source by source."""
    q = sources[-1] @ query
    scores = jnp.stack([jnp.sum(q * (source @ key), axis=-1) for source in sources]) * KEY_WIDTH**-0.5
    weights = softmax1(scores)
    return sum(weights[i][..., None] * source for i, source in enumerate(sources))


def softmax1(scores):
    top = jnp.maximum(scores.max(0), 0.0)
    e = jnp.exp(scores - top)
    return e / (e.sum(0) + jnp.exp(-top))


def functions() -> dict:
    """Every backend that can be asked for, over the list of sources, and the plain forms."""
    found = {STACKED: unabsorbed, "stacked, absorbed": absorbed_stacked, "list, key projection made": unabsorbed_list}
    for name in implementations("depth_route"):
        found[f"depth_route {name}, absorbed"] = lambda sources, query, key, name=name: (
            depth_route(
                sources, absorbed_query(sources, query, key), score_scale=KEY_WIDTH**-0.5, implementation=name
            ).output
        )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    repetitions = parser.parse_args().repetitions
    peak = harness.peaks(repetitions=repetitions)
    cpu = jax.default_backend() == "cpu"
    dtype, comparisons, left_out = jnp.dtype("float32" if cpu else "bfloat16"), {}, {}
    gradients = lambda f: jax.grad(lambda *x: (f(*x).astype(jnp.float32) ** 2).sum(), (0, 1, 2))
    for count, batch, length, width in CPU_SHAPES if cpu else ACCELERATOR_SHAPES:
        keys = jax.random.split(jax.random.key(0), count + 2)
        sources = [jax.random.normal(k, (batch, length, width), dtype) for k in keys[2:]]
        arguments = (
            sources,
            *((jax.random.normal(k, (width, KEY_WIDTH)) * width**-0.5).astype(dtype) for k in keys[:2]),
        )
        unit = batch * length * width * dtype.itemsize
        # forward: every source read, the output written; backward: sources and the output's gradient read, their
        #   gradients written
        for what, wrap, units in (
            ("forward", lambda f: f, count + 1),
            ("forward and backward", gradients, 3 * count + 2),
        ):
            title = (
                f"{what}, projected router, {count} sources, {batch * length} tokens, width {width}, key "
                f"width {KEY_WIDTH}, {dtype}"
            )
            good, left_out[title] = harness.runnable({name: wrap(f) for name, f in functions().items()}, arguments)
            results = harness.measure(good, arguments, repetitions=repetitions)
            harness.add_shares(results, peak, bytes_moved=units * unit)
            harness.show(title, results, STACKED if STACKED in results else next(iter(results)))
            comparisons[title] = results
    harness.save("routing", comparisons, peaks=peak, left_out=left_out)


if __name__ == "__main__":
    main()
