"""The README's Python examples run as they stand, and its preset table is the code's."""

import pathlib
import re

import pytest

import pallas_kernels
from oasis_jax import PRESETS

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("source", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(source, capsys):
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})
    promised = [line.split("#", 1)[1].strip() for line in source.splitlines() if line.startswith("print(")]
    assert capsys.readouterr().out.splitlines() == promised


def test_every_preset_is_in_the_table():
    assert table("Presets") == list(PRESETS)


def test_every_backend_is_in_the_table():
    names = {*pallas_kernels.implementations("null_attention"), *pallas_kernels.implementations("depth_route")}
    assert sorted(table("Kernels")) == sorted(names)


def table(section: str) -> list[str]:
    """The first column of a section's table."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
