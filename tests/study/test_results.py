"""Verdicts on records whose truth is known."""

import json
import math

import numpy as np
import pytest
from study.study_toys import ERROR, record, toy_study

from oasis_jax.errors import UserError
from oasis_jax.study import Claim, Outcome
from oasis_jax.study.cells import check_all_alike
from oasis_jax.study.results import CONFIRMED, CONTRADICTED, NOT_TESTABLE, WITHIN_NOISE, as_json, results
from oasis_jax.study.statistics import detectable

SINK = Outcome("sink", "sink", relative=False)


def drawn(random, effects, seeds, noise=0.1):
    """Records of methods that differ from the baseline, 0, by known effects; seeds are shared by all methods."""
    shared = random.normal(0, 1, seeds)
    return [
        record(method, seed, sink=float(shared[seed] + effect + random.normal(0, noise)))
        for method, effect in {"softmax": 0.0, **effects}.items()
        for seed in range(seeds)
    ]


def planted(effects, seeds, direction="lower"):
    names = {"softmax": (), **dict.fromkeys(effects, ("model.normalizer=softmax1",))}
    claims = tuple(Claim(f"{m} is {direction}", "us", "sink", m, "softmax", direction=direction) for m in effects)
    return toy_study(methods=names, seeds=tuple(range(seeds)), outcomes=(SINK,), claims=claims)


def test_planted_nulls_are_found_in_at_most_one_study_of_twenty():
    """Holm's promise: of six claims that are all wrong, none falls, in 95 % of studies."""
    effects, random, draws = dict.fromkeys("abcdef", 0.0), np.random.default_rng(3), 200
    study = planted(effects, 5)
    wrong = sum(
        any(v.word != WITHIN_NOISE for v in results(study, drawn(random, effects, 5)).verdicts) for _ in range(draws)
    )
    assert wrong / draws < 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def test_a_planted_effect_is_found_as_often_as_stated():
    """Paired differences have a standard deviation of .1 sqrt(2); an effect of `detectable` of them is found in four
    studies of five, and one far above the noise floor always.
    """
    random, draws, seeds = np.random.default_rng(4), 200, 5
    effects = {"a": -0.1 * math.sqrt(2) * detectable(seeds, 4), "b": 0.0, "c": 0.0, "d": 0.0}
    study = planted(effects, seeds)
    floors = [results(study, drawn(random, effects, seeds)) for _ in range(draws)]
    rejected = np.mean([found.verdicts[0].adjusted < 0.05 for found in floors])
    assert (
        abs(rejected - 0.8) < 4 * math.sqrt(0.8 * 0.2 / draws) + 0.01
    )  # Holm is a little stronger than its first step
    large = planted({"a": -30.0}, seeds)
    assert {results(large, drawn(random, {"a": -30.0}, seeds)).verdicts[0].word for _ in range(20)} == {CONFIRMED}
    assert results(planted({"a": 9.0}, 5), drawn(random, {"a": 9.0}, 5)).verdicts[0].word == CONTRADICTED


def test_an_effect_below_the_noise_floor_is_noise_however_sure():
    records = [record("softmax", seed, sink=float(seed)) for seed in range(5)]
    records += [record("softmax1", seed, sink=seed - 0.01 - 0.0001 * seed) for seed in range(5)]
    study = toy_study(
        seeds=tuple(range(5)), outcomes=(SINK,), claims=(Claim("less", "us", "sink", "softmax1", "softmax"),)
    )
    (verdict,) = results(study, records).verdicts
    assert verdict.word == WITHIN_NOISE and "noise floor" in verdict.reason and verdict.adjusted < 1e-4
    assert verdict.comparison.effect == pytest.approx(-0.0102 / math.sqrt(2.5))


def test_ratios_are_compared_on_logarithms():
    records = [record("softmax", seed, squared_error=value) for seed, value in enumerate([1.0, 2.0, 8.0])]
    records += [record("softmax1", seed, squared_error=value) for seed, value in enumerate([0.5, 1.0, 4.0])]
    found = results(toy_study(seeds=(0, 1, 2)), records)
    comparison = found.rows[1].comparisons[ERROR.value]
    assert comparison.change == pytest.approx(-0.5) and comparison.interval == pytest.approx((-0.5, -0.5))
    assert comparison.effect == pytest.approx(-math.log(2) / np.std(np.log([1, 2, 8]), ddof=1))
    json.dumps(as_json(found), allow_nan=False)


def test_what_cannot_be_tested_says_why():
    seeds = (0, 1, 2)
    outcomes = (SINK, Outcome("quantized.w8a8.change", "8 bit", relative=False))
    claims = (
        Claim("no sink to remove", "us", "sink", "softmax1", "softmax", needs={"sink": 0.3}),
        Claim("destroyed", "us", "quantized.w8a8.change", "softmax1", "softmax"),
        Claim("elsewhere", "them", untestable="too small a model"),
    )
    study = toy_study(seeds=seeds, outcomes=outcomes, claims=claims)
    values = {"sink": 0.1, "quantized.w8a8.change": 9.0}
    records = [record(m, s, destroyed=("w8a8",), **values) for m in ("softmax", "softmax1") for s in seeds]
    found = results(study, records)
    assert [v.word for v in found.verdicts] == [NOT_TESTABLE] * 3 and found.tests == 0
    reasons = [verdict.reason for verdict in found.verdicts]
    assert "below 0.3: nothing to remove" in reasons[0] and "DESTROYED" in reasons[1] and "too small" in reasons[2]
    assert found.rows[0].destroyed == {"w8a8": 3}
    few = results(study, [r for r in records if r["seed"] < 2])
    assert "2 seeds; at least 3" in few.verdicts[0].reason and (few.done, few.total) == (4, 6)


def test_diverged_cells_are_counted_and_named():
    records = [record("softmax", seed, squared_error=1.0) for seed in range(2)]
    records += [record("softmax1", 0, squared_error=1.0), record("softmax1", 1, failed="step 3: loss is nan")]
    found = results(toy_study(), records)
    assert found.rows[1].failed == ["seed 1: step 3: loss is nan"] and found.rows[1].means[ERROR.value].count == 1


@pytest.mark.parametrize(
    "where, value, words",
    [
        (("start", "parameters", "embedding"), [3, 5, 78], "embedding begins with other values"),
        (("start", "settings", "run", "steps"), 7, "run.steps is 7 and 6"),
        (("corpus",), "bad", "they read different data"),
    ],
)
def test_unequal_starts_are_an_error(where, value, words):
    records = [record(method, seed, squared_error=1.0) for method in ("softmax", "softmax1") for seed in (0, 1)]
    changed = json.loads(json.dumps(records[3]))
    inner = changed
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(UserError, match=f"unequal start: softmax1 and softmax, .*{words}"):
        check_all_alike([*records[:3], changed], ())
    changed["start"]["parameters"]["embedding"] = [3, 6, 78]  # of another shape, values cannot agree
    if where[-1] == "embedding":
        check_all_alike([*records[:3], changed], ())


def test_a_scalar_that_the_other_method_does_not_have_is_no_unequal_start():
    """DyT's alpha has the shape [], and a model with LayerNorm has none."""
    records = json.loads(json.dumps([record(method, 0, squared_error=1.0) for method in ("softmax", "softmax1")]))
    records[1]["start"]["parameters"] = {"embedding": [3, 5, 77], "final_norm.alpha": [77]}
    check_all_alike(records, ())
    records[0]["start"]["parameters"]["final_norm.alpha"] = [78]
    with pytest.raises(UserError, match=r"final_norm\.alpha begins with other values"):
        check_all_alike(records, ())
