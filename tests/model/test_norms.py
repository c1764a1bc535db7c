"""Norms against numpy, and what the literature says of their starting point."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oasis_jax.config import NormConfig, field_type
from oasis_jax.model.norms import NORMS, Norm

WIDTH = 7


def randomized(module: Norm) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    for name in module.names:
        parameter = getattr(module, name)
        parameter[...] = jnp.asarray(rng.normal(size=parameter.shape), jnp.float32)
    return {name: np.array(value, np.float64) for name, value in module.parameters.items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("epsilon", [1e-6, 0.3])
def test_values(name, epsilon):
    module = Norm(NormConfig(norm=name, norm_epsilon=epsilon), WIDTH, rngs=nnx.Rngs(0))
    p = randomized(module)
    x = np.random.default_rng(1).normal(size=(2, 5, WIDTH)) * 3

    def rms(v):
        return v / np.sqrt((v * v).mean(-1, keepdims=True) + epsilon)

    expected = {
        "rmsnorm": lambda: rms(x) * p["scale"],
        "layernorm": lambda: (
            (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]
        ),
        "preaffine": lambda: rms(x * p["pre_scale"]) * p["scale"],
        "gatednorm": lambda: (
            (y := rms(x) * p["scale"]) * sigmoid((h := y @ p["gate_down"]) * sigmoid(h) @ p["gate_up"])
        ),
        "dyt": lambda: p["scale"] * np.tanh(p["alpha"] * x) + p["shift"],
        "none": lambda: x,
    }[name]()
    np.testing.assert_allclose(module(jnp.asarray(x, jnp.float32)), expected, rtol=2e-5, atol=2e-6)


def test_preaffine_starts_as_rmsnorm():
    x = jax.random.normal(jax.random.key(0), (3, WIDTH))
    plain, preaffine = (Norm(NormConfig(norm=name), WIDTH, rngs=nnx.Rngs(0)) for name in ("rmsnorm", "preaffine"))
    np.testing.assert_array_equal(plain(x), preaffine(x))


def test_layernorm_does_not_see_what_all_channels_share():
    """Also where the mean is large: the variance is that of what is left, not a difference of two squares."""
    module = Norm(NormConfig(norm="layernorm"), WIDTH, rngs=nnx.Rngs(0))
    x = jnp.arange(3.0 * WIDTH).reshape(3, WIDTH)
    np.testing.assert_allclose(module(x + 4096.0), module(x), atol=1e-3)


def test_statistics_are_float32_for_bfloat16_inputs():
    x = jnp.full((1, 4096), 1.0, jnp.bfloat16).at[0, 0].set(100.0)  # bf16 could not add 1 to 4096 this often
    module = Norm(NormConfig(), 4096, rngs=nnx.Rngs(0))
    y = module(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(y[0, 0]), 100 / np.sqrt((4095 + 1e4) / 4096), rtol=4e-3)


def test_the_config_names_are_the_table():
    assert set(typing.get_args(field_type(NormConfig, "norm"))) == set(NORMS)
