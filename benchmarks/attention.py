"""null_attention on whatever device JAX finds: against jax.nn's softmax attention and against Softmax1 written out; a
null per query against a null per head. A query against a long cache is in decode.py.

python benchmarks/attention.py [--repetitions 15] [--part peers] [--part nulls]
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


def against_peers(shape, dtype, peak, repetitions: int, left_out: dict) -> dict:
    """All backends and their peers at one shape."""
    (batch, length, heads, _, size), arrays, comparisons = shape, random_arrays(shape, dtype), {}
    # two matmuls over half of the square; backward five more of the same size
    flop = 2 * batch * heads * length * length * size
    for what, wrap, factor in (
        ("forward", lambda f: lambda *x: f(*x)[0], 1.0),
        ("forward and backward", with_gradients, 3.5),
    ):
        title = title_of(what, shape, dtype)
        good, left_out[title] = harness.runnable({name: wrap(f) for name, f in functions().items()}, arrays)
        results = harness.measure(good, arrays, repetitions=repetitions)
        harness.add_shares(results, peak, flop=factor * flop)
        harness.show(title, results, "jax.nn softmax" if "jax.nn softmax" in results else next(iter(results)))
        comparisons[title] = results
    return comparisons


def nulls(shape, dtype, repetitions: int) -> dict:
    """What a null per query, null keys and null values cost beside a null per head, gradients included."""
    (batch, length, heads, key_heads, size), arrays, comparisons = shape, random_arrays(shape, dtype), {}
    per_head, per_query = jnp.zeros(heads), jnp.zeros((batch, length, heads))
    constants = jax.random.normal(jax.random.key(1), (4, key_heads, size), dtype)
    options = {
        "null per head": dict(null_logit=per_head),
        "null per query": dict(null_logit=per_query),
        "null key": dict(null_key=constants[0]),
        "4 null keys and values": dict(null_key=constants, null_value=constants),
    }

    def attend(null, *arrays):
        return null_attention(*arrays, **null)[:2]

    def gradients(null, *arrays):
        loss = lambda null, *arrays: sum((x**2).sum() for x in attend(null, *arrays))
        return jax.grad(loss, (0, 1, 2, 3))(null, *arrays)

    for what, function in (("forward", attend), ("forward and backward", gradients)):
        runs = {name: lambda *x, null=null, f=function: f(null, *x) for name, null in options.items()}
        title = title_of(f"nulls, {what}", shape, dtype)
        comparisons[title] = harness.measure(runs, arrays, repetitions=repetitions)
        harness.show(title, comparisons[title], "null per head")
    return comparisons


def random_arrays(shape, dtype) -> tuple:
    batch, length, heads, key_heads, size = shape
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(k, (batch, length, n, size), dtype) for k, n in zip(keys, (heads, key_heads, key_heads))
    )


def title_of(what: str, shape, dtype) -> str:
    batch, length, heads, key_heads, size = shape
    return f"{what}, causal, batch {batch}, length {length}, heads {heads}/{key_heads} of {size}, {dtype}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--part", choices=("peers", "nulls"), action="append")
    arguments = parser.parse_args()
    parts, repetitions = arguments.part or ["peers", "nulls"], arguments.repetitions
    peak = harness.peaks(repetitions=repetitions)
    cpu = jax.default_backend() == "cpu"
    dtype, comparisons, left_out = ("float32" if cpu else "bfloat16"), {}, {}
    if "peers" in parts:
        for shape in CPU_SHAPES if cpu else ACCELERATOR_SHAPES:
            comparisons |= against_peers(shape, dtype, peak, repetitions, left_out)
    if "nulls" in parts:
        comparisons |= nulls((1, 2048, 8, 4, 64) if cpu else (8, 2048, 32, 8, 128), dtype, repetitions)
    name = "attention" if len(parts) == 2 else "attention-" + "-".join(parts)
    harness.save(name, comparisons, peaks=peak, left_out=left_out)


if __name__ == "__main__":
    main()
