"""The study's statistics against scipy, published examples, and their own error rates on planted effects."""

import math

import numpy as np
import pytest
from scipy import stats

from oasis_jax.study.statistics import detectable, holm, mean, noise_floor, paired_p_value, transformed


def test_means_and_paired_tests_are_students():
    one, other = [3.1, 2.7, 4.4, 3.9, 2.2], [2.9, 2.1, 4.6, 3.0, 1.8]
    found, expected = mean(one), stats.ttest_1samp(one, 0.0).confidence_interval(0.95)
    assert found.count == 5 and found.value == pytest.approx(3.26)
    np.testing.assert_allclose(found.interval, expected, rtol=1e-12)
    differences = np.subtract(one, other)
    assert paired_p_value(differences) == pytest.approx(stats.ttest_rel(one, other).pvalue, rel=1e-12)
    assert noise_floor(one) == pytest.approx(math.sqrt(sum((x - 3.26) ** 2 for x in one) / 4))


def test_too_few_seeds_and_equal_differences():
    assert mean([2.0]).interval is None and noise_floor([2.0]) is None
    assert paired_p_value([0.7]) == 1.0
    assert paired_p_value([0.0, 0.0, 0.0]) == 1.0
    assert paired_p_value([0.5, 0.5, 0.5]) == 0.0
    assert detectable(1, 3) == math.inf


def test_holm_steps_down():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_ratios_have_no_value_where_there_is_no_logarithm():
    np.testing.assert_array_equal(transformed([math.e, 0.0, -1.0], True), [1.0, np.nan, np.nan])
    np.testing.assert_array_equal(transformed([2.0, -1.0], False), [2.0, -1.0])


@pytest.mark.parametrize("count, tests", [(3, 1), (5, 1), (5, 12), (2, 20)])
def test_what_is_detectable_is_found_four_times_in_five(count, tests):
    effect, draws = detectable(count, tests), 20_000
    random = np.random.default_rng(7).standard_normal((draws, count)) + effect
    p = stats.ttest_1samp(random, 0.0, axis=1).pvalue
    found = np.mean((p < 0.05 / tests) & (random.mean(1) > 0))
    assert abs(found - 0.8) < 4 * math.sqrt(0.8 * 0.2 / draws)
