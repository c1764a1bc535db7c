"""Schedules and updates against numbers computed by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from oasis_jax.config import PRESETS, Config, ModelConfig, OptimizerConfig
from oasis_jax.model.decoder import parameter_shapes
from oasis_jax.placement import make_mesh
from oasis_jax.training.optimizer import decayed, learning_rate, make_optimizer
from oasis_jax.training.state import abstract_state


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


def first_step(model: ModelConfig, **fields):
    """Parameters and gradients in float64, and the first update of an optimizer with learning rate 1 and no decay."""
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule="constant", weight_decay=0.0, **fields)
    random = np.random.default_rng(1)
    gradients = jax.tree.map(lambda x: random.normal(size=x.shape), parameter_shapes(model))
    optimizer = make_optimizer(config, 5, model)
    params, d_params = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for tree in (gradients, gradients))
    return gradients, jax.jit(optimizer.update)(d_params, optimizer.init(params), params)[0]


def orthogonalized(matrix):
    """Five quintic Newton-Schulz steps (Jordan 2024) times 0.2 sqrt(larger side) (arXiv 2502.16982, eq. 4)."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return 0.2 * np.sqrt(max(matrix.shape)) * x


def test_muon_updates_matrices_by_their_role_layer_by_layer_with_heads_joined():
    model = ModelConfig(
        preset="oasis", num_layers=2, width=10, num_heads=3, num_kv_heads=1, head_dim=4, mlp_dim=14, vocab_size=8,
        normalizer="token_null", tied_head=False,
    )  # fmt: skip
    gradients, updates = first_step(model, optimizer="muon", clip_norm=0.0, epsilon=1e-3)
    inputs = {"output": 2}  # leading dimensions that a projection sums over, where it is not one

    def by_hand(path, g):
        group, name = path[0].key, path[-1].key
        if (group == "layers" and name in {"query", "key", "value", "output", "gate", "up", "down"}) or (
            group == "routers" and name in {"query", "key"}
        ):
            rows = np.prod(g.shape[1 : 1 + inputs.get(name, 1)])
            return -np.stack([orthogonalized(x.reshape(rows, -1)).reshape(x.shape) for x in g])
        return -g / (np.abs(g) + 1e-3)

    expected = jax.tree_util.tree_map_with_path(by_hand, gradients)
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-4, atol=2e-5), updates, expected)


def test_sgd_by_hand():
    config = OptimizerConfig(
        optimizer="sgd", learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.01, beta1=0.7,
        clip_norm=0.0,
    )  # fmt: skip
    optimizer, random = make_optimizer(config, 5, MODEL), np.random.default_rng(2)
    expected, g = (jax.tree.map(lambda x: random.normal(size=x.shape), parameter_shapes(MODEL)) for _ in range(2))
    params, d_params = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for tree in (expected, g))
    state = optimizer.init(params)
    for momentum in (1.0, 1.7):
        updates, state = optimizer.update(d_params, state, params)
        params = optax.apply_updates(params, updates)

        def by_hand(path, p, g, momentum=momentum):
            return p - 0.1 * (momentum * g + 0.01 * p * (path[-1].key in DECAYED))

        expected = jax.tree_util.tree_map_with_path(by_hand, expected, g)
        jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-5, atol=1e-6), params, expected)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_moments_lie_where_their_parameters_do(name):
    config = Config(model=MODEL, optimizer=OptimizerConfig(optimizer=name))
    state = abstract_state(config, make_mesh(config.mesh))
    names = lambda path: tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    wanted = {names(path): x for path, x in jax.tree_util.tree_leaves_with_path(state.params)}
    matrices = sum(path[-1] in DECAYED - {"table"} for path in wanted)
    twice = {"adamw": len(wanted), "muon": len(wanted) - matrices, "sgd": 0}[name]
    moments = 0
    for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state):
        for own in {names(path)[-size:] for size in (2, 3)}:
            if own in wanted:
                assert (x.shape, x.sharding) == (wanted[own].shape, wanted[own].sharding)
                moments += 1
    assert moments == len(wanted) + twice


def test_the_state_of_adamw_is_that_of_earlier_checkpoints():
    params = parameter_shapes(MODEL)
    found = jax.eval_shape(make_optimizer(OptimizerConfig(), 5, MODEL).init, params)
    adamw = optax.adamw(learning_rate(OptimizerConfig(), 5), mask=decayed(MODEL))
    known = jax.eval_shape(optax.chain(optax.clip_by_global_norm(1.0), adamw).init, params)
    assert jax.tree.structure(found) == jax.tree.structure(known)


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
    static = {("routers", "query")} if model.router in ("static", "qkv") else set()
    assert {path for path in paths[False] if path[1] not in small} == static
    projections = {("layers", name) for name in DECAYED - {"table"}} | {("embedding", "table")}
    projections |= {("routers", "query"), ("routers", "key")} if model.router == "projected" else set()
    if norm == "gatednorm":
        projections |= {(group, f"gate_{name}") for group in ("layers", "final_norm") for name in ("down", "up")}
    assert paths[True] == projections
