"""HTML that every page of this library is made of."""

import html
import pathlib
from collections.abc import Sequence

from oasis_jax.evaluation.report.figures import Picture, color, scale_css, svg

_STYLE = pathlib.Path(__file__).with_name("style.css").read_text(encoding="utf-8").replace("SCALE", scale_css())

# A page runs no script and asks for nothing, whatever is in it: a browser holds to that, should a name get through.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def escaped(value: object) -> str:
    """A value as text that is no markup."""
    return html.escape(str(value))


def chip(index: int) -> str:
    """A square of a model's colour."""
    return f'<span class="chip" style="background:{color(index)}"></span>'


def html_table(heads: Sequence[str], lines: Sequence[Sequence[str]], *, left: int) -> str:
    """A table of cells that are HTML already; the first `left` columns are words."""
    kind = [' class="left"' if i < left else "" for i in range(len(heads))]
    head = "".join(f"<th{c}>{name}</th>" for c, name in zip(kind, heads))
    body = "".join("<tr>" + "".join(f"<td{c}>{value}</td>" for c, value in zip(kind, line)) + "</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(picture: Picture, *, key: str = "", chips: dict[str, int] | None = None) -> str:
    """A picture with its caption.

    Args:
      key: HTML that says what colours mean.
      chips: of panels whose title is a model, the number of its colour.
    """
    chips = chips or {}
    panels = "".join(
        f'<div class="panel"><h3>{chip(chips[panel.title]) if panel.title in chips else ""}{escaped(panel.title)}</h3>'
        f"{svg(panel)}</div>"
        for panel in picture.panels
    )
    key = f'<div class="key">{key}</div>' if key else ""
    return (
        f"<section><figure><h2>{escaped(picture.title)}</h2><figcaption>{escaped(picture.caption)}</figcaption>"
        f'{key}<div class="panels">{panels}</div></figure></section>\n'
    )


def document(title: str, body: str) -> str:
    """A whole page in one file, which asks for nothing else."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><meta name="viewport" '
        'content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escaped(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n'
        f"{body}\n</main></body></html>\n"
    )
