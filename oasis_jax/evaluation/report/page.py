"""The report: one self-contained page, no request to anywhere."""

import pathlib
from collections.abc import Sequence

from oasis_jax.evaluation import DEFINITIONS
from oasis_jax.evaluation.bootstrap import DESCRIPTION, LEVEL
from oasis_jax.evaluation.report.comparison import (
    ABSENT,
    NOT_APPLICABLE,
    MeasuredRun,
    Row,
    best,
    cell,
    describe_data,
    groups,
    interval_text,
    method,
    not_comparable,
    rows,
)
from oasis_jax.evaluation.report.figures import Picture, save
from oasis_jax.evaluation.report.markup import chip, document, escaped, figure
from oasis_jax.evaluation.report.origins import origins, what_differs
from oasis_jax.evaluation.report.pictures import pictures
from oasis_jax.evaluation.report.sections import interventions, quantized, task_scores, token_views
from oasis_jax.evaluation.report.words import findings, summary


def write_report(runs: Sequence[MeasuredRun], folder: pathlib.Path) -> list[str]:
    """Writes folder/index.html and folder/figures/*.png and *.svg; returns in words what could not be made and is left
    out, as the page says, too.
    """
    problems, drawn = [], []
    failed = lambda name, error: problems.append(f"picture {name} is left out: {_reason(error)}")
    for picture in pictures(runs, failed):
        try:
            (folder / "figures").mkdir(exist_ok=True)
            save(picture, folder / "figures")
            drawn.append(_picture(picture, runs) if picture.on_page else "")
        except Exception as error:  # a plot library can say anything of the numbers of a broken model
            failed(picture.name, error)
    page = folder / "index.html"
    try:
        text = _page(runs, "".join(drawn), problems)
        page.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        problems.append(f"{page} could not be written: {_reason(error)}")
    return problems


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _name(run: MeasuredRun) -> str:
    """A label that may break after an underscore."""
    return escaped(run.label).replace("_", "_<wbr>")


def _page(runs: Sequence[MeasuredRun], drawn: str, problems: list[str]) -> str:
    """The page; what of it cannot be made is left out and added to `problems`."""
    names = (
        " and ".join([", ".join(run.label for run in runs[:-1]), runs[-1].label]) if len(runs) > 1 else runs[0].label
    )
    warning = not_comparable(runs)
    sections = {
        "words": lambda runs: "".join(_lead(group) for group in groups(runs)),
        "warning": lambda _: f'<p class="warn">{escaped(warning)}</p>' if warning else "",
        "what differs": what_differs,
        "table of measures": lambda runs: "".join(_table(group, runs) for group in groups(runs)),
        "pictures": lambda _: drawn,
        "text": token_views,
        "quantization": quantized,
        "tasks": task_scores,
        "interventions": interventions,
        "definitions": lambda _: _definitions(),
        "origins": origins,
    }
    made = {}
    for name, make in sections.items():
        try:
            made[name] = make(runs)
        except Exception as error:  # as of pictures: the others are worth having
            problems.append(f"the section '{name}' is left out: {_reason(error)}")
    warnings = "".join(f'<p class="warn">{escaped(problem)}</p>' for problem in problems)
    return document(names, f"<h1>{escaped(names)}</h1>{warnings}{''.join(made.values())}")


def _lead(group: Sequence[MeasuredRun]) -> str:
    points = "".join(f"<li><b>{escaped(topic)}.</b> {escaped(text)}</li>" for topic, text in findings(group).items())
    return f'<p class="lead">{escaped(summary(group))}</p>' + (f'<ul class="points">{points}</ul>' if points else "")


def _table(group: Sequence[MeasuredRun], runs: Sequence[MeasuredRun]) -> str:
    heads = ""
    for run in group:
        how = method(run.config)
        small = f"<small>{escaped(how).replace('_', '_<wbr>')}</small>" if how != run.label else ""
        heads += f"<th>{chip(runs.index(run))}&nbsp;{_name(run)}{small}</th>"
    body = []
    for row in rows(group):
        winners = best(row, group)
        cells = "".join(_cell(row, run, run.label in winners) for run in group)
        way = "↓" if row.direction == "lower" else ""
        body.append(f'<tr><td title="{escaped(row.name)}"><i>{way}</i>{escaped(row.title)}</td>{cells}</tr>')
    return (
        f'<section><h2>Measures</h2><p class="note">{escaped(describe_data(group))}. ↓: lower is better, the best '
        "value in bold; no arrow: neither "
        f"direction is better; {NOT_APPLICABLE}: does not apply to this model; {ABSENT}: not measured. Below a "
        f"value its {100 * LEVEL:.0f} % interval "
        f"({DESCRIPTION['method']}, {DESCRIPTION['draws']} draws, seed {DESCRIPTION['seed']}).</p>"
        f'<div class="scroll"><table><thead><tr><th><i></i>measure</th>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></section>\n"
    )


def _cell(row: Row, run: MeasuredRun, wins: bool) -> str:
    value = cell(row, run)
    title = f' title="{escaped(run.absent[row.name])}"' if row.name in run.absent else ""
    interval = interval_text(run.intervals.get(row.name))
    return (
        f"<td{title}>{f'<b>{value}</b>' if wins else value}"
        + (f"<small>{interval}</small>" if interval else "")
        + "</td>"
    )


def _picture(picture: Picture, runs: Sequence[MeasuredRun]) -> str:
    key = "".join(f"<span>{chip(index)} {escaped(label)}</span>" for label, index in picture.legend.items())
    if picture.scale:
        lowest, highest, unit = picture.scale
        key = (
            f'<span>{100 * lowest:.0f}</span><span class="bar"></span><span>{100 * highest:.0f} {escaped(unit)}</span>'
        )
    return figure(picture, key=key, chips={run.label: index for index, run in enumerate(runs)})


def _definitions() -> str:
    entries = "".join(
        f"<dt>{escaped(name)}</dt><dd>Reads {escaped(d['tensor'])}. Average: {escaped(d['average'])}. "
        f"{escaped(d['source'])}." + (f" Only for {escaped(d['applies_to'])}." if "applies_to" in d else "") + "</dd>"
        for name, d in DEFINITIONS.items()
    )
    return f"<section><details><summary>What each number is</summary><dl>{entries}</dl></details></section>\n"
