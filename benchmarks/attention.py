"""null_attention against jax.nn's softmax attention and against Softmax1 written out, on whatever device JAX finds.

python benchmarks/attention.py [--repetitions 15]
"""

import argparse

import _harness as harness
import jax
import jax.numpy as jnp

from pallas_kernels import implementations, null_attention

# batch, length, query heads, key heads, head size; on accelerators 16k tokens, or one example where it is longer
CPU_SHAPES = ((1, 512, 8, 4, 64), (1, 2048, 8, 4, 64), (16, 256, 4, 4, 32))
ACCELERATOR_SHAPES = tuple(
    (max(1, 2**14 // length), length, 32, 8, size)
    for size in (64, 128)
    for length in (2**11, 2**12, 2**13, 2**14, 2**15)
)


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


def transformer_engine(query, key, value):
    """TransformerEngine's off-by-one softmax through cuDNN: it has no null mass, so its loss reads the output alone."""
    from transformer_engine.jax import attention as te

    batch, length = query.shape[:2]
    lengths = jnp.full((batch,), length, jnp.int32)
    output = te.fused_attn(
        (query, key, value),
        None,
        te.SequenceDescriptor.from_seqlens((lengths, lengths)),
        None,
        attn_bias_type=te.AttnBiasType.NO_BIAS,
        attn_mask_type=te.AttnMaskType.CAUSAL_MASK,
        qkv_layout=te.QKVLayout.BSHD_BSHD_BSHD,
        softmax_type=te.AttnSoftmaxType.OFF_BY_ONE_SOFTMAX,
        scaling_factor=query.shape[-1] ** -0.5,
        dropout_probability=0.0,
        is_training=True,
    )
    return output, jnp.zeros(())


def functions() -> dict:
    """Every backend that can be asked for and its peers; what cannot run here is told by `harness.runnable`."""
    cudnn = lambda *x: (jax.nn.dot_product_attention(*x, is_causal=True, implementation="cudnn"), jnp.zeros(()))
    peers = {"jax.nn softmax": jax_softmax, "jax.nn softmax, cudnn": cudnn, "softmax1 written out": written_out}
    peers["TransformerEngine off-by-one"] = transformer_engine
    for name in implementations("null_attention"):
        if name != "reference":
            peers[f"null_attention {name}"] = lambda *arrays, name=name: null_attention(*arrays, implementation=name)[
                :2
            ]
    return peers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    repetitions = parser.parse_args().repetitions
    peak = harness.peaks(repetitions=repetitions)
    cpu = jax.default_backend() == "cpu"
    dtype, comparisons, left_out = ("float32" if cpu else "bfloat16"), {}, {}
    for batch, length, heads, key_heads, size in CPU_SHAPES if cpu else ACCELERATOR_SHAPES:
        keys = jax.random.split(jax.random.key(0), 3)
        arrays = tuple(
            jax.random.normal(k, (batch, length, n, size), dtype) for k, n in zip(keys, (heads, key_heads, key_heads))
        )
        flop = (
            2 * batch * heads * length * length * size
        )  # two matmuls over half of the square; backward five more of the same size
        for what, wrap, factor in (
            ("forward", lambda f: lambda *x: f(*x)[0], 1.0),
            ("forward and backward", with_gradients, 3.5),
        ):
            title = f"{what}, causal, batch {batch}, length {length}, heads {heads}/{key_heads} of {size}, {dtype}"
            good, left_out[title] = harness.runnable({name: wrap(f) for name, f in functions().items()}, arrays)
            results = harness.measure(good, arrays, repetitions=repetitions)
            harness.add_shares(results, peak, flop=factor * flop)
            harness.show(title, results, "jax.nn softmax" if "jax.nn softmax" in results else next(iter(results)))
            comparisons[title] = results
    harness.save("attention", comparisons, peaks=peak, left_out=left_out)


if __name__ == "__main__":
    main()
