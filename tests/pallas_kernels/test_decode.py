"""Few queries against a long cache in plain XLA, whose products are written element by element on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import null_attention
from pallas_kernels.null_attention import xla_masked

KEYS = 1037  # two whole tiles and one that begins earlier
GROUPED, SEVERAL, SINGLE = (1, 6, 3, 48), (3, 2, 2, 80), (1, 3, 3, 16)  # queries, query heads, key heads, head size
LENGTHS = np.array([613, 1037])


def oracle(query, key, value, b, *, window=None, softcap=None, lengths=LENGTHS, mask=None):
    """Output, null mass and lse in float64, query by query; dead entries are never looked at."""
    batch, length, heads, size = query.shape
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = heads // key.shape[2]
    output, null_mass = np.zeros(query.shape), np.zeros((batch, heads, length))
    lse = np.zeros_like(null_mass)
    for i, j, n in np.ndindex(batch, length, heads):
        place = lengths[i] - length + j
        seen = [s for s in range(lengths[i]) if s <= place and (window is None or place - s < window)]
        seen = [s for s in seen if mask is None or mask[i, 0, 0, s]]
        scores = key[i, seen, n // group] @ query[i, j, n] * size**-0.5
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        total = np.exp(b[n]) + np.exp(scores).sum()
        output[i, j, n] = np.exp(scores) @ value[i, seen, n // group] / total
        null_mass[i, n, j], lse[i, n, j] = np.exp(b[n]) / total, np.log(total)
    return output, null_mass, lse


def arrays(shape, dtype=np.float32):
    (length, heads, key_heads, size), random = shape, np.random.default_rng(5)
    query = random.normal(size=(2, length, heads, size)).astype(dtype)
    key, value = (random.normal(size=(2, KEYS, key_heads, size)).astype(dtype) for _ in range(2))
    return query, key, value, random.normal(size=heads).astype(np.float32)


@pytest.mark.parametrize(
    "shape, options",
    [
        (GROUPED, {}),
        (GROUPED, {"mask": True}),
        (SEVERAL, {"window": 600}),
        (SINGLE, {"softcap": 2.0}),
        ((1, 4, 1, 64), {}),  # products of 32 numbers at once
    ],
    ids=str,
)
def test_equals_attention_counted_out(shape, options):
    query, key, value, b = arrays(shape)
    if "mask" in options:
        options = {"mask": np.random.default_rng(2).random((2, 1, 1, KEYS)) < 0.6}
    assert xla_masked._Grid.of_forward(query, key).few
    wanted = oracle(query, key, value, b, **options)
    for x in (key, value):
        x[0, LENGTHS[0] :] = np.nan  # dead entries
        if "mask" in options:
            x[np.broadcast_to(~options["mask"][:, 0, 0, :], (2, KEYS))] = np.inf
    renamed = {"logit_softcap" if name == "softcap" else name: x for name, x in options.items()}
    found = null_attention(query, key, value, null_logit=b, kv_lengths=LENGTHS, implementation="xla", **renamed)
    for x, y in zip(found, wanted):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
def test_gradients_equal_those_of_the_reference():
    query, key, value, b = arrays(SEVERAL)

    def loss(implementation, *arrays):
        options = dict(kv_lengths=jnp.asarray(LENGTHS), implementation=implementation)
        output, null_mass, lse = null_attention(*arrays[:3], null_logit=arrays[3], **options)
        return (output**2).sum() + (null_mass * lse).sum()

    found, wanted = (jax.grad(loss, (1, 2, 3, 4))(name, query, key, value, b) for name in ("xla", "reference"))
    for x, y in zip(found, wanted):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_float64_with_wide_indices():
    with jax.enable_x64(True):
        query, key, value, b = arrays(GROUPED, np.float64)
        found = null_attention(query, key, value, null_logit=b, kv_lengths=LENGTHS, implementation="xla")
        for x, y in zip(found, oracle(query, key, value, b.astype(np.float64))):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)


def test_half_precision_and_vmap_over_lengths():
    query, key, value, b = (jnp.asarray(x) for x in arrays(GROUPED))
    half = [x.astype(jnp.bfloat16) for x in (query, key, value)]

    def attend(lengths):
        return null_attention(*half, null_logit=b, kv_lengths=lengths, implementation="xla")

    found = jax.jit(jax.vmap(attend))(jnp.asarray([LENGTHS, LENGTHS - 77]))
    for i, lengths in enumerate((LENGTHS, LENGTHS - 77)):
        wanted = oracle(*half, np.asarray(b), lengths=lengths)
        for x, y, tolerance in zip(found, wanted, (2.0**-7, 1e-5, 1e-5)):
            np.testing.assert_allclose(np.asarray(x[i], np.float64), y, rtol=tolerance, atol=tolerance * 0.1)


def test_the_cache_is_not_copied():
    query, key, value = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays((1, 16, 8, 128))[:3])
    function = jax.jit(lambda q, k, v, n: null_attention(q, k, v, kv_lengths=n, implementation="xla"))
    program = function.lower(query, key, value, jax.ShapeDtypeStruct((2,), jnp.int32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2 * KEYS * 8 * 128 * 4  # less than one of keys and values
