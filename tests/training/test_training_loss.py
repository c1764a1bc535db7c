"""The losses against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from oasis_jax.config import ModelConfig
from oasis_jax.model.context import Context
from oasis_jax.model.head import (
    embedding_parameters,
    head_parameters,
    map_logits,
    num_pieces,
    token_losses,
    unembed,
)
from oasis_jax.training.loss import mean_loss, total_weight

TOKENS = ModelConfig(width=3, num_heads=1, head_dim=2, vocab_size=11)


@pytest.fixture
def tokens() -> tuple[np.ndarray, dict]:
    random = np.random.default_rng(0)
    logits = 30 * random.standard_normal((3, 7, 16)).astype(np.float32)
    batch = {
        "targets": random.integers(0, 11, (3, 7)).astype(np.int32),
        "weights": random.random((3, 7)).astype(np.float32),
    }
    return logits, batch


@pytest.fixture
def final(tokens) -> tuple[dict, np.ndarray]:
    """Parameters and what the head reads, with `tokens` as logits: the head's kernel is 16 unit vectors."""
    return {"head": {"kernel": jnp.eye(16)}}, jnp.asarray(tokens[0])


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target], from the definition."""
    logits = logits.astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0])


def test_cross_entropy(tokens):
    logits, batch = tokens
    losses = token_losses(jnp.array(logits), jnp.asarray(batch["targets"]))
    assert losses.dtype == jnp.float32
    assert_allclose(losses, cross_entropy(logits, batch["targets"]), rtol=1e-6, atol=1e-5)


def test_cross_entropy_is_float32_of_rounded_logits(tokens):
    logits, batch = tokens
    rounded = jnp.array(logits, jnp.bfloat16)
    losses = token_losses(rounded, batch["targets"])
    assert losses.dtype == jnp.float32
    assert_allclose(losses, cross_entropy(np.asarray(rounded, np.float32), batch["targets"]), rtol=1e-6, atol=1e-5)


def test_squared_error():
    random = np.random.default_rng(1)
    outputs, targets = random.standard_normal((2, 3, 7, 5)).astype(np.float32)
    losses = token_losses(jnp.array(outputs), targets)
    assert_allclose(losses, ((outputs.astype(np.float64) - targets) ** 2).mean(-1), rtol=1e-6)


def loss_of(final, batch, total=None):
    params, x = final
    return mean_loss(params, TOKENS, x, jax.tree.map(jnp.asarray, batch), Context(), total)


def test_weights(tokens, final):
    logits, batch = tokens
    weights = batch["weights"].astype(np.float64)
    vocabulary = logits[..., : TOKENS.vocab_size]  # the rest is padding
    expected = (cross_entropy(vocabulary, batch["targets"]) * weights).sum() / weights.sum()
    assert_allclose(loss_of(final, batch), expected, rtol=1e-6)
    batch["weights"][:, 4:] = 0
    changed = batch | {"targets": np.where(batch["weights"] > 0, batch["targets"], 0)}
    assert loss_of(final, batch) == loss_of(final, changed)


def test_nothing_to_predict_costs_nothing(tokens, final):
    assert loss_of(final, tokens[1] | {"weights": np.zeros((3, 7), np.float32)}) == 0


def test_parts_of_a_batch_add_up(tokens, final):
    _, batch = tokens
    total = total_weight({"weights": jnp.array(batch["weights"])})
    params, x = final
    rows = [loss_of((params, x[i : i + 1]), {name: y[i : i + 1] for name, y in batch.items()}, total) for i in range(3)]
    assert_allclose(sum(rows), loss_of(final, batch), rtol=1e-6)


# Logits in pieces


def arrays_of(config: ModelConfig) -> tuple[dict, jax.Array, dict]:
    """Parameters of embedding and head, what the head reads, and a batch; all random, in float64."""
    random = np.random.default_rng(2)
    specs = {"embedding": embedding_parameters(config), "head": head_parameters(config)}
    params = {
        group: {name: jnp.asarray(random.normal(size=spec.shape)) for name, spec in found.items()}
        for group, found in specs.items()
        if found
    }
    final = jnp.asarray(random.normal(size=(2, 20, config.width)))
    targets = random.integers(0, config.vocab_size, (2, 20))
    weights = random.integers(0, 64, (2, 20)) / 64  # their sum, which is a float32, is exact
    return params, final, {"targets": jnp.asarray(targets), "weights": jnp.asarray(weights)}


def many_pieces(tied: bool = True) -> ModelConfig:
    config = ModelConfig(
        width=3, num_heads=1, head_dim=2, vocab_size=53, tied_head=tied, logits_multiplier=1.0 if tied else 0.3
    )
    object.__setattr__(config, "dtype", "float64")
    assert num_pieces(config, 20) == 10
    return config


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_loss_in_pieces_and_its_gradients_are_those_of_all_logits(tied):
    """In float64, with more pieces than one and without the logits of all positions in the compiled program."""
    config = many_pieces(tied)
    with jax.enable_x64(True):
        params, final, batch = arrays_of(config)

        def plain(params, final):
            losses = token_losses(unembed(params, config, final, Context()), batch["targets"])
            return (losses * batch["weights"]).sum() / batch["weights"].sum()

        def pieces(params, final):
            return mean_loss(params, config, final, batch, Context())

        value, gradients = jax.jit(jax.value_and_grad(pieces, (0, 1)))(params, final)
        wanted, wanted_gradients = jax.jit(jax.value_and_grad(plain, (0, 1)))(params, final)
        assert_allclose(value, wanted, rtol=1e-12)
        jax.tree.map(lambda g, w: assert_allclose(g, w, rtol=1e-12, atol=1e-14), gradients, wanted_gradients)
        text = jax.jit(jax.value_and_grad(pieces, (0, 1))).lower(params, final).as_text()
        assert "2x20x56x" not in text and "2x2x56x" in text


def test_any_function_of_logits_is_that_of_all_of_them():
    """Whatever tree of arrays it returns, each position's in its place."""
    config = many_pieces()
    with jax.enable_x64(True):
        params, final, _ = arrays_of(config)
        place = {"place": jnp.arange(40).reshape(2, 20)}

        def function(logits, arrays):
            top = jax.lax.top_k(logits, 3)
            return {"top": top, "place": arrays["place"], "one": logits[..., 7] + arrays["place"]}

        found = jax.jit(lambda: map_logits(params, config, final, place, function, Context()))()
        expected = function(unembed(params, config, final, Context()), place)
        jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-12), found, expected)
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parametrize(
    "vocab, length, pieces", [(258, 512, 2), (100_000, 512, 512), (8, 7, 1), (1000, 30, 5), (1000, 7, 7)]
)
def test_the_number_of_pieces_divides_the_length(vocab, length, pieces):
    assert num_pieces(ModelConfig(width=128, num_heads=4, vocab_size=vocab), length) == pieces


def test_vectors_are_one_piece():
    assert num_pieces(ModelConfig(width=128, inputs="vectors", vector_dim=5000), 30) == 1
