"""The attention layer against probabilities written out in numpy, for every normalizer and option."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oasis_jax import Attention, AttentionConfig, Context, UserError
from oasis_jax.model.normalizers import DENSE_NORMALIZERS, NULL_LOGITS

B, T, D, N, K, H = 2, 9, 20, 6, 3, 4
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 5 + [3] * 4])


def layer(seed=0, **options):
    """A layer whose biases, gains and nulls are away from the one value at which they start."""
    module = Attention(
        AttentionConfig(**dict(width=D, num_heads=N, num_kv_heads=K, head_dim=H) | options), rngs=nnx.Rngs(seed)
    )
    rng = np.random.default_rng(seed)
    for name in set(module.names) - {"query", "key", "value", "output", "gate"}:
        parameter = getattr(module, name)
        parameter[...] = parameter[...] + jnp.asarray(rng.normal(size=parameter.shape), jnp.float32)
    return module, {name: np.array(value, np.float64) for name, value in module.parameters.items()}


def rotate(x, positions, theta):
    """Complex-number form of the rotary embedding."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    angle = positions[:, None] * theta ** (-np.arange(half) / half)
    z = z * np.exp(1j * angle)[None, :, None, :]
    return np.concatenate([z.real, z.imag], -1)


def project(p, x, config, positions):
    """Queries, keys and values; biases first, then QK-norm, then rotary positions."""
    q, k, v = (
        np.einsum("btd,dnh->btnh", x, p[name]) + p.get(f"{name}_bias", 0.0) for name in ("query", "key", "value")
    )
    if config.qk_norm:
        rms = lambda y: y / np.sqrt((y * y).mean(-1, keepdims=True) + config.norm_epsilon)
        q, k = rms(q) * p["query_norm"], rms(k) * p["key_norm"]
    if config.rope_theta:
        q, k = rotate(q, positions, config.rope_theta), rotate(k, positions, config.rope_theta)
    return q, k, v


def scaled(products, config):
    s = products * H**-0.5
    return config.logit_softcap * np.tanh(s / config.logit_softcap) if config.logit_softcap else s


def null_logit(p, config, query, x, n):
    """b of one query [H] of head n, whose layer reads x [D]."""
    if config.normalizer in ("null_key", "null_key_value"):
        return np.log(np.exp(scaled(p["null_key"][:, n // (N // K)] @ query, config)).sum())
    if config.normalizer == "token_null":
        return x @ p["null_projection"][:, n]
    return {"softmax": -np.inf, "softmax1": 0.0, "learned_sink": p.get("null_logit", np.zeros(N))[n]}[config.normalizer]


def oracle(p, x, config, segments=None):
    """Loops over batch, heads and queries; returns output, heads, probabilities, null mass and null logits."""
    q, k, v = project(p, x, config, np.arange(T))
    heads, probabilities = np.zeros((B, T, N, H)), np.zeros((B, N, T, T))
    null_mass, logits = np.zeros((2, B, N, T))
    means = np.zeros((B, T, N, H))  # of the values that a query sees
    for b, n, i in np.ndindex(B, N, T):
        kn = n // (N // K)
        same = np.ones(T, bool) if segments is None else segments[b] == segments[b, i]
        allowed = same & (np.arange(T) <= i) & ((i - np.arange(T) < config.window) | (not config.window))
        s = scaled(np.array([q[b, i, n] @ k[b, j, kn] for j in range(T)]), config)
        if config.normalizer in DENSE_NORMALIZERS:
            row = np.array(DENSE_NORMALIZERS[config.normalizer](jnp.asarray(s), jnp.asarray(allowed), config))
            omega = max(0.0, 1 - row.sum())
        else:
            logits[b, n, i] = null_logit(p, config, q[b, i, n], x[b, i], n)
            null, e = np.exp(logits[b, n, i]), np.where(allowed, np.exp(s), 0)
            row, omega = e / (null + e.sum()), null / (null + e.sum())
        probabilities[b, n, i], null_mass[b, n, i] = row, omega
        heads[b, i, n] = row @ v[b, :, kn]
        means[b, i, n] = v[b, allowed, kn].mean(0)
        if "null_value" in p:
            shares = np.exp(scaled(p["null_key"][:, kn] @ q[b, i, n], config))
            heads[b, i, n] += omega * (shares / shares.sum()) @ p["null_value"][:, kn]
    sigmoid = lambda y: 1 / (1 + np.exp(-y))
    if config.gate == "affine":
        alpha = np.clip(0.1 * (x @ p["gate"]) + 0.5, 0, 1)[..., None]
        out = alpha * heads + (p["gate_average"][:, None] - alpha) * means
    elif config.gate == "elementwise":
        out = heads * sigmoid(np.einsum("btd,dnh->btnh", x, p["gate"]))
    else:
        out = heads * (sigmoid(x @ p["gate"])[..., None] if config.gate == "per_head" else 1.0)
    output = np.einsum("btnh,nhd->btd", out, p["output"]) + p.get("output_bias", 0.0)
    return output, heads, probabilities, null_mass, logits


@pytest.mark.parametrize("normalizer", [*NULL_LOGITS, *DENSE_NORMALIZERS])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(qkv_bias=True, output_bias=True), marks=pytest.mark.slow),
        dict(qk_norm=True, gate="elementwise"),
        dict(window=4, logit_softcap=2.5, gate="per_head", rope_theta=0.0, null_keys=3),
        dict(window=3, gate="affine"),
    ],
    ids=["biases", "qk_norm_gate", "window_softcap", "affine"],
)
def test_layer_against_numpy(normalizer, options):
    module, p = layer(normalizer=normalizer, **options)
    x = np.random.default_rng(3).normal(size=(B, T, D)) * 2
    output, statistics = module(jnp.asarray(x, jnp.float32))
    expected, heads, probabilities, null_mass, logits = oracle(p, x, module.config)
    np.testing.assert_allclose(output, expected, atol=3e-5)
    np.testing.assert_allclose(statistics.head_output, heads, atol=2e-5)
    np.testing.assert_allclose(statistics.null_mass, null_mass, atol=5e-6)
    np.testing.assert_allclose(statistics.first_token_mass, probabilities[..., 0], atol=5e-6)
    assert (statistics.lse is None) == (normalizer in DENSE_NORMALIZERS)
    if statistics.lse is not None and normalizer != "softmax":
        np.testing.assert_allclose(statistics.lse, logits - np.log(null_mass), atol=5e-5)


@pytest.mark.parametrize("normalizer", ["softmax1", "clipped", "null_key_value"])
@pytest.mark.parametrize("window", [0, 2])
def test_segments_confine_attention_and_its_statistics(normalizer, window):
    module, p = layer(normalizer=normalizer, window=window)
    x = np.random.default_rng(4).normal(size=(B, T, D))
    context = Context(segment_ids=jnp.asarray(SEGMENTS))
    output, statistics = module(jnp.asarray(x, jnp.float32), context)
    expected, _, probabilities, null_mass, _ = oracle(p, x, module.config, SEGMENTS)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    np.testing.assert_allclose(statistics.null_mass, null_mass, atol=1e-5)
    # The mass of the first token is that of each document's own.
    first = np.array([[np.argmax(row == row[i]) for i in range(T)] for row in SEGMENTS])[:, None, :, None]
    first_mass = np.take_along_axis(probabilities, np.broadcast_to(first, (B, N, T, 1)), axis=-1)[..., 0]
    np.testing.assert_allclose(statistics.first_token_mass, first_mass, atol=1e-5)


@pytest.mark.parametrize("normalizer", ["softmax1", "sparsemax"])
def test_given_positions_shift_the_rotation(normalizer):
    module, _ = layer(normalizer=normalizer)
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    plain, _ = module(x)
    shifted, _ = module(x, Context(positions=jnp.arange(T)[None] + 100))  # scores depend on differences alone
    stretched, _ = module(x, Context(positions=3 * jnp.arange(T)[None]))
    by_row, _ = module(x, Context(positions=jnp.stack([jnp.arange(T), 3 * jnp.arange(T)])))
    np.testing.assert_allclose(plain, shifted, atol=1e-4)
    assert float(jnp.abs(plain - stretched).max()) > 1e-2
    np.testing.assert_allclose(by_row, jnp.stack([plain[0], stretched[1]]), atol=1e-6)


def test_norm_epsilon_reaches_queries_and_keys():
    """So large an epsilon that normed queries and keys are small: attention is then nearly uniform."""
    x = 0.01 * jax.random.normal(jax.random.key(0), (B, T, D))
    small, large = (layer(qk_norm=True, norm_epsilon=epsilon, normalizer="softmax")[0] for epsilon in (1e-6, 1.0))
    uniform = 1 / jnp.arange(1, T + 1)
    np.testing.assert_allclose(large(x)[1].first_token_mass, jnp.broadcast_to(uniform, (B, N, T)), atol=1e-3)
    assert float(jnp.abs(small(x)[1].first_token_mass - uniform).max()) > 0.1


def test_bfloat16_in_bfloat16_out_with_float32_masses():
    for normalizer in ("softmax1", "clipped", "null_key_value", "token_null"):
        module, _ = layer(normalizer=normalizer, qkv_bias=True, output_bias=True)
        x = jax.random.normal(jax.random.key(0), (B, T, D))
        wide, _ = module(x)
        output, statistics = module(x.astype(jnp.bfloat16))
        assert output.dtype == jnp.bfloat16
        assert statistics.null_mass.dtype == statistics.first_token_mass.dtype == jnp.float32
        np.testing.assert_allclose(output.astype(jnp.float32), wide, atol=0.12)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(normalizer="softmax_1"), "did you mean 'softmax1'"),
        (dict(num_kv_heads=4), "4 does not divide num_heads=6"),
        (dict(head_dim=5), "an even number of channels, got 5"),
        (dict(head_dim=6, rope_fraction=0.5), "an even number of channels, got 3 of head size 6"),
        (dict(rope_fraction=1.5), "must lie above 0 and not above 1, got 1.5"),
        (dict(num_heads=6, head_dim=0), "does not divide width=20"),
        (dict(window=-1), "must be at least 0"),
        (dict(norm_epsilon=-1e-6), "norm_epsilon: must be at least 0"),
    ],
)
def test_bad_configs_are_one_clear_line(options, words):
    with pytest.raises(UserError, match=words) as error:
        AttentionConfig(**(dict(width=D, num_heads=N, num_kv_heads=K, head_dim=H) | options))
    assert "\n" not in str(error.value)


def test_an_unknown_backend_lists_what_there_is():
    module, _ = layer(attention_implementation="cudn")
    with pytest.raises(UserError, match="xla"):
        module(jnp.zeros((1, 3, D)))


@pytest.mark.parametrize("normalizer", ["null_key", "null_key_value", "token_null"])
def test_every_null_runs_on_the_backend_that_was_named(normalizer):
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    found = {}
    for name in ("xla", "reference", "cudnn"):
        module, _ = layer(attention_implementation=name, normalizer=normalizer, null_keys=2)
        if name == "cudnn":
            with pytest.raises(ValueError, match="cudnn: runs on NVIDIA GPUs only"):
                module(x)
        else:
            found[name] = module(x)[0]
    np.testing.assert_allclose(found["xla"], found["reference"], atol=1e-5)
