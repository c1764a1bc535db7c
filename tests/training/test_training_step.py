"""The compiled step: accumulation, types, remat, clipping, what it reports."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from oasis_jax.config import Config, DataConfig, LayerPattern, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.model.context import Context
from oasis_jax.model.decoder import initial_params, parameter_shapes
from oasis_jax.model.statistics import layer_telemetry, telemetry
from oasis_jax.placement import make_mesh, place
from oasis_jax.training.plan import abstract_batch
from oasis_jax.training.state import TrainState, abstract_state, build_model, new_state, shardings_of
from oasis_jax.training.step import make_step, make_telemetry

BATCH, LENGTH, VOCAB = 12, 13, 29
MESH = make_mesh(Config().mesh, jax.devices()[:1])


def make_config(optimizer: dict | None = None, **model) -> Config:
    model = dict(preset="residual", num_layers=1, width=20, num_heads=2, mlp_dim=24, vocab_size=VOCAB) | model
    return Config(
        model=ModelConfig(**model),
        data=DataConfig(batch_size=BATCH, sequence_length=LENGTH),
        optimizer=OptimizerConfig(**dict(warmup_steps=2) | (optimizer or {})),
        run=RunConfig(steps=6, seed=3),
    )


@pytest.fixture
def batch() -> dict[str, np.ndarray]:
    """Rows with very different total weights, so that a mean of means would show."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    weights = (random.random((BATCH, LENGTH)) * np.linspace(0, 1, BATCH)[:, None] ** 3).astype(np.float32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def initial(config: Config) -> TrainState:
    """The first state, on the host; made once for configs that start alike."""
    model = dataclasses.replace(config.model, dtype="float32", remat="none", stack="auto")
    return _initial(dataclasses.replace(config, model=model, optimizer=OptimizerConfig()))


@functools.cache
def _initial(config: Config) -> TrainState:
    return jax.device_get(new_state(config, MESH))


@functools.cache
def compiled(config: Config):
    return make_step(config, MESH)


def train(config, batch, steps=6):
    """(last state, metrics of every step) of training on one batch."""
    own = initial(config)._replace(
        rng=jax.random.key(0)
    )  # the one part that is on the device already, and would be given up
    state = jax.device_put(own, shardings_of(abstract_state(config, MESH)))
    batch = place(config, MESH).put(batch)
    found = []
    for _ in range(steps):
        state, metrics = compiled(config)(state, batch)
        found.append(jax.device_get(metrics))
    return state, found


def column(metrics, name):
    return np.array([line[name] for line in metrics])


def cross_entropy(logits, batch):
    """The weighted mean over the batch, from the definition."""
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
    return (losses * batch["weights"]).sum() / batch["weights"].sum()


def moments(state):
    """The first moments of AdamW."""
    return next(
        part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")
    ).mu


def test_one_step_is_that_of_the_plain_definition(batch):
    """Loss and gradient by autodiff outside the step; the gradient's norm is reported as it is, its clipped form is
    used.
    """
    config = make_config(dict(clip_norm=0.01, beta1=0.75))
    arrays = {name: jnp.array(x) for name, x in batch.items()}

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return cross_entropy(build_model(config.model, params)(arrays["inputs"])[0], arrays)

    state, (metrics,) = train(config, batch, steps=1)
    value, gradients = jax.device_get(loss(initial(config).params))
    assert_allclose(metrics["loss"], value, rtol=1e-6)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(gradients)))
    assert norm > 0.1
    assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    for moment, gradient in zip(jax.tree.leaves(moments(state)), jax.tree.leaves(gradients)):
        assert_allclose(moment, 0.25 * 0.01 / norm * gradient, rtol=1e-4, atol=1e-8)
    assert_allclose(metrics["learning_rate"], config.optimizer.learning_rate / 2, rtol=1e-6)


def test_accumulation_one_by_one_equals_the_large_batch_in_loops(batch):
    model = dict(preset="oasis_blocks", blocks=2, num_layers=2)
    whole_state, whole = train(make_config(stack="scan", **model), batch)
    parts_state, parts = train(make_config(dict(accumulation_steps=4), stack="unroll", **model), batch)
    for name in whole[0]:
        assert_allclose(column(parts, name), column(whole, name), rtol=1e-5, err_msg=name)
    for part, all_at_once in zip(jax.tree.leaves(moments(parts_state)), jax.tree.leaves(moments(whole_state))):
        assert_allclose(part, all_at_once, rtol=1e-3, atol=1e-6)


def test_bfloat16_compute_keeps_float32_state(batch):
    state, half = train(make_config(dtype="bfloat16"), batch)
    _, full = train(make_config(), batch)
    kinds = {x.dtype for x in jax.tree.leaves((state.params, moments(state)))}
    assert kinds == {jnp.dtype("float32")}
    assert {x.dtype for line in half for x in line.values()} == {np.dtype("float32")}
    assert_allclose(column(half, "loss"), column(full, "loss"), rtol=2e-2)
    assert (column(half, "loss") != column(full, "loss")).any()


@pytest.mark.slow
def test_remat_gives_equal_losses(batch):
    _, stored = train(make_config(preset="oasis"), batch)
    _, recomputed = train(make_config(preset="oasis", remat="layer"), batch)
    assert_allclose(column(recomputed, "loss"), column(stored, "loss"), rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(preset="residual"),
        dict(preset="attnres"),
        dict(preset="oasis_blocks", blocks=2),
        dict(preset="oasis", layer_pattern=(LayerPattern(window=3), LayerPattern(rope_theta=0.0))),
    ],
)
def test_the_program_of_loops_does_not_grow_with_depth(options):
    """Neither that of a step nor that of the first state: what there is to compile has as many lines at 12
    layers as at 4.
    """
    lines = []
    for layers in (4, 12):
        config = make_config(num_layers=layers, stack="scan", **options)
        step = make_step(config, MESH).lower(abstract_state(config, MESH), abstract_batch(config, MESH))
        params = jax.jit(lambda config=config: initial_params(config.model, jax.random.key(0))).lower()
        lines.append([len(lowered.as_text().splitlines()) for lowered in (step, params)])
    assert lines[0] == lines[1]


def test_what_has_no_weight_has_no_effect(batch):
    batch["weights"][:, 7:] = 0
    other = batch | {"targets": np.where(batch["weights"] > 0, batch["targets"], 0)}
    for line, expected in zip(train(make_config(), other)[1], train(make_config(), batch)[1]):
        assert line == expected


@pytest.mark.parametrize("stack", [pytest.param("unroll", marks=pytest.mark.slow), "scan"])
def test_documents_are_passed_on(batch, stack):
    segment_ids = np.tile(np.arange(LENGTH) // 5, (BATCH, 1)).astype(np.int32)
    positions = np.tile(np.arange(LENGTH) % 5 * 3, (BATCH, 1)).astype(np.int32)
    documents = {"segment_ids": segment_ids, "positions": positions}
    losses = []
    for given in ({"segment_ids": segment_ids}, documents):
        config = make_config(stack=stack, preset="oasis", learned_positions=LENGTH)
        _, (metrics,) = train(config, batch | given, steps=1)

        @jax.jit
        def loss(params, config=config, given=given):
            return cross_entropy(build_model(config.model, params)(batch["inputs"], Context(**given))[0], batch)

        losses.append(loss(initial(config).params))
        assert_allclose(metrics["loss"], losses[-1], rtol=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-5


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("stack", ["unroll", "scan"])
def test_telemetry_is_that_of_the_model(batch, accumulation, stack):
    config = make_config(dict(accumulation_steps=accumulation), preset="oasis", num_layers=2, stack=stack)
    state = new_state(config, MESH)
    params = state.params
    seen = make_telemetry(config, MESH)(state, place(config, MESH).put(batch))

    @jax.jit
    def of_model(params):
        statistics = build_model(config.model, params)(batch["inputs"])[1]
        layers = jax.tree.map(lambda *x: jnp.stack(x), *map(layer_telemetry, statistics.attention))
        return telemetry(layers, {name: router.beta for name, router in statistics.routers.items()})

    expected = of_model(params)
    assert {"null_mass", "first_token_mass", "beta", "null_mass/layer0", "beta/layer0.mlp"} <= set(expected)
    assert set(seen) == set(expected)
    for name, value in expected.items():
        assert_allclose(seen[name], value, rtol=1e-5, err_msg=name)


def test_the_seed_decides_the_parameters():
    config = make_config()
    reseeded = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=4))
    first, second, other = (initial(config), jax.device_get(new_state(config, MESH)), initial(reseeded))
    assert jax.tree.all(jax.tree.map(np.array_equal, first.params, second.params))
    assert not np.array_equal(first.params["embedding"]["table"], other.params["embedding"]["table"])
    assert not np.array_equal(jax.random.key_data(first.rng), jax.random.key_data(other.rng))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), first.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), parameter_shapes(config.model)
    )
