"""The trigger task against a loop that follows its words."""

import time

import numpy as np
import pytest

from oasis_jax.config import DataConfig
from oasis_jax.data import load_corpus, train_batches
from oasis_jax.errors import UserError


def trigger_config(**fields):
    return DataConfig(
        corpus="trigger", **{"sequence_length": 23, "trigger_dim": 5, "trigger_rate": 0.3, "batch_size": 6} | fields
    )


def expected_targets(inputs):
    """One position after another: at a trigger the mean of the content so far, the begin token's left out;
    else zero.
    """
    targets = np.zeros(inputs.shape, np.float64)
    seen = []
    for position, vector in enumerate(inputs.astype(np.float64)):
        if vector[0] == 0:
            seen.append(vector[2:])
        if vector[1] == 1:
            targets[position, 2:] = sum(seen) / len(seen)
    return targets


@pytest.mark.parametrize("begin_token", [True, False])
def test_targets_are_the_mean_at_triggers_and_zero_elsewhere(begin_token):
    source = load_corpus(trigger_config(begin_token=begin_token), seed=3).train
    triggers = 0
    for i in range(50):
        example = source[i]
        np.testing.assert_allclose(example["targets"], expected_targets(example["inputs"]), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(example["trigger"], example["inputs"][:, 1] == 1)
        assert set(np.unique(example["inputs"][:, :2])) <= {0, 1} and (example["weights"] == 1).all()
        triggers += example["trigger"].sum()
    eligible = 50 * (23 - 1 - begin_token)
    assert abs(triggers / eligible - 0.3) < 4 * np.sqrt(0.3 * 0.7 / eligible)


def test_begin_token_on_and_off():
    with_begin = [load_corpus(trigger_config(), seed=0).train[i]["inputs"] for i in range(200)]
    assert all(
        inputs[0].tolist() == [1, 0, 0, 0, 0, 0, 0] and not inputs[1:, 0].any() and not inputs[1, 1]
        for inputs in with_begin
    )
    assert any(inputs[2, 1] for inputs in with_begin)
    without = [load_corpus(trigger_config(begin_token=False), seed=0).train[i]["inputs"] for i in range(200)]
    assert all(not inputs[:, 0].any() and inputs[0, 2:].all() and not inputs[0, 1] for inputs in without)
    assert any(inputs[1, 1] for inputs in without)


def test_one_softmax_head_with_a_begin_token_solves_it_and_has_to_sink():
    example = load_corpus(trigger_config(), seed=0).train[0]
    content = example["inputs"][:, 2:].astype(np.float64)
    # Score of key j for query i: triggers avoid the begin token, all others see nothing else.
    begin_score = np.where(example["trigger"], -1e3, 1e3)[:, None] * example["inputs"][None, :, 0]
    scores = np.where(np.tri(23, dtype=bool), begin_score, -np.inf)
    probabilities = np.exp(scores - scores.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities @ content, example["targets"][:, 2:], atol=1e-6)
    assert (probabilities[~example["trigger"], 0] > 0.999).all()


def test_content_is_standard_normal():
    source = load_corpus(trigger_config(), seed=0).train
    content = np.stack([source[i]["inputs"][1:, 2:] for i in range(100)]).ravel()
    assert abs(content.mean()) < 5 / np.sqrt(content.size) and abs(content.std() - 1) < 5 / np.sqrt(2 * content.size)


def test_examples_depend_on_seed_stream_and_index_alone():
    first, again, other = (load_corpus(trigger_config(), seed=seed) for seed in (0, 0, 1))
    far = len(first.train) - 1
    for i in (7, far, 0):
        for name, array in first.train[i].items():
            np.testing.assert_array_equal(array, again.train[i][name])
    drawn = [
        source[i]["inputs"].tobytes()
        for source in (first.train, first.heldout, other.train, other.heldout)
        for i in range(5)
    ]
    assert len(set(drawn)) == 20
    with pytest.raises(IndexError):
        first.heldout[len(first.heldout)]


def test_identity_carries_the_parameters():
    corpora = [
        load_corpus(trigger_config(**fields), seed=seed)
        for seed, fields in [(0, {}), (0, {"trigger_rate": 0.2}), (1, {})]
    ]
    identity = corpora[0].identity
    assert len({corpus.identity["sha256"] for corpus in corpora}) == 3
    assert {
        "name": "trigger",
        "seed": 0,
        "trigger_dim": 5,
        "trigger_rate": 0.3,
        "sequence_length": 23,
    }.items() <= identity.items()
    assert corpora[0].tokenizer is None and corpora[0].vector_dim == 7


def test_batches_have_the_shapes_the_model_takes_and_take_little_time():
    config = trigger_config(batch_size=64, sequence_length=64, trigger_dim=16)
    iterator = train_batches(load_corpus(config, seed=0).train, config, seed=0)
    batch = next(iterator)
    iterator.close()
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "inputs": ((64, 64, 18), "float32"),
        "targets": ((64, 64, 18), "float32"),
        "weights": ((64, 64), "float32"),
        "trigger": ((64, 64), "bool"),
    }
    source = load_corpus(config, seed=0).train
    start = time.process_time()
    for i in range(640):
        source[i]
    assert (time.process_time() - start) / 10 < 0.05  # 10 ms are meant; a loaded machine may be slower


def test_too_short_a_sequence_and_a_negative_seed_are_refused():
    with pytest.raises(UserError, match=r"data\.sequence_length: .* at least 3, got 2"):
        load_corpus(trigger_config(sequence_length=2), seed=0)
    with pytest.raises(UserError, match=r"run\.seed"):
        load_corpus(trigger_config(), seed=-2).train[0]
