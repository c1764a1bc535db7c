"""The pictures of a report, each a row of small panels: as SVG for the page, one panel each, and as one PNG
and one SVG file.

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
      name: of the files.
      title, caption: what is shown, in which unit, and how to read it.
      panels: in order.
      scale: (lowest, highest, unit) of the colours all panels share; None for curves.
      legend: label -> index of its colour; empty for heat maps.
      on_page: whether the page shows the panels; the page shows text in a form of its own.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    scale: tuple[float, float, str] | None = None
    legend: Mapping[str, int] = dataclasses.field(default_factory=dict)
    on_page: bool = True


def color(index: int) -> str:
    """The colour of the model at this place."""
    return COLORS[index % len(COLORS)]


# Panels


def plain(axes: Axes, ink: Ink, *, grid: bool) -> None:
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
        plain(axes, ink, grid=False)

    longest = max(map(len, columns))
    return Panel(title, 0.75 + 0.29 * max(len(rows), 2) + (0.055 * longest if longest > 3 else 0), draw)


def strip_map(
    title: str, values: Sequence[Sequence[float]], top: float, *, rows: Sequence[str], across: str, down: str
) -> Panel:
    """A heat map with many columns: an image, without numbers."""
    table = 100 * np.array(values)

    def draw(axes: Axes, ink: Ink) -> None:
        axes.imshow(table, cmap=HEAT, vmin=0, vmax=100 * top, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(rows)), rows)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel(across)
        axes.set_ylabel(down)
        plain(axes, ink, grid=False)

    return Panel(title, 0.75 + 0.29 * max(len(rows), 2), draw)


def curves(
    title: str,
    lines: Mapping[int, tuple[Sequence[float], Sequence[float]]],
    *,
    across: str,
    along: str,
    marks: bool,
    linear: bool,
) -> Panel:
    """Lines, by the index of their model: x and y of each. Unless `linear`, the y axis is logarithmic, and says so,
    where values differ widely.
    """
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
        plain(axes, ink, grid=True)

    return Panel(title, 2.5, draw)


def histograms(title: str, shares: Mapping[int, Sequence[float]], edges: Sequence[float], *, across: str) -> Panel:
    """Outlines of histograms over bins of equal width in the logarithm, by the index of their model; both axes
    logarithmic.
    """

    def draw(axes: Axes, ink: Ink) -> None:
        for index, values in shares.items():
            heights = 100 * np.where(np.asarray(values, float) > 0, values, np.nan)
            axes.stairs(
                heights,
                edges,
                color=color(index),
                linewidth=1.6,
                linestyle="-" if index < len(COLORS) else "--",
                baseline=None,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(across)
        axes.set_ylabel("% of values (log scale)")
        plain(axes, ink, grid=True)

    return Panel(title, 2.6, draw)


Bar = tuple[float, float | None, float | None]  # value, and the ends of its interval


def bars(
    title: str,
    values: Mapping[int, Sequence[Bar | None]],
    names: Sequence[str],
    *,
    across: str,
    form: Callable[[float], str],
) -> Panel:
    """Horizontal bars, a group a name, by the index of their model; None leaves a gap, and says that there is
    nothing.
    """
    sizes = np.abs([bar[0] for group in values.values() for bar in group if bar is not None])
    logarithmic = len(sizes) > 0 and sizes.max() > _WIDE * np.median(sizes) > 0
    ends = [end for group in values.values() for bar in group if bar for end in bar if end is not None]

    def draw(axes: Axes, ink: Ink) -> None:
        thick = 0.8 / len(values)
        for place, (index, group) in enumerate(values.items()):
            for row, bar in enumerate(group):
                y = row - 0.4 + (place + 0.5) * thick
                if bar is None:
                    axes.annotate(
                        "not finite",
                        (0, y),
                        (4, 0),
                        textcoords="offset points",
                        va="center",
                        color=ink.muted,
                        fontsize=FONT_SIZE - 1,
                    )
                    continue
                value, low, high = bar
                axes.barh(y, value, height=0.86 * thick, color=color(index))
                if low is not None:
                    axes.plot([low, high], [y, y], color=ink.text, linewidth=1.1)
                at = max(0.0, *(end for end in bar if end is not None))
                axes.annotate(
                    form(value),
                    (at, y),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    color=ink.text,
                    fontsize=FONT_SIZE - 1,
                )
        axes.axvline(0, color=ink.muted, linewidth=0.8)
        if logarithmic:
            axes.set_xscale("symlog", linthresh=float(np.median(sizes)))
        reach = max([*ends, 0.0]), min([*ends, 0.0])
        room = (reach[0] - reach[1]) or 1.0
        axes.set_xlim(reach[1] - 0.04 * room, reach[0] * 4 if logarithmic else reach[0] + 0.3 * room)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.45, -0.55)
        axes.xaxis.set_major_locator(axes.xaxis.get_major_locator() if logarithmic else MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(across + (" (logarithmic beyond the median)" if logarithmic else ""))
        plain(axes, ink, grid=False)

    return Panel(title, 0.75 + len(names) * max(0.3, 0.17 * len(values) + 0.08), draw)


# Output


@matplotlib.rc_context({"text.parse_math": False})  # labels and tokens are text, whatever they hold
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


@matplotlib.rc_context({"text.parse_math": False})
def save(picture: Picture, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes all panels of a picture, three a row at most, with title, legend and colour bar; returns the PNG
    and the SVG file.
    """
    figure = _figure(picture)
    png, vector = folder / f"{picture.name}.png", folder / f"{picture.name}.svg"
    FigureCanvasAgg(figure)
    figure.savefig(png)
    FigureCanvasSVG(figure)
    with matplotlib.rc_context({"svg.hashsalt": "oasis_jax"}):  # so that equal numbers make equal files
        figure.savefig(vector, metadata={"Date": None})
    return png, vector


def _figure(picture: Picture) -> Figure:
    ink = Ink()
    columns = min(len(picture.panels), 3 if len(picture.panels) != 4 else 2)
    lines = -(-len(picture.panels) // columns)
    height = max(panel.height for panel in picture.panels) + 0.35
    figure = Figure(
        figsize=(PANEL_WIDTH * columns + (0.6 if picture.scale else 0), height * lines + 0.55),
        layout="constrained",
        dpi=150,
    )
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
    return figure


def scale_css() -> str:
    """The colour scale as a CSS gradient."""
    stops = ", ".join(to_hex(HEAT(x)) for x in np.linspace(0, 1, 9))
    return f"linear-gradient(90deg, {stops})"
