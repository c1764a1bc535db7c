"""Rows of text as aligned columns, the last one wrapped: what fits a terminal and a pipe alike."""

import shutil
import textwrap
from collections.abc import Sequence


def terminal_width() -> int:
    """Columns of the terminal, between 100 and 160."""
    return min(max(shutil.get_terminal_size().columns, 100), 160)


def aligned(rows: Sequence[Sequence[str]], width: int, right: Sequence[int] = ()) -> str:
    """The rows below each other.

    Args:
      rows: cells, equally many in each row; the last of each is wrapped.
      width: columns to wrap at.
      right: columns whose cells end at the same place, as numbers do.
    """
    sizes = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        *cells, text = (x.rjust(n) if i in right else x.ljust(n) for i, (x, n) in enumerate(zip(row, sizes)))
        start = "".join(f"  {cell}" for cell in cells) + "  "
        if len(start + text) <= width:
            lines.append((start + text).rstrip())
            continue
        lines += textwrap.wrap(
            text,
            width,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_on_hyphens=False,
            break_long_words=False,
        )
    return "\n".join(lines)
