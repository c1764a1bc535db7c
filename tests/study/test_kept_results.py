"""What docs/results/ says is what its cells say."""

import pathlib
import shutil

import pytest

from oasis_jax.commands.study import load_study
from oasis_jax.study.design import Cell
from oasis_jax.study.kept import KEPT, kept_records
from oasis_jax.study.report import write_study_report

RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize("folder", sorted(path for path in RESULTS.glob("study_*")), ids=lambda p: p.name)
def test_tables_are_made_again_from_the_kept_numbers(folder, tmp_path):
    shutil.copy(folder / KEPT, tmp_path)
    write_study_report(load_study(folder.name), tmp_path)
    for name in (KEPT, "results.md"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize("folder", sorted(path for path in RESULTS.glob("study_*")), ids=lambda p: p.name)
def test_kept_cells_are_those_of_the_study_as_it_is(folder):
    """Otherwise nobody could go on from them."""
    study = load_study(folder.name)
    for record in kept_records(study, folder):
        assert record["identity"] == study.identity(Cell(record["arm"], record["method"], record["seed"]))
