"""The pictures of a report, each a row of small panels: as SVG for the page, one panel each, and as one PNG file.

The ink of an SVG is a CSS variable, so that the page's light and dark colours hold inside the pictures too.
"""

import dataclasses
import io
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

# One colour and marker a model, everywhere; told apart by most colour-blind readers too.
COLORS = ("#2f7fc1", "#e1812c", "#3a9a6b", "#a75fc2", "#c9473f", "#8c8a2e")
MARKERS = "os^Dv*"
HEAT = LinearSegmentedColormap.from_list("heat", ["#eef3f1", "#b5dcd0", "#5fb3ab", "#2b7f93", "#234f7d", "#241f4d"])

PANEL_WIDTH, FONT_SIZE = 4.1, 9.0  # inches, points
_CELLS_WITH_NUMBERS = 130
_WIDE = 30  # largest over smallest value of curves from which on they need a logarithmic axis


@dataclasses.dataclass(frozen=True)
class Ink:
    """Colours of everything that is not data."""

    text: str = "#1c2430"
    muted: str = "#5d6878"
    grid: str = "#d9dee5"
    paper: str = "#ffffff"


_CSS_INK = Ink("#010203", "#010204", "#010205", "#010206")
_CSS_NAMES = {"#010203": "var(--ink)", "#010204": "var(--muted)", "#010205": "var(--grid)", "#010206": "var(--card)"}

Draw = Callable[[Axes, Ink], None]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes; height in inches."""

    title: str
    height: float
    draw: Draw


@dataclasses.dataclass(frozen=True)
class Picture:
    """Panels that belong together.

    Attributes:
      name: of the PNG file.
      title, caption: what is shown, in which unit, and how to read it.
      panels: in order.
      scale: (lowest, highest, unit) of the colours all panels share; None for curves.
      legend: label -> index of its colour; empty for heat maps.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    scale: tuple[float, float, str] | None = None
    legend: Mapping[str, int] = dataclasses.field(default_factory=dict)


def color(index: int) -> str:
    """The colour of the model at this place."""
    return COLORS[index % len(COLORS)]


# Panels


def _plain(axes: Axes, ink: Ink, *, grid: bool) -> None:
    axes.set_facecolor("none")
    axes.tick_params(colors=ink.muted, labelsize=FONT_SIZE, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(grid and side == "bottom")
        spine.set_color(ink.grid)
    axes.xaxis.label.set(color=ink.muted, fontsize=FONT_SIZE)
    axes.yaxis.label.set(color=ink.muted, fontsize=FONT_SIZE)
    if grid:
        axes.grid(axis="y", color=ink.grid, linewidth=0.7)
        axes.set_axisbelow(True)


def heat_map(
    title: str,
    values: Sequence[Sequence[float | None]],
    top: float,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    across: str,
    down: str = "",
) -> Panel:
    """Percentages in cells, rows from the top; None leaves a cell empty."""
    table = np.array([[np.nan if v is None else 100 * v for v in row] for row in values])
    numbers, digits = table.size <= _CELLS_WITH_NUMBERS, 0 if top > 0.1 else 1

    def draw(axes: Axes, ink: Ink) -> None:
        norm = Normalize(0, 100 * top)
        axes.pcolormesh(np.ma.masked_invalid(table), cmap=HEAT, norm=norm, edgecolors=ink.paper, linewidth=1.5)
        for i, j in np.argwhere(~np.isnan(table)) if numbers else ():
            dark = norm(table[i, j]) > 0.56
            text = f"{table[i, j]:.{digits}f}"
            axes.text(
                j + 0.5,
                i + 0.5,
                text,
                ha="center",
                va="center",
                color="#ffffff" if dark else "#1c2430",
                fontsize=FONT_SIZE - (len(columns) > 8),
            )
        axes.invert_yaxis()
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.set_xlabel(across)
        axes.set_ylabel(down)
        if max(map(len, columns)) > 3:
            axes.tick_params(axis="x", labelrotation=35)
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        _plain(axes, ink, grid=False)

    longest = max(map(len, columns))
    return Panel(title, 0.75 + 0.29 * max(len(rows), 2) + (0.055 * longest if longest > 3 else 0), draw)


def strip_map(title: str, values: Sequence[Sequence[float]], top: float, *, rows: Sequence[str], across: str, down: str) -> Panel:
    """A heat map with many columns: an image, without numbers."""
    table = 100 * np.array(values)

    def draw(axes: Axes, ink: Ink) -> None:
        axes.imshow(table, cmap=HEAT, vmin=0, vmax=100 * top, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(rows)), rows)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel(across)
        axes.set_ylabel(down)
        _plain(axes, ink, grid=False)

    return Panel(title, 0.75 + 0.29 * max(len(rows), 2), draw)


def curves(
    title: str, lines: Mapping[int, tuple[Sequence[float], Sequence[float]]], *, across: str, along: str, marks: bool, linear: bool
) -> Panel:
    """Lines, by the index of their model: x and y of each. Unless `linear`, the y axis is logarithmic, and says so, where values differ widely."""
    values = np.concatenate([np.asarray(y, float) for _, y in lines.values()])
    logarithmic = not linear and np.nanmin(values) > 0 and np.nanmax(values) > _WIDE * np.nanmin(values)

    def draw(axes: Axes, ink: Ink) -> None:
        for index, (x, y) in lines.items():
            style = "-" if index < len(COLORS) else "--"
            marker = MARKERS[index % len(MARKERS)] if marks else None
            axes.plot(x, y, style, color=color(index), marker=marker, markersize=4.5, linewidth=1.7)
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(min(0.0, np.nanmin(values)), np.nanmax(values) * 1.07 or 1.0)
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel(across)
        axes.set_ylabel(along + (" (log scale)" if logarithmic else ""))
        _plain(axes, ink, grid=True)

    return Panel(title, 2.5, draw)


# Output


def svg(panel: Panel) -> str:
    """One panel as an <svg> element to stand inside a page; its title is left to the page."""
    figure = Figure(figsize=(PANEL_WIDTH, panel.height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    panel.draw(figure.add_subplot(), _CSS_INK)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "oasis_jax"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _for_page(text.getvalue())


def _for_page(text: str) -> str:
    """Without what only a file needs: prolog, namespaces, metadata, sizes; fonts and ink are the page's."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"| id="[a-z]+\w*_\d+"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    for ink, name in _CSS_NAMES.items():
        text = text.replace(ink, name)
    return re.sub(r"\n\s*", "\n", text)


def save_png(picture: Picture, folder: pathlib.Path) -> pathlib.Path:
    """Writes all panels of a picture, three a row at most, with title, legend and colour bar; returns the file."""
    ink = Ink()
    columns = min(len(picture.panels), 3 if len(picture.panels) != 4 else 2)
    lines = -(-len(picture.panels) // columns)
    height = max(panel.height for panel in picture.panels) + 0.35
    figure = Figure(figsize=(PANEL_WIDTH * columns + (0.6 if picture.scale else 0), height * lines + 0.55), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(picture.panels) :]:
        axes.remove()
    for axes, panel in zip(grid.flat, picture.panels):
        panel.draw(axes, ink)
        axes.set_title(panel.title, loc="left", fontsize=FONT_SIZE + 1, color=ink.text)
    figure.suptitle(picture.title, x=0.008, ha="left", fontsize=FONT_SIZE + 3, fontweight="bold", color=ink.text)
    if picture.scale:
        lowest, highest, unit = picture.scale
        scale = ScalarMappable(Normalize(100 * lowest, 100 * highest), HEAT)
        bar = figure.colorbar(scale, ax=list(grid.flat[: len(picture.panels)]), label=unit, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=FONT_SIZE, colors=ink.muted, length=0)
        bar.ax.yaxis.label.set(color=ink.muted, fontsize=FONT_SIZE)
    if picture.legend:
        handles = [
            Line2D([], [], color=color(i), marker=MARKERS[i % len(MARKERS)], markersize=4.5, linewidth=1.7, label=label)
            for label, i in picture.legend.items()
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=FONT_SIZE)
    path = folder / f"{picture.name}.png"
    figure.savefig(path)
    return path


def scale_css() -> str:
    """The colour scale as a CSS gradient."""
    stops = ", ".join(to_hex(HEAT(x)) for x in np.linspace(0, 1, 9))
    return f"linear-gradient(90deg, {stops})"
