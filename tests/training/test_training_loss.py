"""The losses against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from oasis_jax.config import ModelConfig
from oasis_jax.model.attention import unconstrained
from oasis_jax.model.decoder import ends_parameters, unembed
from oasis_jax.training.loss import chunked_mean_loss, loss_chunks, mean_loss, token_losses, total_weight

TOKENS = ModelConfig(vocab_size=11)
VECTORS = ModelConfig(inputs="vectors", vector_dim=5)


@pytest.fixture
def tokens() -> tuple[np.ndarray, dict]:
    random = np.random.default_rng(0)
    logits = 30 * random.standard_normal((3, 7, 16)).astype(np.float32)
    batch = {
        "targets": random.integers(0, 11, (3, 7)).astype(np.int32),
        "weights": random.random((3, 7)).astype(np.float32),
    }
    return logits, batch


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target], from the definition."""
    logits = logits.astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0])


def test_cross_entropy(tokens):
    logits, batch = tokens
    losses = token_losses(jnp.array(logits), batch, TOKENS)
    assert losses.dtype == jnp.float32
    assert_allclose(losses, cross_entropy(logits, batch["targets"]), rtol=1e-6, atol=1e-5)


def test_cross_entropy_is_float32_of_rounded_logits(tokens):
    logits, batch = tokens
    rounded = jnp.array(logits, jnp.bfloat16)
    losses = token_losses(rounded, batch, TOKENS)
    assert losses.dtype == jnp.float32
    assert_allclose(losses, cross_entropy(np.asarray(rounded, np.float32), batch["targets"]), rtol=1e-6, atol=1e-5)


def test_squared_error():
    random = np.random.default_rng(1)
    outputs, targets = random.standard_normal((2, 3, 7, 5)).astype(np.float32)
    losses = token_losses(jnp.array(outputs), {"targets": targets}, VECTORS)
    assert_allclose(losses, ((outputs.astype(np.float64) - targets) ** 2).mean(-1), rtol=1e-6)


def test_weights(tokens):
    logits, batch = tokens
    weights = batch["weights"].astype(np.float64)
    expected = (cross_entropy(logits, batch["targets"]) * weights).sum() / weights.sum()
    assert_allclose(mean_loss(jnp.array(logits), batch, TOKENS), expected, rtol=1e-6)
    batch["weights"][:, 4:] = 0
    changed = batch | {"targets": np.where(batch["weights"] > 0, batch["targets"], 0)}
    assert mean_loss(jnp.array(logits), batch, TOKENS) == mean_loss(jnp.array(logits), changed, TOKENS)


def test_nothing_to_predict_costs_nothing(tokens):
    logits, batch = tokens
    assert mean_loss(jnp.array(logits), batch | {"weights": np.zeros((3, 7), np.float32)}, TOKENS) == 0


def test_parts_of_a_batch_add_up(tokens):
    logits, batch = tokens
    total = total_weight({"weights": jnp.array(batch["weights"])})
    rows = [
        mean_loss(jnp.array(logits[i : i + 1]), {name: x[i : i + 1] for name, x in batch.items()}, TOKENS, total)
        for i in range(3)
    ]
    assert_allclose(sum(rows), mean_loss(jnp.array(logits), batch, TOKENS), rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_chunked_loss_and_its_gradients_are_those_of_the_plain_one(tied):
    """In float64, with more chunks than one and without the logits of all positions in the compiled program."""
    config = ModelConfig(width=3, num_heads=1, head_dim=2, vocab_size=53, tied_head=tied)
    object.__setattr__(config, "dtype", "float64")
    random = np.random.default_rng(2)
    assert loss_chunks(config, 20) == 10
    with jax.enable_x64(True):
        ends = {name: jnp.asarray(random.normal(size=spec.shape)) for name, spec in ends_parameters(config).items()}
        final = jnp.asarray(random.normal(size=(2, 20, 3)))
        batch = {
            "targets": jnp.asarray(random.integers(0, 53, (2, 20))),
            "weights": jnp.asarray(random.random((2, 20))),
        }

        def plain(ends, final):
            return mean_loss(unembed(ends, config, final, unconstrained), batch, config)

        chunked = jax.jit(jax.value_and_grad(lambda *x: chunked_mean_loss(*x, batch, config, unconstrained), (0, 1)))
        value, gradients = chunked(ends, final)
        wanted, wanted_gradients = jax.jit(jax.value_and_grad(plain, (0, 1)))(ends, final)
        assert_allclose(value, wanted, rtol=1e-12)
        jax.tree.map(lambda g, w: assert_allclose(g, w, rtol=1e-12, atol=1e-14), gradients, wanted_gradients)
        assert "2x20x56x" not in chunked.lower(ends, final).as_text()
