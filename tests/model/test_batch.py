"""Targets that count nothing, and ids that a model does not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation.toys import build, placed, token_batches

from oasis_jax.config import Config, DataConfig, ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.evaluation import choose, evaluate
from oasis_jax.model.batch import IGNORED, check_ids
from oasis_jax.model.layout import stack_layers
from oasis_jax.placement import UNSHARDED
from oasis_jax.training.step import loss_and_gradients

MODEL = ModelConfig(vocab_size=29)


@pytest.fixture(scope="module")
def toy():
    """A model, and a batch that masks in both ways: by targets, whose weight is not 0, and by weights alone."""
    model, batch = build(preset="residual", num_layers=1), token_batches(1)[0]
    out = np.random.default_rng(5).random(batch["targets"].shape) < 0.4
    by_target = batch | {"targets": np.where(out, IGNORED, batch["targets"]).astype(np.int32)}
    by_weight = batch | {"weights": np.where(out, 0, batch["weights"]).astype(np.float32)}
    assert (by_target["weights"][out] > 0).any()
    return model, by_target, by_weight


def test_ignored_targets_train_nothing(toy):
    model, by_target, by_weight = toy
    config = Config(model=model.config, data=DataConfig(sequence_length=11, batch_size=3))
    run = jax.jit(lambda batch: loss_and_gradients(stack_layers(model.parameters()), batch, config, UNSHARDED))
    one, other = (run(jax.tree.map(jnp.asarray, batch)) for batch in (by_target, by_weight))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert one[0] > 0


def test_ignored_targets_measure_nothing(toy):
    model, *batches = toy
    chosen = choose(["perplexity", "outliers"])
    one, other = (evaluate(*placed(model), [batch], chosen).values for batch in batches)
    assert one == other and one["loss"] > 0


@pytest.mark.parametrize("wrong", [-1, 29, IGNORED, 2**31 - 1])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(toy, wrong):
    model, batch, _ = toy
    inputs = batch["inputs"].copy()
    inputs[2, 7] = wrong
    named = rf"inputs: the id {wrong} at row 2, position 7 is outside the vocabulary; allowed are 0\.\.28$"
    for call in (
        lambda: evaluate(*placed(model), [batch | {"inputs": inputs}], choose(["perplexity"])),
        lambda: model(inputs),
        lambda: model(jnp.asarray(inputs)),
    ):
        with pytest.raises(UserError, match=named):
            call()
    if wrong != IGNORED:
        with pytest.raises(UserError, match=rf"targets: the id {wrong} .* 0\.\.28, or -100 where nothing is"):
            check_ids(MODEL, targets=inputs)
    else:
        check_ids(MODEL, targets=inputs)


def test_what_is_traced_or_no_token_is_not_looked_at():
    jax.jit(lambda ids: check_ids(MODEL, inputs=ids))(jnp.array([[99]]))
    check_ids(ModelConfig(inputs="vectors", vector_dim=3), inputs=np.full((2, 3, 3), 99.0))
    check_ids(MODEL, inputs=np.zeros((0, 4), np.int32), targets=None)
