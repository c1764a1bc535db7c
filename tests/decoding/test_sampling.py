"""What is drawn from, against numpy."""

import jax
import numpy as np
import pytest

from oasis_jax import UserError
from oasis_jax.decoding import Sampling
from oasis_jax.decoding.sampling import cut, penalized, sample

LOGITS = np.random.default_rng(0).normal(size=(5, 23)).astype(np.float32) * 2


def expected(logits, sampling):
    """Probabilities of the tokens that are drawn from, one row after the other."""
    found = []
    for row in logits.astype(np.float64) / sampling.temperature:
        allowed = np.ones(len(row), bool)
        if sampling.top_k:
            allowed &= row >= np.sort(row)[-min(sampling.top_k, len(row))]
        p = np.where(allowed, np.exp(row), 0)
        p /= p.sum()
        order = np.argsort(-p)
        before = np.cumsum(p[order]) - p[order]
        allowed[order[before >= sampling.top_p]] = False
        allowed &= p >= sampling.min_p * p.max()
        p = np.where(allowed, p, 0)
        found.append(p / p.sum())
    return np.array(found)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.7),
        dict(temperature=1.3, top_k=4),
        dict(temperature=1.0, top_k=99),
        dict(temperature=1.1, top_p=0.6),
        dict(temperature=0.9, min_p=0.2),
        dict(temperature=2.0, top_k=9, top_p=0.8, min_p=0.1),
        dict(temperature=1.0, top_p=1e-6),
    ],
)
def test_the_distribution_is_cut_as_numpy_cuts_it(options):
    sampling = Sampling(**options)
    np.testing.assert_allclose(jax.nn.softmax(cut(LOGITS, sampling)), expected(LOGITS, sampling), atol=1e-6)


def test_draws_have_the_distribution():
    sampling, count = Sampling(temperature=1.5, top_k=6), 4000
    keys = jax.random.split(jax.random.key(0), count)
    drawn = np.asarray(sample(np.repeat(LOGITS[:1], count, 0), keys, None, sampling))
    share = np.bincount(drawn, minlength=23) / count
    p = expected(LOGITS[:1], sampling)[0]
    assert np.abs(share - p).max() < 5 * np.sqrt(p.max() / count)  # five standard deviations
    assert set(np.flatnonzero(share)) == set(np.flatnonzero(p))


def test_a_penalty_makes_what_was_seen_less_likely():
    seen = np.zeros(LOGITS.shape, bool)
    seen[:, ::3] = True
    wanted = np.where(seen, np.where(LOGITS > 0, LOGITS / 1.7, LOGITS * 1.7), LOGITS)
    np.testing.assert_allclose(penalized(LOGITS, seen, 1.7), wanted, rtol=1e-6)
    best = np.asarray(sample(LOGITS, jax.random.split(jax.random.key(0), 5), None, Sampling()))
    np.testing.assert_array_equal(best, LOGITS.argmax(-1))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=-0.1), "sampling.temperature: must be at least 0, got -0.1"),
        (dict(top_k=-1), "sampling.top_k: must be at least 0, got -1"),
        (dict(top_p=1.1), "sampling.top_p: must be above 0 and not above 1, got 1.1"),
        (dict(min_p=1.0), "sampling.min_p: must be at least 0 and below 1, got 1.0"),
        (dict(repetition_penalty=0.0), "sampling.repetition_penalty: must be above 0, got 0.0"),
        (dict(temperature=float("nan")), "sampling.temperature: must be finite"),
        (dict(top_k=1.5), "sampling.top_k: expected int, got 1.5"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)
