"""Order, state and process-count independence of the batches."""

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest

from oasis_jax.config import DataConfig
from oasis_jax.data import eval_batches, load_corpus, train_batches
from oasis_jax.data.packing import Windows
from oasis_jax.data.text import stream_of
from oasis_jax.data.tokenizers import BytesTokenizer
from oasis_jax.errors import UserError

CONFIG = DataConfig(batch_size=12, sequence_length=3)


class Numbers:
    """Example i says i."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert 0 <= index < self.length
        return {"inputs": np.array([index])}


@pytest.fixture
def batches():
    """Iterators over the indices of a source's examples, closed at the end."""
    opened = []

    def start(length, config=CONFIG, **keywords):
        opened.append(train_batches(Numbers(length), config, **{"seed": 0} | keywords))
        return opened[-1]

    yield start
    for iterator in opened:
        iterator.close()


def indices(iterator, count):
    return [next(iterator)["inputs"][:, 0].tolist() for _ in range(count)]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def test_every_epoch_has_all_examples_in_an_order_of_its_own(batches):
    read = joined(indices(batches(60), 15))
    epochs = [read[start : start + 60] for start in (0, 60, 120)]
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(60)]}) == 4


def test_seeds_share_no_order(batches):
    orders = [joined(indices(batches(60, seed=seed), 10)) for seed in (0, 1, 2)]
    halves = [tuple(order[start : start + 60]) for order in orders for start in (0, 60)]
    assert len(set(halves)) == 6
    assert orders[0] == joined(indices(batches(60, seed=0), 10))


def test_epochs_join_without_a_partial_batch(batches):
    read = indices(batches(17), 17)
    assert all(len(batch) == 12 for batch in read)
    assert np.bincount(joined(read)).tolist() == [12] * 17


def test_a_batch_of_one(batches):
    one = dataclasses.replace(CONFIG, batch_size=1)
    assert joined(indices(batches(60, one), 24)) == joined(indices(batches(60), 2))


@pytest.mark.parametrize("length", [1, 5])
def test_a_source_smaller_than_the_batch_repeats(batches, length):
    assert np.bincount(joined(indices(batches(length), 5))).tolist() == [60 // length] * length


@pytest.mark.parametrize("process_count", [2, 3, 4])
def test_processes_share_the_global_batch(batches, process_count):
    whole = batches(1001)
    parts = [batches(1001, part=p, parts=process_count) for p in range(process_count)]
    for _ in range(90):
        (together,), shares = indices(whole, 1), [indices(part, 1)[0] for part in parts]
        for p, share in enumerate(shares):
            assert share == together[p::process_count]
        assert {json.dumps(part.get_state()) for part in parts} == {json.dumps(whole.get_state())}


def test_state_goes_from_one_process_count_to_another(batches):
    whole = batches(100)
    indices(whole, 13)
    state = json.loads(json.dumps(whole.get_state()))
    assert state == {"next_index": 13}
    parts = [batches(100, part=p, parts=2) for p in range(2)]
    for part in parts:
        part.set_state(state)
    for together, even, odd in zip(indices(whole, 9), indices(parts[0], 9), indices(parts[1], 9)):
        assert (together[0::2], together[1::2]) == (even, odd)


def test_restoring_gives_exactly_the_following_batches(batches):
    straight = indices(batches(50), 30)
    iterator = batches(50)
    indices(iterator, 11)
    state = iterator.get_state()
    indices(iterator, 6)
    iterator.set_state(state)
    assert indices(iterator, 19) == straight[11:]


def test_restoring_does_not_replay(batches):
    iterator = batches(1000)
    start = time.perf_counter()
    iterator.set_state({"next_index": 10**9})
    (late,) = indices(iterator, 1)
    assert time.perf_counter() - start < 1
    assert len(set(late)) > 1


def test_examples_arrive_stacked(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(200)) * 2)
    config = DataConfig(corpus="files", pattern=str(tmp_path / "a.txt"), batch_size=5, sequence_length=7)
    iterator = train_batches(load_corpus(config, seed=0).train, config, seed=0)
    batch = next(iterator)
    iterator.close()
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "inputs": ((5, 7), "int32"),
        "targets": ((5, 7), "int32"),
        "weights": ((5, 7), "float32"),
    }
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


@pytest.mark.parametrize("process_count, fitting", [(5, "take 10 or 15"), (8, "take 8 or 16"), (16, "take 16")])
def test_a_batch_that_cannot_be_dealt_out_is_refused(process_count, fitting):
    with pytest.raises(UserError) as caught:
        train_batches(Numbers(100), CONFIG, seed=0, parts=process_count)
    assert str(caught.value) == f"data.batch_size: 12 is not divisible by {process_count} processes; {fitting}"


def test_a_negative_seed_is_refused():
    with pytest.raises(UserError, match=r"run\.seed: must be at least 0, got -1"):
        train_batches(Numbers(100), CONFIG, seed=-1)


def test_evaluation_spreads_over_the_source_in_order():
    read = [batch["inputs"][:, 0].tolist() for batch in eval_batches(Numbers(1000), CONFIG, num_batches=5)]
    assert [len(batch) for batch in read] == [12] * 5
    flat = joined(read)
    assert flat == sorted(set(flat)) and flat[0] == 0
    assert {b - a for a, b in itertools.pairwise(flat)} <= {1000 // 60, 1000 // 60 + 1} and flat[-1] >= 1000 - 17


@pytest.mark.parametrize("length, shapes", [(25, [12, 12]), (12, [12]), (11, [11]), (1, [1])])
def test_evaluation_takes_what_is_there(length, shapes):
    read = [batch["inputs"][:, 0].tolist() for batch in eval_batches(Numbers(length), CONFIG, num_batches=5)]
    assert [len(batch) for batch in read] == shapes
    assert len(set(joined(read))) == sum(shapes)


def test_evaluation_of_nothing_is_refused():
    with pytest.raises(UserError, match="no held-out example"):
        eval_batches(Windows(stream_of([], BytesTokenizer()), 3, None), CONFIG, num_batches=5)
