"""null_attention against jax.nn's softmax attention and against Softmax1 written out, on whatever device JAX finds.

python benchmarks/attention.py [--repetitions 15]
"""

import argparse

import _harness as harness
import jax
import jax.numpy as jnp

from pallas_kernels import implementations, null_attention

SHAPES = ((1, 512, 8, 4, 64), (1, 2048, 8, 4, 64), (16, 256, 4, 4, 32))  # batch, length, query heads, key heads, head size


def jax_softmax(query, key, value):
    return jax.nn.dot_product_attention(query, key, value, is_causal=True), jnp.zeros(())


def written_out(query, key, value):
    """Softmax1 in a few lines, all scores at once, differentiated by JAX."""
    batch, length, _, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, size)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key) * size**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), 0.0))
    e, null = jnp.exp(scores - top), jnp.exp(-top)
    total = e.sum(-1, keepdims=True) + null
    return jnp.einsum("BKGTS,BSKH->BTKGH", e / total, value).reshape(query.shape), null / total


def with_gradients(function):
    """The gradients of a loss that reads the output and the null mass."""

    def loss(*arrays):
        output, null_mass = function(*arrays)
        return (output**2).sum() + null_mass.sum()

    return jax.grad(loss, (0, 1, 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    repetitions = parser.parse_args().repetitions
    functions = {"jax.nn softmax": jax_softmax, "softmax1 written out": written_out}
    for name in implementations("null_attention"):
        if name != "reference":
            functions[f"null_attention {name}"] = lambda *arrays, name=name: null_attention(*arrays, implementation=name)[:2]
    comparisons = {}
    for batch, length, heads, key_heads, size in SHAPES:
        keys = jax.random.split(jax.random.key(0), 3)
        arrays = tuple(jax.random.normal(k, (batch, length, n, size)) for k, n in zip(keys, (heads, key_heads, key_heads)))
        for what, wrap in (("forward", lambda f: lambda *x: f(*x)[0]), ("forward and backward", with_gradients)):
            title = f"{what}, causal, batch {batch}, length {length}, heads {heads}/{key_heads} of {size}, float32"
            results = harness.measure({name: wrap(f) for name, f in functions.items()}, arrays, repetitions=repetitions)
            harness.show(title, results, "jax.nn softmax")
            comparisons[title] = results
    harness.save("attention", comparisons)


if __name__ == "__main__":
    main()
