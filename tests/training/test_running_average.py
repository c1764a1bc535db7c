"""The running average of affine-scaled attention moves as one, whatever the optimizer does with the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.placement import make_mesh, place
from oasis_jax.training.state import new_state
from oasis_jax.training.step import loss_and_gradients, make_step

B, T, V, D, N = 4, 6, 11, 12, 3


def config(**options) -> Config:
    model = ModelConfig(preset="residual", gate="affine", num_layers=2, width=D, num_heads=N, vocab_size=V)
    optimizer = OptimizerConfig(learning_rate=0.3, warmup_steps=0, clip_norm=1e-3, weight_decay=0.1, **options)
    data = DataConfig(corpus="stdlib", sequence_length=T, batch_size=B)
    return Config(model=model, data=data, optimizer=optimizer, run=RunConfig(steps=9))


def batches():
    random = np.random.default_rng(0)
    while True:
        ids = random.integers(0, V, (B, T + 1)).astype(np.int32)
        yield {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones((B, T), np.float32)}


def scale_of_first_layer(params, ids) -> np.ndarray:
    """E[alpha] by hand: RMSNorm of the embedding, the projection, the clipped line."""
    get = lambda x: np.asarray(x, np.float64)
    x = get(params["embedding"]["table"])[ids]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * get(params["layers"]["attention_norm"]["scale"][0])
    return np.clip(0.1 * x @ get(params["layers"]["attention"]["gate"][0]) + 0.5, 0, 1).mean((0, 1))


@pytest.mark.parametrize("options", [{}, dict(accumulation_steps=2), dict(optimizer="muon")], ids=str)
def test_it_is_the_running_average_of_the_scale(options):
    """alpha_0 = 0; alpha_t = .9 alpha_(t-1) + .1 E[alpha_t] (arXiv 2602.23057, eq. 9)."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    step, state, expected = make_step(config(**options), mesh), new_state(config(**options), mesh), np.zeros(N)
    for batch, _ in zip(batches(), range(4)):
        expected = 0.9 * expected + 0.1 * scale_of_first_layer(state.params, batch["inputs"])
        state, _ = step(state, batch)
        np.testing.assert_allclose(state.params["layers"]["attention"]["gate_average"][0], expected, rtol=1e-5)
    assert (expected > 0.1).all()


def test_the_norm_of_the_gradient_is_of_what_is_trained():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state, batch = new_state(config(), mesh), next(batches())
    placement = place(config(), mesh)
    _, gradients = jax.jit(lambda params: loss_and_gradients(params, batch, config(), placement))(state.params)
    assert np.abs(gradients["layers"]["attention"].pop("gate_average")).min() > 0.1
    norm = float(optax.tree.norm(gradients))
    _, metrics = make_step(config(), mesh)(state, {name: jnp.asarray(x) for name, x in batch.items()})
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
