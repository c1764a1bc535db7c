"""`make docs` ends where a link, anchor, picture or documented name leads nowhere, and shows the code's definitions."""

import shutil
import subprocess
import sys

import pytest
from documents import ROOT
from programs import on_devices

from oasis_jax.evaluation import DEFINITIONS

pytest.importorskip("myst_nb", reason="needs what `make docs` installs")
pytestmark = pytest.mark.slow
WRONG = {
    "[a](nowhere.md)": "cross-reference target not found: 'nowhere.md'",
    "[a](other.md#no-such-heading)": "local id not found in doc 'docs/other': 'no-such-heading'",
    "[a](../README.md#no-such-heading)": "local id not found in doc 'README': 'no-such-heading'",
    "![a](none.png)": "image file not readable: docs/none.png",
    "```{eval-rst}\n.. autofunction:: oasis_jax.no_such_name\n```": "no_such_name",
}


def build(folder, index: str) -> subprocess.CompletedProcess:
    """A site of an index and two more pages, as `make docs` builds it."""
    shutil.copytree(ROOT / "docs" / "_site", folder / "docs" / "_site")
    (folder / "README.md").write_text("# Read me\n")
    (folder / "docs" / "other.md").write_text("# Other\n\n## A heading\n\n```{measures}\n```\n")
    (folder / "docs" / "index.md").write_text(f"# Index\n\n{index}\n\n```{{toctree}}\nother\n../README\n```\n")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs/_site", ".", "build"]
    return subprocess.run(command, cwd=folder, env=on_devices(1), capture_output=True, text=True, timeout=600)


def test_what_leads_nowhere_ends_the_build(tmp_path):
    done = build(tmp_path, "\n\n".join(WRONG))
    assert done.returncode == 1
    for words in WRONG.values():
        assert words in done.stderr, done.stderr


def test_definitions_are_those_of_the_code(tmp_path):
    done = build(tmp_path, "[a](other.md#a-heading) [b](../README.md#read-me) `oasis_jax.Attention`")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "build" / "docs" / "other.html").read_text()
    assert all(f">{name}<" in page for name in DEFINITIONS)
    assert (tmp_path / "build" / "index.html").exists()
