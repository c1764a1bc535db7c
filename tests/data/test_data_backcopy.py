"""Bigram-Backcopy against counts of the text's pairs, made one by one."""

import collections
import itertools
import math
import random

import numpy as np
import pytest

from oasis_jax.config import DataConfig
from oasis_jax.data import load_corpus, train_batches
from oasis_jax.errors import UserError

TEXT = "".join(random.Random(5).choices("abcdefghi", weights=(9, 7, 6, 5, 5, 4, 3, 3, 2), k=2000))
BEGIN = 256


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("zebra")

    def make(seed=0, **fields):
        fields = {"sequence_length": 23, "batch_size": 6, "trigger_characters": 2} | fields
        return load_corpus(DataConfig(corpus="backcopy", pattern=f"{tmp_path}/*.txt", **fields), seed=seed)

    return make


def chain() -> tuple[list[int], dict[int, collections.Counter]]:
    """The two triggers and, by character, how often which one follows; the text is a ring."""
    text = (TEXT + "zebra").encode()
    follows = collections.defaultdict(collections.Counter)
    for here, there in zip(text, text[1:] + text[:1]):
        follows[here][there] += 1
    return [character for character, _ in collections.Counter(text).most_common(2)], follows


@pytest.mark.parametrize("begin_token", [True, False])
def test_examples_follow_the_rule_and_know_what_they_cost(corpus, begin_token):
    triggers, follows = chain()
    frequency = {c: sum(after.values()) for c, after in follows.items() if c not in triggers}
    source, copies = corpus(begin_token=begin_token).train, 0
    for i in range(40):
        example = source[i]
        tokens = [*example["inputs"].tolist(), int(example["targets"][-1])]
        np.testing.assert_array_equal(example["inputs"][1:], example["targets"][:-1])
        assert (tokens[0] == BEGIN) == begin_token and tokens[begin_token] not in triggers
        for t, (here, there) in enumerate(itertools.pairwise(tokens)):
            copied = here in triggers
            if copied:
                assert there == tokens[t - 1] != BEGIN
            share = 1.0 if copied else (follows[here][there] / sum(follows[here].values()) if here != BEGIN else None)
            share = frequency[there] / sum(frequency.values()) if share is None else share
            assert example["trigger"][t] == copied
            assert example["optimal_nats"][t] == pytest.approx(-math.log(share), abs=1e-6)
            copies += copied
        assert (example["weights"] == 1).all()
    assert copies > 100


def test_what_is_drawn_has_the_frequencies_of_the_text(corpus):
    triggers, follows = chain()
    pairs = collections.Counter()
    source = corpus().train
    for i in range(400):
        pairs.update(zip(source[i]["inputs"][1:].tolist(), source[i]["targets"][1:].tolist()))
    here = ord("d")
    assert here not in triggers
    drawn = sum(count for (a, _), count in pairs.items() if a == here)
    for there, count in follows[here].items():
        p = count / sum(follows[here].values())
        assert abs(pairs[here, there] / drawn - p) < 4.5 * math.sqrt(p * (1 - p) / drawn) + 1e-12


def test_examples_depend_on_seed_stream_and_index_alone(corpus):
    first, again, other = (corpus(seed=seed) for seed in (0, 0, 1))
    for i in (7, len(first.train) - 1, 0):
        for name, array in first.train[i].items():
            np.testing.assert_array_equal(array, again.train[i][name])
    drawn = [s[i]["inputs"].tobytes() for s in (first.train, first.heldout, other.train) for i in range(5)]
    assert len(set(drawn)) == 15
    with pytest.raises(IndexError):
        first.heldout[len(first.heldout)]


def test_identity_says_the_text_and_the_triggers(corpus, tmp_path):
    triggers, _ = chain()
    found = [corpus().identity, corpus(trigger_characters=3).identity, corpus(seed=1).identity]
    assert found[0]["triggers"] == bytes(triggers).decode() and len(found[1]["triggers"]) == 3
    (tmp_path / "b.txt").write_text("zebras")
    assert len({identity["sha256"] for identity in [*found, corpus().identity]}) == 4


def test_batches_and_the_text_that_is_everywhere():
    config = DataConfig(corpus="backcopy", sequence_length=37, batch_size=5)
    corpus = load_corpus(config, seed=0)
    assert corpus.tokenizer.identity == load_corpus(DataConfig(), seed=0).tokenizer.identity
    assert corpus.identity["triggers"][0] == " " and corpus.vector_dim is None
    iterator = train_batches(corpus.train, config, seed=0)
    batch = next(iterator)
    iterator.close()
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "inputs": ((5, 37), "int32"),
        "targets": ((5, 37), "int32"),
        "weights": ((5, 37), "float32"),
        "trigger": ((5, 37), "bool"),
        "optimal_nats": ((5, 37), "float32"),
    }


def test_what_cannot_be_made_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r"data\.tokenizer: .*tokenizer=bytes, got bpe"):
        corpus(tokenizer="bpe")
    with pytest.raises(UserError, match=r"data\.trigger_characters: .* at most \d+ can be triggers, got 200"):
        corpus(trigger_characters=200)
    for path in tmp_path.iterdir():
        path.write_text("")
    with pytest.raises(UserError, match="there is no text"):
        corpus()
