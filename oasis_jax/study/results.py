"""What the cells of a study say: means and effects of every method, and a verdict on every claim."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from oasis_jax.study.design import Claim, Outcome, Study
from oasis_jax.study.records import Record
from oasis_jax.study.statistics import (
    ALPHA,
    Mean,
    detectable,
    holm,
    mean,
    noise_floor,
    paired_p_value,
    transformed,
)

CONFIRMED, CONTRADICTED, WITHIN_NOISE, NOT_TESTABLE = "confirmed", "contradicted", "within noise", "not testable"


class Comparison(NamedTuple):
    """A method's outcome beside another's, seed by seed.

    Attributes:
      change: the mean difference; of a relative outcome the ratio of geometric means minus 1.
      interval: of `change`.
      effect: the mean difference as multiples of the noise floor; None where there is no floor.
      p: of the paired test, uncorrected.
      seeds: how many pairs.
      spread: the differences' standard deviation as multiples of the noise floor.
    """

    change: float
    interval: tuple[float, float] | None
    effect: float | None
    p: float
    seeds: int
    spread: float | None


class Row(NamedTuple):
    """One method in one arm: outcome's value -> its mean over seeds, and beside its twin's."""

    arm: str
    method: str
    twin: str
    means: Mapping[str, Mean]
    comparisons: Mapping[str, Comparison]
    failed: Sequence[str]  # in words, of cells that diverged
    destroyed: Mapping[str, int]  # scheme -> in how many seeds it left no model
    seeds: int


class Verdict(NamedTuple):
    """A claim in one arm. `adjusted` is the p-value corrected over all claims."""

    claim: Claim
    arm: str
    word: str
    reason: str
    comparison: Comparison | None = None
    adjusted: float | None = None


class Results(NamedTuple):
    """Everything a report shows."""

    rows: list[Row]
    verdicts: list[Verdict]
    floors: Mapping[tuple[str, str], float | None]  # (arm, outcome) -> the noise floor
    done: int
    total: int
    tests: int  # claims that were tested together

    @property
    def detectable(self) -> float:
        """In standard deviations of paired differences, see `statistics.detectable`."""
        seeds = max((row.seeds for row in self.rows), default=0)
        return detectable(seeds, max(self.tests, 1))


class _Cells:
    """The records of a study by arm, method and seed."""

    def __init__(self, study: Study, records: Iterable[Record]):
        self.study = study
        wanted = [(cell.arm, cell.method, cell.seed) for cell in study.cells()]
        found = {(record["arm"], record["method"], record["seed"]): record for record in records}
        self.records = {key: found[key] for key in wanted if key in found}

    def of(self, arm: str, method: str) -> list[Record]:
        keys = [(arm, method, seed) for seed in self.study.seeds]
        return [self.records[key] for key in keys if key in self.records]

    def values(self, arm: str, method: str, outcome: Outcome) -> dict[int, float]:
        """Seed -> the outcome as it is compared; seeds without a number are left out."""
        records = [r for r in self.of(arm, method) if r["values"].get(outcome.value) is not None]
        found = transformed([r["values"][outcome.value] for r in records], outcome.relative)
        return {r["seed"]: float(x) for r, x in zip(records, found) if math.isfinite(x)}

    def floor(self, arm: str, outcome: Outcome) -> float | None:
        return noise_floor([*self.values(arm, self.study.baseline, outcome).values()])

    def compare(self, arm: str, method: str, against: str, outcome: Outcome) -> Comparison | None:
        """None where no seed has both."""
        one, other = self.values(arm, method, outcome), self.values(arm, against, outcome)
        seeds = [seed for seed in one if seed in other]
        if not seeds or method == against:
            return None
        differences = [one[seed] - other[seed] for seed in seeds]
        middle, floor = mean(differences), self.floor(arm, outcome)
        shown = math.expm1 if outcome.relative else float
        with np.errstate(over="ignore"):
            change = shown(middle.value)
            interval = middle.interval and tuple(shown(min(x, 700.0)) for x in middle.interval)
        spread = noise_floor(differences)
        return Comparison(
            change=change,
            interval=interval,
            effect=middle.value / floor if floor else None,
            p=paired_p_value(differences),
            seeds=len(seeds),
            spread=spread / floor if floor and spread is not None else None,
        )


def results(study: Study, records: Iterable[Record]) -> Results:
    """Tables and verdicts.

    Args:
      records: of the cells that are done; see `oasis_jax.study.cells.run_cell`.
    """
    cells = _Cells(study, records)
    rows = [_row(cells, arm, method) for arm in study.arms for method in study.methods if cells.of(arm, method)]
    verdicts = _verdicts(cells)
    floors = {(arm, outcome.value): cells.floor(arm, outcome) for arm in study.arms for outcome in study.outcomes}
    tests = sum(verdict.adjusted is not None for verdict in verdicts)
    return Results(rows, verdicts, floors, len(cells.records), len(list(study.cells())), tests)


def _row(cells: _Cells, arm: str, method: str) -> Row:
    study, records = cells.study, cells.of(arm, method)
    means, comparisons = {}, {}
    for outcome in study.outcomes:
        found = [r["values"][outcome.value] for r in records if r["values"].get(outcome.value) is not None]
        if found:
            means[outcome.value] = mean(found)
        if comparison := cells.compare(arm, method, study.twin(method), outcome):
            comparisons[outcome.value] = comparison
    destroyed: dict[str, int] = {}
    for record in records:
        for scheme in record["destroyed"]:
            destroyed[scheme] = destroyed.get(scheme, 0) + 1
    failed = [f"seed {r['seed']}: {r['failed']}" for r in records if r["failed"]]
    return Row(arm, method, study.twin(method), means, comparisons, failed, destroyed, len(records))


def _verdicts(cells: _Cells) -> list[Verdict]:
    """All claims in all their arms, corrected together."""
    study, found, tested = cells.study, [], []
    for claim in study.claims:
        if claim.untestable:
            found.append(Verdict(claim, "", NOT_TESTABLE, claim.untestable))
            continue
        for arm in claim.arms or study.arms:
            comparison = cells.compare(arm, claim.method, claim.against, study.outcome(claim.outcome))
            if reason := _why_not(cells, claim, arm, comparison):
                found.append(Verdict(claim, arm, NOT_TESTABLE, reason, comparison))
            else:
                tested.append(len(found))
                found.append(Verdict(claim, arm, "", "", comparison))
    for index, p in zip(tested, holm([found[index].comparison.p for index in tested])):
        found[index] = _judged(found[index]._replace(adjusted=p))
    return found


def _why_not(cells: _Cells, claim: Claim, arm: str, comparison: Comparison | None) -> str:
    study = cells.study
    for method in (claim.method, claim.against):
        if any(claim.outcome.startswith(f"quantized.{s}") for r in cells.of(arm, method) for s in r["destroyed"]):
            return f"{method} is DESTROYED under the scheme"
    if comparison is None:
        return f"none of the {study.repetitions} has both numbers"
    if comparison.seeds < 3:
        return f"{comparison.seeds} {study.repetitions}; at least 3 are needed"
    for name, least in claim.needs.items():
        there = [r["values"][name] for r in cells.of(arm, claim.against) if r["values"].get(name) is not None]
        if not there or mean(there).value < least:
            title = study.outcome(name).title
            have = f"{mean(there).value:.3g}" if there else "none"
            return f"{claim.against} has {title} of {have}, below {least:g}: nothing to remove"
    return ""


def _judged(verdict: Verdict) -> Verdict:
    """Confirmed or contradicted needs both: a test that holds over all claims, and an effect above the noise floor."""
    comparison, p = verdict.comparison, verdict.adjusted
    as_claimed = (comparison.change < 0) == (verdict.claim.direction == "lower")
    if p >= ALPHA:
        return verdict._replace(word=WITHIN_NOISE, reason=f"p = {p:.2g} after correction")
    if comparison.effect is not None and abs(comparison.effect) < 1:
        return verdict._replace(word=WITHIN_NOISE, reason="an effect smaller than the noise floor")
    return verdict._replace(word=CONFIRMED if as_claimed else CONTRADICTED, reason=f"p = {p:.2g} after correction")


def as_json(found: Results) -> dict[str, Any]:
    """Results in plain types."""
    return {
        "done": found.done,
        "total": found.total,
        "tests": found.tests,
        "rows": [
            row._asdict()
            | {
                "means": {name: value._asdict() for name, value in row.means.items()},
                "comparisons": {name: value._asdict() for name, value in row.comparisons.items()},
            }
            for row in found.rows
        ],
        "verdicts": [
            {
                "claim": verdict.claim.text,
                "source": verdict.claim.source,
                "arm": verdict.arm,
                "verdict": verdict.word,
                "reason": verdict.reason,
                "comparison": verdict.comparison and verdict.comparison._asdict(),
                "adjusted_p": verdict.adjusted,
            }
            for verdict in found.verdicts
        ],
        "noise_floors": {f"{arm}: {outcome}": floor for (arm, outcome), floor in found.floors.items()},
    }
