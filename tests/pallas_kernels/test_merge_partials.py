"""Merging null-free partial results over key shards: the null counts once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import merge_partials, null_attention

SHARDS = [(0, 11), (11, 12), (12, 29), (29, 37)]


def arrays():
    random = np.random.default_rng(0)
    return [
        random.normal(size=shape).astype(np.float32) for shape in [(2, 19, 6, 5), (2, 37, 3, 5), (2, 37, 3, 5), (6,)]
    ]


def in_shards(query, key, value, null_logit, partial_logit=-jnp.inf):
    """The whole from its shards; segment ids hide the first shard from the last query."""
    hide = lambda low, high: (jnp.zeros((2, 19), int).at[:, -1].set(int(low == 0)), jnp.zeros((2, high - low), int))
    parts = [
        null_attention(
            query,
            key[:, low:high],
            value[:, low:high],
            null_logit=partial_logit,
            is_causal=False,
            segment_ids=hide(low, high),
        )
        for low, high in SHARDS
    ]
    return merge_partials([part.output for part in parts], [part.lse for part in parts], null_logit=null_logit)


def whole(query, key, value, null_logit):
    ids = jnp.zeros((2, 19, 37), bool).at[:, -1, :11].set(True)
    scores = jnp.einsum("btkgh,bskh->bkgts", query.reshape(2, 19, 3, 2, 5), key) * 5**-0.5
    e = jnp.where(ids[:, None, None], 0.0, jnp.exp(scores))
    null = jnp.exp(null_logit).reshape(3, 2, 1)
    total = e.sum(-1) + null
    output = jnp.einsum("bkgts,bskh->btkgh", e / total[..., None], value).reshape(query.shape)
    return output, (null / total).reshape(2, 6, 19), jnp.log(total).reshape(2, 6, 19)


@pytest.mark.parametrize("null_logit", ["per_head", -np.inf], ids=["per_head", "softmax"])
def test_shards_make_the_whole_with_gradients(null_logit):
    query, key, value, b = arrays()
    b = b if null_logit == "per_head" else np.full(6, -np.inf, np.float32)

    def loss(function):
        def total(*x):
            output, null_mass, lse = function(*x)
            return jnp.sin(3 * output).sum() + (null_mass * lse).sum(), (output, null_mass, lse)

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(query, key, value, b)

    with jax.enable_x64(True):
        query, key, value, b = (jnp.asarray(x, jnp.float64) for x in (query, key, value, b))
        for actual, wanted in zip(jax.tree.leaves(loss(in_shards)), jax.tree.leaves(loss(whole))):
            np.testing.assert_allclose(actual, wanted, rtol=1e-11, atol=1e-12)


def test_one_null_per_shard_is_wrong():
    query, key, value, b = arrays()
    right, wrong = whole(query, key, value, b)[0], in_shards(query, key, value, -np.inf, partial_logit=b).output
    np.testing.assert_allclose(in_shards(query, key, value, b).output, right, atol=1e-6)
    assert jnp.abs(wrong - right).max() > 0.1 * jnp.abs(right).max()


@pytest.mark.parametrize("null_logit", [0.0, -np.inf])
def test_a_query_that_no_shard_serves(null_logit):
    def merge(output, lse):
        return merge_partials([output, output], [lse, lse], null_logit=null_logit)

    output, lse = jnp.ones((1, 3, 2, 5)), jnp.full((1, 2, 3), -jnp.inf)
    merged = merge(output, lse)
    assert np.all(np.asarray(merged.output) == 0) and np.all(np.asarray(merged.lse) == null_logit)
    assert np.all(np.asarray(merged.null_mass) == (1.0 if np.isfinite(null_logit) else 0.0))
    gradients = jax.grad(lambda *x: merge(*x).output.sum() + merge(*x).null_mass.sum(), (0, 1))(output, lse)
    assert all(np.all(np.asarray(x) == 0) for x in gradients)
