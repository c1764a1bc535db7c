"""The report of a study: results.json, results.md, index.html and figures, all made from the cells' records."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence

from oasis_jax.errors import UserError
from oasis_jax.evaluation.report.comparison import show
from oasis_jax.evaluation.report.figures import Picture, save
from oasis_jax.evaluation.report.markup import document, escaped, figure, html_table
from oasis_jax.study.design import Outcome, Study
from oasis_jax.study.kept import kept_records, write_kept
from oasis_jax.study.pictures import pictures
from oasis_jax.study.records import Record, write_json
from oasis_jax.study.results import NOT_TESTABLE, Comparison, Results, Row, Verdict, as_json, results
from oasis_jax.study.statistics import ALPHA, Mean


def write_study_report(study: Study, out: pathlib.Path) -> Results:
    """Writes the report from what is there; a study that is not done says so on its page.

    Raises:
      UserError: no cell is done yet, cells that did not start alike, a folder that cannot be written.
    """
    records = kept_records(study, out)
    if not records:
        raise UserError(f"--out: no cell of the study is done in {str(out)!r}")
    found = results(study, records)
    drawn = pictures(study, found, records)
    try:
        write_kept(records, out)
        (out / "results.md").write_text(markdown(study, found, records), encoding="utf-8")
        (out / "index.html").write_text(page(study, found, records, drawn), encoding="utf-8")
        (out / "figures").mkdir(exist_ok=True)
        for picture in drawn:
            save(picture, out / "figures")
    except OSError as error:
        raise UserError(f"--out: cannot write to {str(out)!r}: {error.strerror}") from None
    write_json(out / "results.json", as_json(found))
    return found


# Words


def _interval(interval: tuple[float, float] | None, percent: bool = False) -> str:
    if interval is None:
        return ""
    shown = [f"{100 * x:+.1f}" if percent else show(x) for x in interval]
    return f"[{shown[0]}, {shown[1]}]"


def change_text(comparison: Comparison | None, outcome: Outcome) -> str:
    """'-9.3 % [-12.0, -6.1]', or the difference of an outcome that is compared by differences."""
    if comparison is None:
        return ""
    if outcome.relative:
        return f"{100 * comparison.change:+.1f} % {_interval(comparison.interval, percent=True)}".strip()
    return f"{comparison.change:+.3g} {_interval(comparison.interval)}".strip()


def effect_text(comparison: Comparison | None) -> str:
    """'-2.1 floors'; '' where there is no floor."""
    return "" if comparison is None or comparison.effect is None else f"{comparison.effect:+.1f}"


def mean_text(value: Mean | None) -> str:
    """'1.234 [1.1, 1.4]'"""
    return "" if value is None else f"{show(value.value)} {_interval(value.interval)}".strip()


def _what_was_done(study: Study) -> str:
    if source := study.source:
        return (
            f"{len(study.methods)} forms of one model, nothing trained, each on the same {len(study.seeds)} of "
            f"{source.parts} parts of a text, {source.sequences} sequences of {source.length} tokens a part."
        )
    return (
        f"{len(study.methods)} methods, {len(study.arms)} arms, {len(study.seeds)} seeds. Within an arm and a "
        "seed all runs start from equal weights (wherever shapes agree) and read equal data in equal order; this was "
        "checked by checksums."
    )


def _lead(study: Study, found: Results) -> list[str]:
    """What was done, and how to read it."""
    seeds = max(row.seeds for row in found.rows)
    part = "" if found.done == found.total else f" **{found.done} of {found.total} cells are done: this is partial.**"
    lines = [
        f"{_what_was_done(study)}{part} Means over {study.repetitions} with 95 % intervals by Student's t.",
        f"The noise floor of a number is its standard deviation over {study.repetitions} of {study.baseline} in the "
        "same arm (of its logarithm where methods are compared by ratios); effects are multiples of it.",
    ]
    if found.tests:
        lines.append(
            f"{found.tests} claims were tested together (paired t tests by {study.repetitions}, Holm's correction, "
            f"level {ALPHA:.2g}). With {seeds} {study.repetitions} the strictest of them finds, with a chance of 80 %, "
            f"an effect of {found.detectable:.1f} standard deviations of the paired differences. Confirmed and "
            "contradicted ask for both: a corrected p below the level, and an effect of at least one noise floor."
        )
    return lines


def _verdict_cells(study: Study, verdict: Verdict) -> list[str]:
    comparison = verdict.comparison
    outcome = study.outcome(verdict.claim.outcome) if comparison else None
    return [
        verdict.claim.text,
        verdict.claim.source,
        verdict.arm,
        change_text(comparison, outcome) if outcome else "",
        effect_text(comparison),
        verdict.word,
        verdict.reason,
    ]


_VERDICT_HEADS = ("claim", "source", "arm", "measured", "effect (floors)", "verdict", "why")


def _row_cells(study: Study, row: Row) -> list[str]:
    cells = []
    for outcome in study.outcomes:
        comparison = row.comparisons.get(outcome.value)
        change = change_text(comparison, outcome)
        effect = f" ({effect_text(comparison)} floors)" if effect_text(comparison) else ""
        cells.append("; ".join(filter(None, [mean_text(row.means.get(outcome.value)), f"{change}{effect}"])))
    return cells


def _notes(row: Row) -> str:
    notes = [f"{len(row.failed)} of {row.seeds} diverged"] if row.failed else []
    notes += [f"DESTROYED by {scheme} in {count} of {row.seeds}" for scheme, count in row.destroyed.items()]
    return ", ".join(notes)


def _arm_rows(found: Results) -> Mapping[str, list[Row]]:
    arms: dict[str, list[Row]] = {}
    for row in found.rows:
        arms.setdefault(row.arm, []).append(row)
    return arms


def _origin(study: Study, records: Sequence[Record]) -> str:
    versions: dict[str, dict] = {}  # name -> those of all cells, as a set that keeps its order
    for record in records:
        for name, value in (record["versions"] or {}).items():
            versions.setdefault(name, {})[value] = None
    steps = {record["start"]["steps"] for record in records}
    trained = "" if study.source else f"{', '.join(map(str, sorted(steps)))} steps a cell; "
    return trained + ", ".join(f"{name} {' and '.join(map(str, values))}" for name, values in versions.items())


# Markdown


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(study: Study, found: Results, records: Sequence[Record]) -> str:
    """All tables as Markdown."""
    parts = [f"# {study.title}", *_lead(study, found), _origin(study, records)]
    if found.verdicts:
        parts += ["## Claims", _table(_VERDICT_HEADS, [_verdict_cells(study, v) for v in found.verdicts])]
    for arm, rows in _arm_rows(found).items():
        parts.append(f"## Arm {arm}")
        if study.arms[arm]:
            parts.append("`" + " ".join(study.arms[arm]) + "`")
        heads = ["method", "beside", *(outcome.title for outcome in study.outcomes), "notes"]
        parts.append(_table(heads, [[r.method, r.twin, *_row_cells(study, r), _notes(r)] for r in rows]))
    parts += ["## Methods", _table(("method", "sets"), [[name, study.words(name)] for name in study.methods])]
    return "\n\n".join(parts) + "\n"


# The page


def _words(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return html_table(heads, [[escaped(cell) for cell in row] for row in rows], left=len(heads))


def page(study: Study, found: Results, records: Sequence[Record], drawn: Sequence[Picture]) -> str:
    """One self-contained page."""
    lead = "".join(f"<p class='lead'>{escaped(line.replace('**', ''))}</p>" for line in _lead(study, found))
    answered = [verdict for verdict in found.verdicts if verdict.word != NOT_TESTABLE]
    rest = [verdict for verdict in found.verdicts if verdict.word == NOT_TESTABLE]
    claims = [_verdict_cells(study, verdict) for verdict in [*answered, *rest]]
    tables = ""
    for arm, rows in _arm_rows(found).items():
        heads = ["method", "beside", *(outcome.title for outcome in study.outcomes), "notes"]
        cells = [[row.method, row.twin, *_row_cells(study, row), _notes(row)] for row in rows]
        sets = f'<p class="note">{escaped(" ".join(study.arms[arm]))}</p>' if study.arms[arm] else ""
        tables += f"<section><h2>Arm {escaped(arm)}</h2>{sets}{_words(heads, cells)}</section>\n"
    methods = _words(("method", "sets"), [[name, study.words(name)] for name in study.methods])
    return document(
        study.title,
        f"<h1>{escaped(study.title)}</h1>{lead}"
        + (f"<section><h2>Claims</h2>{_words(_VERDICT_HEADS, claims)}</section>\n" if claims else "")
        + "".join(map(figure, drawn))
        + tables
        + f'<section><h2>Methods</h2>{methods}<p class="note">{escaped(_origin(study, records))}</p></section>',
    )
