"""Schedules and updates against numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from oasis_jax.config import PRESETS, ModelConfig, OptimizerConfig
from oasis_jax.training.optimizer import decayed, learning_rate, make_optimizer
from oasis_jax.training.sharding import parameter_shapes


@pytest.mark.parametrize(
    "schedule, after_warmup",
    [
        ("constant", [0.8, 0.8, 0.8, 0.8]),
        ("linear", [0.65, 0.5, 0.35, 0.2]),
        # 0.2 + 0.6 * (1 + cos(pi * k / 4)) / 2
        ("cosine", [0.2 + 0.3 * (1 + 2**-0.5), 0.5, 0.2 + 0.3 * (1 - 2**-0.5), 0.2]),
    ],
)
def test_schedule(schedule, after_warmup):
    config = OptimizerConfig(learning_rate=0.8, warmup_steps=4, schedule=schedule, final_fraction=0.25)
    rate = learning_rate(config, steps=8)
    assert_allclose([rate(count) for count in range(8)], [0.2, 0.4, 0.6, 0.8, *after_warmup], rtol=1e-6)


def test_schedule_without_warmup():
    config = OptimizerConfig(learning_rate=0.8, warmup_steps=0, schedule="linear", final_fraction=0.5)
    assert_allclose([learning_rate(config, steps=4)(count) for count in range(4)], [0.7, 0.6, 0.5, 0.4], rtol=1e-6)


def test_a_run_may_end_within_its_warmup():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    assert_allclose([learning_rate(config, steps=3)(count) for count in range(3)], [0.1, 0.2, 0.3], rtol=1e-6)


@pytest.mark.parametrize("clip_norm, factor", [(0.5, 0.5 / 1.3), (2.0, 1.0), (0.0, 1.0)])
def test_one_update_by_hand(clip_norm, factor):
    """Two AdamW updates (arXiv 1711.05101, algorithm 2) of a matrix and a vector whose gradients have norm 1.3
    together.
    """
    config = OptimizerConfig(
        learning_rate=0.1,
        warmup_steps=2,
        schedule="constant",
        weight_decay=0.01,
        beta1=0.7,
        beta2=0.8,
        epsilon=1e-3,
        clip_norm=clip_norm,
    )
    optimizer = make_optimizer(config, steps=5)
    params = {"matrix": jnp.array([[1.0, -2.0]]), "vector": jnp.array([3.0])}
    gradients = {"matrix": jnp.array([[0.3, -0.4]]), "vector": jnp.array([1.2])}
    expected = {name: np.asarray(value, np.float64) for name, value in params.items()}
    state, m, v = optimizer.init(params), 0.0, 0.0
    g = {name: factor * np.asarray(value, np.float64) for name, value in gradients.items()}
    for k, rate in [(1, 0.05), (2, 0.1)]:
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.7 * m + 0.3, 0.8 * v + 0.2  # the gradient is the same twice, so the moments are multiples of g and g^2
        for name, decay in [("matrix", 0.01), ("vector", 0.0)]:
            direction = m / (1 - 0.7**k) * g[name] / (np.sqrt(v / (1 - 0.8**k) * g[name] ** 2) + 1e-3)
            expected[name] -= rate * (direction + decay * expected[name])
            assert_allclose(params[name], expected[name], rtol=1e-6)


@pytest.mark.parametrize("norm", ["rmsnorm", "preaffine", "gatednorm", "dyt"])
@pytest.mark.parametrize("preset", PRESETS)
def test_weight_decay_takes_projections_only(preset, norm):
    shapes = parameter_shapes(
        ModelConfig(preset=preset, norm=norm, qk_norm=True, vocab_size=11, width=32, num_layers=4)
    )
    kept = {path[-1].key for path, take in jax.tree_util.tree_leaves_with_path(decayed(shapes)) if not take}
    router = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(shapes.get("routers", {}))}
    norms = {"scale", "pre_scale", "alpha", "shift", "query_norm", "key_norm"}
    assert kept <= norms | {"null_logit", "recency_bias", "beta_raw"} | ({"query"} if "key_norm" in router else set())
    taken = {path[-1].key for path, take in jax.tree_util.tree_leaves_with_path(decayed(shapes)) if take}
    assert {"embedding", "query", "key", "value", "output", "up", "down"} <= taken
