"""depth_route over a list of sources against batched einsums over a stack, and the key projection absorbed into the query or not.

python benchmarks/routing.py [--repetitions 15]
"""

import argparse

import _harness as harness
import jax
import jax.numpy as jnp

from pallas_kernels import depth_route, implementations

SOURCES, BATCH, LENGTH, WIDTH, KEY_WIDTH = 12, 16, 256, 128, 64
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    repetitions = parser.parse_args().repetitions
    functions = {STACKED: unabsorbed, "stacked, absorbed": absorbed_stacked, "list, key projection made": unabsorbed_list}
    for name in implementations("depth_route"):
        functions[f"depth_route {name}, absorbed"] = lambda sources, query, key, name=name: (
            depth_route(sources, absorbed_query(sources, query, key), score_scale=KEY_WIDTH**-0.5, implementation=name).output
        )
    keys = jax.random.split(jax.random.key(0), SOURCES + 2)
    sources = [jax.random.normal(k, (BATCH, LENGTH, WIDTH)) for k in keys[2:]]
    arguments = (sources, *(jax.random.normal(k, (WIDTH, KEY_WIDTH)) * WIDTH**-0.5 for k in keys[:2]))
    comparisons = {}
    gradients = lambda f: jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 2))  # noqa: E731
    for what, wrap in (("forward", lambda f: f), ("forward and backward", gradients)):
        title = f"{what}, projected router, {SOURCES} sources, {BATCH * LENGTH} tokens, width {WIDTH}, key width {KEY_WIDTH}, float32"
        results = harness.measure({name: wrap(f) for name, f in functions.items()}, arguments, repetitions=repetitions)
        harness.show(title, results, STACKED)
        comparisons[title] = results
    harness.save("routing", comparisons)


if __name__ == "__main__":
    main()
