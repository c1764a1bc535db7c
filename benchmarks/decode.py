"""Decoding, one query against a preallocated cache of 32k keys, beside a plain read of the live bytes.

python benchmarks/decode.py [--repetitions 31]
"""

import argparse

import _harness as harness
import jax
import jax.numpy as jnp

from pallas_kernels import null_attention

KEYS, KEY_HEADS, SIZE = 2**15, 8, 128
GROUPS = (1, 4)  # query heads a key head


def compare(batch: int, group: int, dtype, repetitions: int) -> dict:
    """The time of a query against the whole cache and against half of it, and of reading as many bytes: two sums."""
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (batch, 1, group * KEY_HEADS, SIZE), dtype)
    key, value = (jax.random.normal(k, (batch, KEYS, KEY_HEADS, SIZE), dtype) for k in keys[1:])
    comparisons = {}
    for live in (KEYS, KEYS // 2):
        lengths = jnp.full(batch, live, jnp.int32)
        runs = {
            "plain read": lambda query, key, value, lengths, *live: [x.sum() for x in live],
            "null_attention": lambda query, key, value, lengths, *_: null_attention(
                query, key, value, kv_lengths=lengths
            ),
        }
        title = f"{live} live keys of {KEYS}, batch {batch}, heads {group * KEY_HEADS}/{KEY_HEADS} of {SIZE}, {dtype}"
        arrays = (query, key, value, lengths, key[:, :live], value[:, :live])
        found = harness.measure(runs, arrays, repetitions=repetitions)
        harness.show(title, found, "plain read")
        ratios = {name: found["null_attention"][name] / found["plain read"][name] for name in ("median_ms", "cpu_ms")}
        print(f"{ratios['median_ms']:.2f} times the read's time, {ratios['cpu_ms']:.2f} times its time on all cores")
        comparisons[title] = found
    return comparisons


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=31)
    repetitions, comparisons = parser.parse_args().repetitions, {}
    cpu = jax.default_backend() == "cpu"
    for group in GROUPS:
        batch, dtype = (1, "float32") if cpu else (8, "bfloat16")
        comparisons |= compare(batch, group, dtype, repetitions)
    harness.save("decode", comparisons)


if __name__ == "__main__":
    main()
