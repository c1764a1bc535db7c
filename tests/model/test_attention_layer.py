"""The attention layer against probabilities written out in numpy, for every normalizer and option."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oasis_jax import Attention, AttentionConfig, UserError
from oasis_jax.model.normalizers import DENSE_NORMALIZERS, NULL_LOGITS

B, T, D, N, K, H = 2, 9, 20, 6, 3, 4


def layer(seed=0, **options):
    module = Attention(
        AttentionConfig(width=D, num_heads=N, num_kv_heads=K, head_dim=H, **options), rngs=nnx.Rngs(seed)
    )
    rng = np.random.default_rng(seed)
    for name in ("null_logit", "query_norm", "key_norm"):
        if name in module.names:
            parameter = getattr(module, name)
            parameter[...] = parameter[...] + jnp.asarray(rng.normal(size=parameter.shape), jnp.float32)
    return module, {name: np.array(value, np.float64) for name, value in module.parameters.items()}


def rotate(x, theta):
    """Complex-number form of the rotary embedding."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    z = z * np.exp(1j * angle)[None, :, None, :]
    return np.concatenate([z.real, z.imag], -1)


def oracle(p, x, config, segments=None):
    """Loops over batch, heads and queries; returns output, probabilities, null mass."""
    q, k, v = (np.einsum("btd,dnh->btnh", x, p[name]) for name in ("query", "key", "value"))
    if config.qk_norm:
        q, k = (
            y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-6) * p[f"{n}_norm"] for y, n in ((q, "query"), (k, "key"))
        )
    if config.rope_theta:
        q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
    heads, probabilities = np.zeros((B, T, N, H)), np.zeros((B, N, T, T))
    null_mass = np.zeros((B, N, T))
    for b, n, i in np.ndindex(B, N, T):
        allowed = np.array(
            [
                j <= i
                and (not config.window or i - j < config.window)
                and (segments is None or segments[b, i] == segments[b, j])
                for j in range(T)
            ]
        )
        s = np.array([q[b, i, n] @ k[b, j, n // (N // K)] for j in range(T)]) * H**-0.5
        if config.logit_softcap:
            s = config.logit_softcap * np.tanh(s / config.logit_softcap)
        if config.normalizer in NULL_LOGITS:
            logit = NULL_LOGITS[config.normalizer]
            null = np.exp(p["null_logit"][n] if logit is None else logit)
            e = np.where(allowed, np.exp(s), 0)
            row, omega = e / (null + e.sum()), null / (null + e.sum())
        else:
            row = np.array(DENSE_NORMALIZERS[config.normalizer](jnp.asarray(s), jnp.asarray(allowed), config))
            omega = max(0.0, 1 - row.sum())
        probabilities[b, n, i], null_mass[b, n, i] = row, omega
        heads[b, i, n] = row @ v[b, :, n // (N // K)]
    gate = {
        "none": lambda: 1.0,
        "elementwise": lambda: np.einsum("btd,dnh->btnh", x, p["gate"]),
        "per_head": lambda: (x @ p["gate"])[..., None],
    }
    gated = heads if config.gate == "none" else heads / (1 + np.exp(-gate[config.gate]()))
    return np.einsum("btnh,nhd->btd", gated, p["output"]), heads, probabilities, null_mass


@pytest.mark.parametrize("normalizer", [*NULL_LOGITS, *DENSE_NORMALIZERS])
@pytest.mark.parametrize(
    "options",
    [{}, dict(qk_norm=True, gate="elementwise"), dict(window=4, logit_softcap=2.5, gate="per_head", rope_theta=0.0)],
    ids=["plain", "qk_norm_gate", "window_softcap"],
)
def test_layer_against_numpy(normalizer, options):
    module, p = layer(normalizer=normalizer, **options)
    x = np.random.default_rng(3).normal(size=(B, T, D)) * 2
    output, statistics = module(jnp.asarray(x, jnp.float32))
    expected, heads, probabilities, null_mass = oracle(p, x, module.config)
    np.testing.assert_allclose(output, expected, atol=2e-5)
    np.testing.assert_allclose(statistics.head_output, heads, atol=2e-5)
    np.testing.assert_allclose(statistics.null_mass, null_mass, atol=5e-6)
    np.testing.assert_allclose(statistics.first_token_mass, probabilities[..., 0], atol=5e-6)
    if statistics.lse is not None and normalizer != "softmax":
        logit = p.get("null_logit", np.zeros(N))[None, :, None]
        np.testing.assert_allclose(statistics.lse, logit - np.log(null_mass), atol=2e-5)


def test_segments_confine_attention_and_its_statistics():
    module, p = layer(normalizer="softmax1")
    segments = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 5 + [3] * 4])
    x = np.random.default_rng(4).normal(size=(B, T, D))
    output, statistics = module(jnp.asarray(x, jnp.float32), segment_ids=jnp.asarray(segments))
    expected, _, probabilities, _ = oracle(p, x, module.config, segments)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    np.testing.assert_allclose(statistics.first_token_mass, probabilities[..., 0], atol=1e-5)


def test_given_positions_shift_the_rotation():
    module, _ = layer()
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    plain, _ = module(x)
    shifted, _ = module(x, positions=jnp.arange(T)[None] + 100)  # scores depend on differences alone
    stretched, _ = module(x, positions=3 * jnp.arange(T)[None])
    np.testing.assert_allclose(plain, shifted, atol=1e-4)
    assert float(jnp.abs(plain - stretched).max()) > 1e-2


def test_bfloat16_in_bfloat16_out_with_float32_masses():
    module, _ = layer(normalizer="softmax1")
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    wide, _ = module(x)
    output, statistics = module(x.astype(jnp.bfloat16))
    assert output.dtype == jnp.bfloat16 and statistics.null_mass.dtype == jnp.float32
    np.testing.assert_allclose(output.astype(jnp.float32), wide, atol=0.05)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(normalizer="softmax_1"), "did you mean 'softmax1'"),
        (dict(num_kv_heads=4), "4 does not divide num_heads=6"),
        (dict(head_dim=5), "even head size"),
        (dict(num_heads=6, head_dim=0), "does not divide width=20"),
        (dict(window=-1), "must be at least 0"),
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
