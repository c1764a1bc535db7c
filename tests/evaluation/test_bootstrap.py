"""Confidence intervals: against resampling done draw by draw, and what may be paired."""

import numpy as np
import pytest

from oasis_jax.errors import UserError
from oasis_jax.evaluation import bootstrap
from oasis_jax.evaluation.bootstrap import Estimate, intervals, paired_differences, per_sequence

IDENTITY = {"tokens": "ab", "layers": 3, "sequences": 7, "positions": 5}


def made_up(reduce=bootstrap.largest) -> Estimate:
    random = np.random.default_rng(0)
    return Estimate(random.random((7, 3)), random.integers(1, 5, (7, 1)).astype(float), reduce)


def test_interval_is_that_of_draws_of_whole_sequences():
    estimate, random = made_up(), np.random.default_rng(1)
    draws = []
    for _ in range(4000):
        chosen = random.integers(7, size=7)
        draws.append((estimate.totals[chosen].sum(0) / estimate.counts[chosen].sum(0)).max())
    # Two runs of a bootstrap of 4,000 and 10,000 draws: their 2.5 % quantiles agree to a few per cent of the spread.
    np.testing.assert_allclose(
        intervals({"x": estimate})["x"], np.quantile(draws, [0.025, 0.975]), atol=0.1 * np.std(draws)
    )
    assert estimate.value == pytest.approx((estimate.totals.sum(0) / estimate.counts.sum()).max())


def test_interval_of_a_mean_of_many_sequences_is_the_normal_one():
    values = np.random.default_rng(2).standard_normal(900)
    low, high = intervals({"x": per_sequence(values)})["x"]
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 30, rel=0.05)
    assert low < values.mean() < high


def test_the_same_seed_gives_the_same_interval():
    assert intervals({"x": made_up()}) == intervals({"x": made_up()})
    assert bootstrap.DESCRIPTION["draws"] == 10_000


def test_one_sequence_has_no_interval_and_what_was_never_counted_no_value():
    assert intervals({"x": per_sequence(np.ones(1))}) == {"x": None}
    nothing = Estimate(np.zeros((3, 1)), np.zeros((3, 1)))
    assert nothing.value is None and intervals({"x": nothing}) == {"x": None}


def test_paired_difference_is_narrower_than_the_two_intervals_say():
    random = np.random.default_rng(3)
    base = random.standard_normal(40)
    first, second = per_sequence(base + 0.5), per_sequence(base + 0.01 * random.standard_normal(40))
    found = paired_differences({"x": first, "y": first}, {"x": second}, (IDENTITY | {"sequences": 40},) * 2)
    assert list(found) == ["x"]
    low, high = found["x"]["interval"]
    assert found["x"]["difference"] == pytest.approx(0.5, abs=0.01) and 0.49 < low < high < 0.51


@pytest.mark.parametrize("change", [{"tokens": "cd"}, {"layers": 4}, {"sequences": 8}, {"positions": 9}])
def test_runs_that_read_something_else_are_not_paired(change):
    (name,) = change
    with pytest.raises(UserError, match=f"cannot be paired, they differ in {name}: "):
        paired_differences({"x": made_up()}, {"x": made_up()}, (IDENTITY, IDENTITY | change))
