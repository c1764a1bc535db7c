"""The report: one self-contained page, no request to anywhere."""

import html
import pathlib
from collections.abc import Sequence

from oasis_jax.evaluation import DEFINITIONS
from oasis_jax.evaluation.bootstrap import DESCRIPTION, LEVEL
from oasis_jax.evaluation.comparison import (
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
from oasis_jax.evaluation.figures import Picture, color, save, scale_css, svg
from oasis_jax.evaluation.pictures import pictures
from oasis_jax.evaluation.sections import interventions, quantized, token_views
from oasis_jax.evaluation.words import findings, summary

_CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1c2430; --muted: #5d6878; --grid: #d9dee5; --accent: #1f6f8b;
  --font: system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2029; --ink: #e8ecf2; --muted: #9aa6b6; --grid: #333d4b; --accent: #6fc3d8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--font); }
main { max-width: 1240px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; text-wrap: balance; }
h1, h3, p, li, dt, dd, .key { overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .2rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .3rem; display: flex; align-items: center; gap: .45rem; }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 1.15rem 1.25rem 1.25rem; margin-top: 1.1rem; }
.lead { font-size: 1.05rem; max-width: 76ch; margin: .9rem 0 0; }
.points { max-width: 80ch; margin: .7rem 0 0; padding-left: 1.1rem; } .points li { margin: .25rem 0; }
.warn { border-left: 4px solid #d08a1d; padding-left: .8rem; max-width: 76ch; }
.note, figcaption { color: var(--muted); font-size: .9rem; max-width: 90ch; margin: 0 0 .8rem; }
.chip { width: .75em; height: .75em; border-radius: 3px; display: inline-block; flex: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .34rem 0 .34rem 1.3rem; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: baseline; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); padding-left: 1.1em; text-indent: -1.1em; min-width: 9rem; }
thead th { font-weight: 600; vertical-align: bottom; } small { display: block; font-weight: 400; color: var(--muted); }
th i, td i { display: inline-block; width: 1.1em; font-style: normal; color: var(--muted); text-indent: 0; } td b { color: var(--accent); }
tbody tr:last-child > * { border-bottom: 0; }
figure { margin: 0; } .panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 310px), 1fr)); gap: 1.1rem 1.4rem; }
.panel { max-width: 460px; } .panel svg { display: block; width: 100%; height: auto; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; margin: 0 0 .8rem; align-items: center; }
.key span { display: inline-flex; align-items: center; gap: .4rem; } .bar { width: min(9rem, 30vw); height: .75rem; border-radius: 3px; background: SCALE; }
.text { font: .84rem/1.75 ui-monospace, 'DejaVu Sans Mono', monospace; white-space: pre-wrap; overflow-wrap: anywhere; max-width: 92ch; margin: 0 0 .9rem; }
.text i { font-style: normal; border-radius: 2px; padding: .12em 0; color: #1c2430; } .text i.d { color: #ffffff; }
td small, td.small { font-size: .76rem; white-space: nowrap; } td.left, th.left { text-align: left; }
summary { cursor: pointer; font-weight: 600; } dl { font-size: .9rem; margin: .8rem 0 0; } dt { font-weight: 600; margin-top: .6rem; font-family: ui-monospace, monospace; }
dd { margin: 0; color: var(--muted); max-width: 95ch; }
@media (max-width: 600px) { td small { white-space: normal; } main { padding: 1.2rem .7rem 3rem; } section { padding: .95rem .85rem 1rem; } h1 { font-size: 1.4rem; } table { font-size: .82rem; }
  th, td { padding-left: .6rem; } th:first-child, td:first-child { min-width: 6.6rem; padding-left: 1.1em; } thead small { font-size: .7rem; } }
"""


def write_report(runs: Sequence[MeasuredRun], folder: pathlib.Path) -> pathlib.Path:
    """Writes folder/index.html and folder/figures/*.png and *.svg, and returns the page's path."""
    found = pictures(runs)
    (folder / "figures").mkdir(exist_ok=True)
    for picture in found:
        save(picture, folder / "figures")
    page = folder / "index.html"
    page.write_text(_page(runs, found), encoding="utf-8")
    return page


def _text(value: object) -> str:
    return html.escape(str(value))


def _name(run: MeasuredRun) -> str:
    """A label that may break after an underscore."""
    return _text(run.label).replace("_", "_<wbr>")


def _chip(index: int) -> str:
    return f'<span class="chip" style="background:{color(index)}"></span>'


def _page(runs: Sequence[MeasuredRun], found: Sequence[Picture]) -> str:
    names = " and ".join([", ".join(run.label for run in runs[:-1]), runs[-1].label]) if len(runs) > 1 else runs[0].label
    warning = not_comparable(runs)
    leads = "".join(_lead(group) for group in groups(runs))
    tables = "".join(_table(group, runs) for group in groups(runs))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{_text(names)}</title><style>{_CSS.replace("SCALE", scale_css())}</style></head>\n<body><main>\n'
        f"<h1>{_text(names)}</h1>{leads}"
        + (f'<p class="warn">{_text(warning)}</p>' if warning else "")
        + tables
        + "".join(_picture(picture, runs) for picture in found if picture.on_page)
        + token_views(runs)
        + quantized(runs)
        + interventions(runs)
        + _definitions()
        + _origins(runs)
        + "\n</main></body></html>\n"
    )


def _lead(group: Sequence[MeasuredRun]) -> str:
    points = "".join(f"<li><b>{_text(topic)}.</b> {_text(text)}</li>" for topic, text in findings(group).items())
    return f'<p class="lead">{_text(summary(group))}</p>' + (f'<ul class="points">{points}</ul>' if points else "")


def _table(group: Sequence[MeasuredRun], runs: Sequence[MeasuredRun]) -> str:
    heads = ""
    for run in group:
        how = method(run.config)
        small = f"<small>{_text(how).replace('_', '_<wbr>')}</small>" if how != run.label else ""
        heads += f"<th>{_chip(runs.index(run))}&nbsp;{_name(run)}{small}</th>"
    body = []
    for row in rows(group):
        winners = best(row, group)
        cells = "".join(_cell(row, run, run.label in winners) for run in group)
        way = "↓" if row.direction == "lower" else ""
        body.append(f'<tr><td title="{_text(row.name)}"><i>{way}</i>{_text(row.title)}</td>{cells}</tr>')
    return (
        f'<section><h2>Measures</h2><p class="note">{_text(describe_data(group))}. ↓: lower is better, the best value in bold; no arrow: neither '
        f"direction is better; {NOT_APPLICABLE}: does not apply to this model; {ABSENT}: not measured. Below a value its {100 * LEVEL:.0f} % interval "
        f"({DESCRIPTION['method']}, {DESCRIPTION['draws']} draws, seed {DESCRIPTION['seed']}).</p>"
        f'<div class="scroll"><table><thead><tr><th><i></i>measure</th>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div></section>\n'
    )


def _cell(row: Row, run: MeasuredRun, wins: bool) -> str:
    value = cell(row, run)
    title = f' title="{_text(run.absent[row.name])}"' if row.name in run.absent else ""
    interval = interval_text(run.intervals.get(row.name))
    return f"<td{title}>{f'<b>{value}</b>' if wins else value}" + (f"<small>{interval}</small>" if interval else "") + "</td>"


def _picture(picture: Picture, runs: Sequence[MeasuredRun]) -> str:
    key = "".join(f"<span>{_chip(index)} {_text(label)}</span>" for label, index in picture.legend.items())
    if picture.scale:
        lowest, highest, unit = picture.scale
        key = f'<span>{100 * lowest:.0f}</span><span class="bar"></span><span>{100 * highest:.0f} {_text(unit)}</span>'
    labels = {run.label: index for index, run in enumerate(runs)}
    panels = "".join(
        f'<div class="panel"><h3>{_chip(labels[panel.title]) if panel.title in labels else ""}{_text(panel.title)}</h3>{svg(panel)}</div>'
        for panel in picture.panels
    )
    return (
        f"<section><figure><h2>{_text(picture.title)}</h2><figcaption>{_text(picture.caption)}</figcaption>"
        f'<div class="key">{key}</div><div class="panels">{panels}</div></figure></section>\n'
    )


def _definitions() -> str:
    entries = "".join(
        f"<dt>{_text(name)}</dt><dd>Reads {_text(d['tensor'])}. Average: {_text(d['average'])}. {_text(d['source'])}."
        + (f" Only for {_text(d['applies_to'])}." if "applies_to" in d else "")
        + "</dd>"
        for name, d in DEFINITIONS.items()
    )
    return f"<section><details><summary>What each number is</summary><dl>{entries}</dl></details></section>\n"


def _origins(runs: Sequence[MeasuredRun]) -> str:
    entries = "".join(
        f"<dt>{_text(run.label)}</dt><dd>{_text(run.workdir)}, step {run.step}; preset {_text(method(run.config))}, {run.config.model.num_layers} layers, "
        f"width {run.config.model.width}; corpus {_text(run.corpus['name'])}, sha256 {_text(run.corpus['sha256'][:12])}; "
        f"read {run.samples['sequences']} sequences, {run.samples['positions']} positions; "
        f"{_text(', '.join(f'{name} {version}' for name, version in run.versions.items()))}.</dd>"
        for run in runs
    )
    return f"<section><details><summary>Where the runs come from</summary><dl>{entries}</dl></details></section>\n"
