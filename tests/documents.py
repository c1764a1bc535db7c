"""The pages of the documentation, and the snippets in them."""

import ast
import pathlib
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = pathlib.Path(__file__).parents[1]


class Snippet(NamedTuple):
    """A block of code of a page: its language, "" where none is said, and the line where it begins."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[pathlib.Path]:
    """README and its neighbours, and docs/."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def snippets() -> list[Snippet]:
    """Every block of code of every page, indented ones too, in order."""
    found = []
    for page in pages():
        blocks = [x for x in MarkdownIt().parse(page.read_text()) if x.type in ("fence", "code_block")]
        name = str(page.relative_to(ROOT))
        found += [Snippet(name, block.map[0] + 1, block.info, block.content) for block in blocks]
    return found


def config_headers() -> list[Snippet]:
    """The commands that the configs name in their first lines."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        name = str(path.relative_to(ROOT))
        blocks = [x for x in MarkdownIt().parse(text) if x.type == "code_block"]
        found += [Snippet(name, block.map[0] + 1, "bash", block.content) for block in blocks]
    return found
