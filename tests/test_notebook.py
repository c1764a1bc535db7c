"""The notebook of the documentation runs in a kernel of its own, and is stored without outputs."""

import os

import nbformat
import pytest
from documents import ROOT
from nbclient import NotebookClient

PATH = ROOT / "docs" / "first_steps.ipynb"


def test_it_is_stored_without_outputs():
    cells = [cell for cell in nbformat.read(PATH, as_version=4).cells if cell.cell_type == "code"]
    assert len(cells) > 3 and not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of Jupyter's packages
def test_it_runs_and_shows_what_it_says(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])))
    monkeypatch.setenv("PYTHONWARNINGS", "error::DeprecationWarning:__main__")
    notebook = nbformat.read(PATH, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(PATH.parent)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert not [output for output in outputs if output.get("name") == "stderr"]
    losses = [[float(x) for x in line.split("loss ")[1].split(" -> ")] for line in said.splitlines() if "->" in line]
    assert len(losses) == 2 and all(last < 0.5 * first for first, last in losses)
    (null,) = [line for line in said.splitlines() if line.startswith("null_mass")]
    assert "softmax: None" in null and 0 < float(null.rsplit(maxsplit=1)[1]) < 1
    assert any("image/png" in output.get("data", {}) for output in outputs)
