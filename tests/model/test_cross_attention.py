"""Attention to another sequence: against Flax' own module, against numpy, and between NNX and Linen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sampling import sampled

from oasis_jax import Attention, AttentionConfig, Context, UserError, linen
from oasis_jax.evaluation import measure
from oasis_jax.model.cache import KVCache
from oasis_jax.model.normalizers import DENSE_NORMALIZERS

B, T, S, D, C, N, K, H = 2, 5, 9, 12, 7, 6, 3, 4
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
OTHER = np.random.default_rng(1).normal(size=(B, S, C)).astype(np.float32)
QUERY_IDS = np.array([[0, 0, 0, 1, 1], [2, 2, 4, 4, 4]])
OTHER_IDS = np.array([[0, 0, 0, 0, 1, 1, 1, -1, -1], [9, 2, 2, 2, 9, 9, -1, -1, -1]])  # the second row has no 4


def config(**options):
    return AttentionConfig(**dict(width=D, num_heads=N, num_kv_heads=K, head_dim=H, rope_theta=0.0) | options)


def layer(options=None, **arguments):
    """A layer whose nulls, biases and gains are away from their start."""
    module = Attention(config(**options or {}), kv_width=C, rngs=nnx.Rngs(0), **arguments)
    random = np.random.default_rng(2)
    for name in module.names:
        parameter = getattr(module, name)
        parameter[...] = parameter[...] + jnp.asarray(0.3 * random.normal(size=parameter.shape), parameter.dtype)
    return module


def test_it_equals_the_attention_of_flax():
    ours = layer(dict(normalizer="softmax", qkv_bias=True, output_bias=True))
    theirs = nnx.MultiHeadAttention(
        num_heads=N, num_kv_heads=K, in_features=D, in_kv_features=C, qkv_features=N * H, decode=False, rngs=nnx.Rngs(0)
    )
    parts = dict(query="query", key="key", value="value", output="out")
    for name, other in parts.items():
        kernel, bias = getattr(theirs, other).kernel, getattr(theirs, other).bias
        kernel[...], bias[...] = (
            getattr(ours, name + end)[...].reshape(x.shape) for end, x in (("", kernel), ("_bias", bias))
        )

    def differentiate(call, module):
        graphdef, state = nnx.split(module)
        loss = lambda state, x, other: (call(nnx.merge(graphdef, state), x, other) ** 3).sum()
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(state, X, OTHER)

    value, (ours_state, *inputs) = differentiate(lambda m, x, other: m(x, inputs_kv=other)[0], ours)
    expected, (theirs_state, *wanted) = differentiate(lambda m, x, other: m(x, other), theirs)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, other in parts.items():
        inputs += [ours_state[name].get_value(), ours_state[f"{name}_bias"].get_value()]
        wanted += [theirs_state[other]["kernel"].get_value(), theirs_state[other]["bias"].get_value()]
    scale = max(np.abs(x).max() for x in wanted)
    for x, y in zip(inputs, wanted):
        np.testing.assert_allclose(x.reshape(y.shape), y, atol=3e-6 * scale, rtol=0)


def oracle(p, settings, segments):
    """Loops over batch, heads and queries, in float64: output [B, T, D], null mass and first-token mass [B, N, T]."""
    project = lambda x, name: np.einsum("btd,dnh->btnh", x, p[name])
    q, k, v = project(X, "query"), project(OTHER, "key"), project(OTHER, "value")
    heads, null_mass, first_mass = np.zeros((B, T, N, H)), np.zeros((B, N, T)), np.zeros((B, N, T))
    for b, n, i in np.ndindex(B, N, T):
        seen = np.ones(S, bool) if not segments else OTHER_IDS[b] == QUERY_IDS[b, i]
        s = k[b, :, n // (N // K)] @ q[b, i, n] / np.sqrt(H)
        if settings.normalizer in DENSE_NORMALIZERS:
            row = np.asarray(DENSE_NORMALIZERS[settings.normalizer](jnp.asarray(s), jnp.asarray(seen), settings))
            omega = max(0.0, 1 - row.sum())
        else:
            logit = {
                "softmax": -np.inf,
                "softmax1": 0.0,
                "token_null": X[b, i] @ p.get("null_projection", np.zeros((D, N)))[:, n],
            }
            logit |= {"learned_sink": p.get("null_logit", np.zeros(N))[n]}
            logit |= {"null_key_value": p["null_key"][0, n // 2] @ q[b, i, n] / np.sqrt(H) if "null_key" in p else 0.0}
            e, null = np.where(seen, np.exp(s), 0), np.exp(logit[settings.normalizer])
            total = e.sum() + null or 1.0
            row, omega = e / total, null / total
        heads[b, i, n] = row @ v[b, :, n // (N // K)]
        if "null_value" in p:
            heads[b, i, n] += omega * p["null_value"][0, n // (N // K)]
        null_mass[b, n, i] = omega
        first_mass[b, n, i] = row[seen.argmax()] if seen.any() else 0.0
    return np.einsum("btnh,nhd->btd", heads, p["output"]), null_mass, first_mass


NORMALIZERS = ("softmax", "softmax1", "learned_sink", "token_null", "null_key_value", "entmax15", "clipped")


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("normalizer", sampled(NORMALIZERS, ("softmax1", "null_key_value", "entmax15")))
def test_every_normalizer_is_its_definition(normalizer, segments):
    """A query of an id that no key has gives 0, or what its null gives."""
    module = layer(dict(normalizer=normalizer))
    p = {name: np.asarray(value, np.float64) for name, value in module.parameters.items()}
    ids = (Context(segment_ids=jnp.asarray(QUERY_IDS)), dict(kv_segment_ids=OTHER_IDS)) if segments else (Context(), {})
    output, statistics = nnx.jit(lambda m: m(X, ids[0], inputs_kv=OTHER, **ids[1]))(module)
    wanted, null_mass, first_mass = oracle(p, module.config, segments)
    for found, expected in (
        (output, wanted), (statistics.null_mass, null_mass), (statistics.first_token_mass, first_mass)
    ):  # fmt: skip
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert statistics.key.shape == (B, S, K, H) and statistics.static is None


def test_linen_is_the_same():
    options = dict(normalizer="token_null", gate="per_head", qk_norm=True)
    module, twin = layer(options), linen.Attention(config(**options), kv_width=C)
    params = linen.params_from_nnx(nnx.to_pure_dict(nnx.state(module)))
    output, _ = twin.apply({"params": params}, X, inputs_kv=OTHER)
    np.testing.assert_allclose(output, module(X, inputs_kv=OTHER)[0], atol=1e-6)


@pytest.mark.parametrize("make", [Attention, linen.Attention], ids=["nnx", "linen"])
def test_initializers_and_the_type_of_parameters(make):
    """A kernel is drawn as the matrix that it is: its fans are its numbers of inputs and of outputs."""
    seen = []

    def kernel_init(key, shape, dtype):
        seen.append(shape)
        return jnp.arange(np.prod(shape)).reshape(shape).astype(dtype)

    options = dict(normalizer="null_key", null_keys=2, qkv_bias=True, output_bias=True, gate="per_head", qk_norm=True)
    arguments = dict(
        kv_width=C, kernel_init=kernel_init, bias_init=jax.nn.initializers.ones, param_dtype=jnp.bfloat16
    )  # fmt: skip
    if make is Attention:
        parameters = make(config(**options), **arguments, rngs=nnx.Rngs(0)).parameters
    else:
        found = make(config(**options), **arguments).init(jax.random.key(0), X, inputs_kv=OTHER)["params"]
        parameters = linen.nn.unbox(found)
    assert seen == [(D, N * H), (C, K * H), (C, K * H), (N * H, D), (D, N)]
    assert parameters["query"].shape == (D, N, H) and parameters["output"].shape == (N, H, D)
    assert all(x.dtype == jnp.bfloat16 for x in parameters.values())
    for name in ("query_bias", "key_bias", "value_bias", "output_bias", "query_norm", "key_norm"):
        assert (parameters[name] == 1).all()
    np.testing.assert_array_equal(parameters["query"][0, 1].astype(int), np.arange(H, 2 * H))
    assert 0.1 < np.abs(parameters["null_key"].astype(np.float32)).mean() < 1.5  # as ever


def test_parameters_of_another_type_change_nothing_else():
    half = layer(dict(normalizer="softmax1"), param_dtype=jnp.bfloat16)
    output, statistics = half(X, inputs_kv=OTHER)
    assert output.dtype == jnp.float32 and statistics.null_mass.dtype == jnp.float32


def test_mistakes_are_named():
    module, ids = layer(), jnp.asarray(QUERY_IDS)
    wrong = {
        r"inputs_kv: must have the shape \[2, S, 7\], got \(2, 9, 12\)": dict(inputs_kv=np.zeros((B, S, D))),
        r"inputs_kv: must have the shape \[2, S, 7\], got \(9, 7\)": dict(inputs_kv=np.zeros((S, C))),
        "kv_segment_ids: must be given where": dict(inputs_kv=OTHER, kv_segment_ids=OTHER_IDS),
        "kv_segment_ids: must be given": dict(inputs_kv=OTHER, context=Context(segment_ids=ids)),
        r"kv_segment_ids: must be integers of shape \(2, 9\)": dict(
            inputs_kv=OTHER, kv_segment_ids=QUERY_IDS, context=Context(segment_ids=ids)
        ),
        "context.cache: is of self-attention": dict(
            inputs_kv=OTHER, context=Context(cache=KVCache(*(jnp.zeros((B, 9, K, H)),) * 2, jnp.int32(0)))
        ),
    }
    for says, given in wrong.items():
        with pytest.raises(UserError, match=f"^{says}"):
            module(X, **given)
    for name, value in (("rope_theta", 1e4), ("window", 3)):
        with pytest.raises(UserError, match=rf"^attention\.{name}: must be 0 where keys come from another sequence"):
            layer({name: value})(X, inputs_kv=OTHER)


def test_measures_refuse_it_by_name():
    module = layer()
    graphdef, params = nnx.split(module)
    apply = lambda params, tokens: (jnp.zeros((B, T, 3)), [nnx.merge(graphdef, params)(X, inputs_kv=OTHER)[1]])
    with pytest.raises(UserError, match=r"^measure: attention layer 0 has 5 queries and 9 keys; only self-attention"):
        measure(apply, params, [{"inputs": np.zeros((B, T), int)}], measures=["sinks"])
