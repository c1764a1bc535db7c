"""README's tables are the code's, and links of all pages lead somewhere; snippets are in test_snippets.py."""

import pathlib
import re

import pytest
from documents import pages

import pallas_kernels
from oasis_jax import PRESETS

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_preset_is_in_the_table():
    assert table(README.split("\n## Presets\n")[1].split("\n## ")[0]) == list(PRESETS)


def test_every_backend_is_in_the_table():
    names = {*pallas_kernels.implementations("null_attention"), *pallas_kernels.implementations("depth_route")}
    assert sorted(table((ROOT / "docs" / "kernels.md").read_text().split("\n## ")[0])) == sorted(names)


def test_the_readme_is_read_in_one_go():
    assert len(README.splitlines()) < 200


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
