"""The Python examples of README and of pages whose examples stand alone run as they are, and its preset table is the code's."""

import pathlib
import re

import pytest

import pallas_kernels
from oasis_jax import PRESETS

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = README + "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("modules", "quantization"))
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGES, re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("source", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(source, capsys):
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})
    promised = [line.split("#", 1)[1].strip() for line in source.splitlines() if line.startswith("print(")]
    assert capsys.readouterr().out.splitlines() == promised


def test_every_preset_is_in_the_table():
    assert table(README.split("\n## Presets\n")[1].split("\n## ")[0]) == list(PRESETS)


def test_every_backend_is_in_the_table():
    names = {*pallas_kernels.implementations("null_attention"), *pallas_kernels.implementations("depth_route")}
    assert sorted(table((ROOT / "docs" / "kernels.md").read_text().split("\n## ")[0])) == sorted(names)


def test_the_readme_is_read_in_one_go():
    assert len(README.splitlines()) < 200


def pages() -> list[pathlib.Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [x for x in targets if not x.startswith("http") and not (page.parent / x).exists()]
    assert not missing


def test_the_tables_that_contributors_are_sent_to_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| [\w ]+ \| (.*?) \|", text, re.MULTILINE)[1:]
    assert len(rows) > 8
    for row in rows:
        *names, path = re.findall(r"`([^`]+)`", row.split(" or `depth_route/`")[0])
        found = ROOT / path
        files = [found] if found.is_file() else list(found.glob("*.py"))
        assert files and all(any(name in file.read_text() for file in files) for name in names), row


def table(text: str) -> list[str]:
    """The first column of a table."""
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
