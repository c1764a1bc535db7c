"""Panels of a report that show tokens one by one."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from oasis_jax.evaluation.report.figures import FONT_SIZE, HEAT, PANEL_WIDTH, Ink, Panel, plain


def token_map(title: str, table: np.ndarray, text: Sequence[str] | None) -> Panel:
    """A square of shares, query by key, in percent; the words of the tokens along both sides where there are any."""
    words = None if text is None else ["\u25af" if not word else word.replace("\n", "\u21b5")[:8] for word in text]

    def draw(axes: Axes, ink: Ink) -> None:
        shown = np.ma.masked_invalid(100 * table)
        axes.imshow(shown, cmap=HEAT, vmin=0, vmax=100, aspect="equal", interpolation="nearest")
        columns = list(range(0, len(table), 1 if words else 8))
        names = [words[i] if words else str(i) for i in columns]
        axes.set_yticks(columns, names)
        axes.set_xticks([*columns, table.shape[1] - 1], [*names, "null"])
        plain(axes, ink, grid=False)
        axes.tick_params(labelsize=FONT_SIZE - (4.5 if words else 1))
        axes.tick_params(axis="x", labelrotation=90)
        axes.set_xlabel("key")
        axes.set_ylabel("query")

    return Panel(title, PANEL_WIDTH, draw)


def token_grid(title: str, text: Sequence[str], values: Sequence[float], top: float, *, columns: int) -> Panel:
    """Tokens in reading order, a cell each; the colour is the value, the text what fits."""
    lines = -(-len(text) // columns)
    table = np.full(lines * columns, np.nan)
    table[: len(values)] = 100 * np.asarray(values, float)

    def draw(axes: Axes, ink: Ink) -> None:
        axes.imshow(
            np.ma.masked_invalid(table.reshape(lines, columns)), cmap=HEAT, vmin=0, vmax=100 * top, aspect="auto"
        )
        for i, token in enumerate(text):
            dark = table[i] > 56 * top
            axes.text(
                i % columns,
                i // columns,
                token[:4],
                ha="center",
                va="center",
                family="monospace",
                fontsize=FONT_SIZE - 2,
                color="#ffffff" if dark else "#1c2430",
            )
        axes.set_xticks([])
        axes.set_yticks([])
        plain(axes, ink, grid=False)

    return Panel(title, 0.35 + 0.2 * lines, draw)
