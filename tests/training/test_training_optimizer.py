"""Schedules and updates against numbers computed by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from oasis_jax.config import PRESETS, ModelConfig, OptimizerConfig
from oasis_jax.model.decoder import parameter_shapes
from oasis_jax.training.optimizer import decayed, learning_rate, make_optimizer


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


MODEL = ModelConfig(preset="residual", num_layers=1, width=8, num_heads=2, mlp_dim=8, vocab_size=8)
DECAYED = {"table", "query", "key", "value", "output", "gate", "up", "down"}


@pytest.mark.parametrize("clip_norm, factor", [(0.5, 0.5 / 1.3), (2.0, 1.0), (0.0, 1.0)])
def test_updates_by_hand(clip_norm, factor):
    """Two AdamW updates (arXiv 1711.05101, algorithm 2) of a whole model's parameters, whose gradients have
    norm 1.3.
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
    optimizer = make_optimizer(config, 5, MODEL)
    random = np.random.default_rng(0)
    draw = lambda x: random.normal(size=x.shape)
    expected, gradients = (jax.tree.map(draw, parameter_shapes(MODEL)) for _ in range(2))
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
    gradients = jax.tree.map(lambda g: 1.3 / norm * g, gradients)
    params, d_params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (expected, gradients))
    state, m, v = optimizer.init(params), 0.0, 0.0

    def by_hand(rate, m, v, path, p, g):
        return p - rate * (m * g / (np.sqrt(v * g**2) + 1e-3) + 0.01 * p * (path[-1].key in DECAYED))

    g = jax.tree.map(lambda g: factor * g, gradients)
    for k, rate in [(1, 0.05), (2, 0.1)]:
        updates, state = optimizer.update(d_params, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.7 * m + 0.3, 0.8 * v + 0.2  # the gradient is the same twice, so the moments are multiples of g and g^2
        update = partial(by_hand, rate, m / (1 - 0.7**k), v / (1 - 0.8**k))
        expected = jax.tree_util.tree_map_with_path(update, expected, g)
        jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=2e-5, atol=1e-6), params, expected)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "preaffine", "gatednorm", "dyt"])
@pytest.mark.parametrize("preset", PRESETS)
def test_weight_decay_takes_projections_only(preset, norm):
    model = ModelConfig(
        preset=preset, norm=norm, qk_norm=True, qkv_bias=True, output_bias=True, mlp_bias=True, vocab_size=11,
        width=32, num_layers=4,
    )  # fmt: skip
    paths = {True: set(), False: set()}
    for path, take in jax.tree_util.tree_leaves_with_path(decayed(model)):
        paths[take].add((path[0].key, path[-1].key))
    assert jax.tree.structure(decayed(model)) == jax.tree.structure(parameter_shapes(model))
    small = {"scale", "bias", "pre_scale", "alpha", "shift", "query_norm", "key_norm", "recency_bias", "beta_raw"}
    small |= {f"{name}_bias" for name in ("query", "key", "value", "output", "gate", "up", "down")}
    small |= {"null_logit", "null_key", "null_value", "null_projection"}
    static = {("routers", "query")} if model.router == "static" else set()
    assert {path for path in paths[False] if path[1] not in small} == static
    projections = {("layers", name) for name in DECAYED - {"table"}} | {("embedding", "table")}
    projections |= {("routers", "query"), ("routers", "key")} if model.router == "projected" else set()
    if norm == "gatednorm":
        projections |= {(group, f"gate_{name}") for group in ("layers", "final_norm") for name in ("down", "up")}
    assert paths[True] == projections
