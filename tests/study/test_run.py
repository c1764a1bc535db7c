"""Studies that run: equal starts, equal bits, kills, several processes."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from study.study_toys import toy_study

from oasis_jax.commands.study import load_study
from oasis_jax.config import MeshConfig
from oasis_jax.errors import Preempted, UserError
from oasis_jax.placement import make_mesh
from oasis_jax.study.cells import RESULT, START, check_all_alike, run_cell, start_of
from oasis_jax.study.design import Cell
from oasis_jax.study.kept import KEPT, kept_records
from oasis_jax.study.records import read_json, write_json
from oasis_jax.study.report import write_study_report
from oasis_jax.study.run import prepare, run_study
from oasis_jax.training.state import new_state


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A toy study that was run to its end."""
    out = tmp_path_factory.mktemp("study")
    run_study(toy_study, out)
    write_study_report(toy_study(), out)
    return out


def test_every_cell_is_trained_measured_and_reported(done):
    records = kept_records(toy_study(), done)
    assert [(r["method"], r["seed"]) for r in records] == [
        *(("softmax", 0), ("softmax1", 0)),
        *(("softmax", 1), ("softmax1", 1)),
    ]
    assert all(r["values"]["squared_error"] > 0 and r["failed"] is None for r in records)
    text = (done / "results.md").read_text()
    assert "2 seeds; at least 3 are needed" in text and "| softmax1 | softmax |" in text
    page = (done / "index.html").read_text()
    assert "<svg" in page and "It errs less" in page
    assert not re.search("https?:", page.replace("http://www.w3.org", ""))
    assert {path.suffix for path in (done / "figures").iterdir()} == {".png", ".svg"}


def test_seeds_differ_and_methods_of_one_seed_start_alike(done):
    starts = {
        (method, seed): json.loads((done / Cell("all", method, seed).path / START).read_text())["parameters"]
        for method in ("softmax", "softmax1")
        for seed in (0, 1)
    }
    assert starts["softmax", 0] == starts["softmax1", 0] != starts["softmax", 1]


def test_a_second_run_of_a_cell_is_equal_bit_for_bit(done, tmp_path):
    cell = Cell("all", "softmax1", 1)
    run_cell(toy_study(), cell, tmp_path)
    assert (tmp_path / cell.path / RESULT).read_bytes() == (done / cell.path / RESULT).read_bytes()


def test_a_report_is_made_again_from_what_is_kept(done, tmp_path):
    shutil.copy(done / KEPT, tmp_path)
    write_study_report(toy_study(), tmp_path)
    for name in (KEPT, "results.md", "results.json"):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes()


def test_what_is_kept_is_gone_on_from_and_never_lost(done, tmp_path):
    """On a machine that has the numbers alone, another seed is done; those that are there are not done twice."""
    shutil.copy(done / KEPT, tmp_path)
    more = functools.partial(toy_study, seeds=(0, 1, 2))
    run_study(more, tmp_path, methods=("softmax1",))
    write_study_report(more(), tmp_path)
    before, after = ((folder / KEPT).read_text().splitlines() for folder in (done, tmp_path))
    assert after[: len(before)] == before and len(after) == len(before) + 1
    assert not list(tmp_path.glob("cells/all/*/seed[01]/log.txt"))
    assert (tmp_path / "cells/all/softmax1/seed2/log.txt").exists()
    (tmp_path / "cells/all/softmax1/seed0" / RESULT).unlink()  # a cell that is taken away is done again
    run_study(toy_study, tmp_path, methods=("softmax1",))
    assert kept_records(toy_study(), tmp_path) == kept_records(toy_study(), done)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"identity": "0"}, "holds another study: the settings of cells/all/softmax/seed0 were others"),
        ({"arm": "../../away"}, "line 1: 'arm' is missing or not of its kind"),
        ({"seed": "0"}, "line 1: 'seed' is missing or not of its kind"),
        ({"start": {}}, "line 1: it does not say what the cell started from"),
        (None, "line 1: Expecting value"),
    ],
    ids=str,
)
def test_lines_that_are_not_of_this_study_are_refused(done, tmp_path, change, problem):
    first, *rest = (done / KEPT).read_text().splitlines()
    first = "cells" if change is None else json.dumps(json.loads(first) | change)
    (tmp_path / KEPT).write_text("\n".join([first, *rest]))
    with pytest.raises(UserError, match=problem):
        prepare(toy_study(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [KEPT]


def test_unequal_starts_end_the_study(done, tmp_path):
    cell = Cell("all", "softmax", 0)
    shutil.copytree(done / cell.path, tmp_path / cell.path)
    path = tmp_path / cell.path / RESULT
    record = read_json(path)
    name = next(name for name in record["start"]["parameters"] if name.endswith("mlp.up"))
    record["start"]["parameters"][name][-1] += 1
    write_json(path, record)
    with pytest.raises(UserError, match=r"unequal start: .*mlp\.up begins with other values"):
        run_cell(toy_study(), Cell("all", "softmax1", 0), tmp_path)
    assert not (tmp_path / "cells/all/softmax1/seed0" / RESULT).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["study_trigger", "study_backcopy"])
def test_methods_of_the_house_start_alike(name):
    """With the shapes they have: what every cell would write of its start."""
    study = load_study(name)
    arm, seed, mesh = next(iter(study.arms)), study.seeds[0], make_mesh(MeshConfig(), jax.devices()[:1])
    starts = []
    for method in study.methods:
        config = study.config(Cell(arm, method, seed))
        sizes = {"vector_dim": 18} if config.model.inputs == "vectors" else {"vocab_size": 257}
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes))
        start = start_of(config, new_state(config, mesh).params)
        starts.append(dict(arm=arm, method=method, seed=seed, start=start, corpus="same"))
    check_all_alike(starts, study.factors)
    shared = set.intersection(*({*record["start"]["parameters"]} for record in starts))
    assert len(shared) > 5


def test_another_study_does_not_go_on_in_this_folder(done, tmp_path):
    shutil.copy(done / "study.json", tmp_path)
    with pytest.raises(UserError, match="holds another study: the settings of cells/all/softmax/seed0 were others"):
        prepare(toy_study(arms={"all": ("data.batch_size=8",)}), tmp_path)
    prepare(toy_study(seeds=(0, 1, 2)), tmp_path)  # further seeds may follow


def test_time_that_is_up_saves_and_the_same_call_goes_on(done, tmp_path):
    with pytest.raises(Preempted, match=r"0 of 4 cells are done; .*told to end.*the same command"):
        run_study(toy_study, tmp_path, minutes=1e-4)
    with pytest.raises(UserError, match="no cell of the study is done"):
        write_study_report(toy_study(), tmp_path)


@pytest.mark.slow
def test_killed_at_any_point_and_started_again_the_report_is_the_same(done, tmp_path):
    """SIGKILL to the command and its workers, three times, at other moments each."""
    script = tmp_path / "toy.py"
    source = pathlib.Path(__file__).with_name("study_toys.py").read_text()
    script.write_text(source + "\n\ndef get_study():\n    return toy_study()\n")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "oasis_jax", "study", str(script), f"--out={out}", "--workers=2"]
    for seconds in (8, 14, 20):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    subprocess.run(command, check=True, timeout=600)
    for name in (KEPT, "results.md"):
        assert (out / name).read_bytes() == (done / name).read_bytes()


@pytest.mark.slow
def test_workers_share_the_cells_and_sigterm_ends_them_all(tmp_path):
    many = functools.partial(toy_study, seeds=tuple(range(40)))
    script = tmp_path / "toy.py"
    source = pathlib.Path(__file__).with_name("study_toys.py").read_text()
    script.write_text(source + "\n\ndef get_study():\n    return toy_study(seeds=tuple(range(40)))\n")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "oasis_jax", "study", str(script), f"--out={out}", "--workers=2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(out.glob(f"cells/*/*/*/{RESULT}"))) < 2:
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "the same command goes on" in said and "of 80 cells" in printed
    assert 2 <= len(kept_records(many(), out)) < 80
