"""Checkpoints of which a file, a list or an array is not what was written: named, set aside, passed over."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from saved_runs import MESH, equal, resume

from oasis_jax.errors import UserError
from oasis_jax.pretrained import load_pretrained
from oasis_jax.training import manifest
from oasis_jax.training.array_checksums import checksums
from oasis_jax.training.checkpoints import Checkpoints, Keep
from oasis_jax.training.description import describe
from oasis_jax.training.load import load_run


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


DAMAGE = [truncate, empty, pathlib.Path.unlink]


@pytest.mark.parametrize("harm", DAMAGE, ids=["truncated", "emptied", "deleted"])
def test_any_damaged_file_of_the_newest_falls_back_and_says_so(run, written, tmp_path, harm):
    """Every file of the newest checkpoint in turn, the list of them and the storage library's own included."""
    asked, _, _, states = run
    names = [path.relative_to(written) for path in (written / "checkpoints" / "9").rglob("*") if path.is_file()]
    assert {"params", "rest", "metadata", "files.json", "_CHECKPOINT_METADATA"} <= {name.parts[2] for name in names}
    for i, name in enumerate(sorted(names)):
        workdir, said = shutil.copytree(written, tmp_path / str(i)), []
        harm(workdir / name)
        resumed = resume(asked, workdir, said)
        assert equal(resumed.state, states[resumed.step])
        assert resumed.step == 6, name
        line, aside = said
        assert line.startswith("checkpoint 9 is not whole, step 6 is used instead: ")
        assert name.relative_to("checkpoints/9").as_posix() in line and line.endswith("; 3 steps lost")
        assert "\n" not in line
        assert aside == f"checkpoint 9 is set aside in {workdir / 'checkpoints_broken'}"
        assert resumed.data_state == {"next_index": 30}
        assert (workdir / "checkpoints_broken" / "9").is_dir()
        assert not (workdir / "checkpoints" / "9").exists()


@pytest.mark.parametrize("harm", ["added", "another step's", "no files", "a list", "an older list"])
def test_a_list_or_folder_of_something_else_is_damage(run, workdir, said, harm):
    folder = workdir / "checkpoints" / "9"
    listed = json.loads((folder / "files.json").read_text())
    if harm == "added":
        (folder / "rest" / "more").write_text("more")
    if harm == "another step's":
        shutil.rmtree(folder)
        shutil.copytree(workdir / "checkpoints" / "6", folder)
    if harm == "no files":
        (folder / "files.json").write_text(manifest._text({"step": 9, "sealed": True, "files": {}}))
    if harm == "a list":
        (folder / "files.json").write_text("[]")
    if harm == "an older list":  # of sizes alone, one of them another
        sizes = {name: size for name, (size, _) in listed["files"].items()}
        (folder / "files.json").write_text(json.dumps(sizes | {"params/_METADATA": 3}))
    assert resume(run[0], workdir, said).step == 6
    assert (workdir / "checkpoints_broken" / "9").is_dir()


def test_a_checkpoint_of_a_version_that_listed_sizes_only_is_used_and_called_unverified(run, workdir, said):
    path = workdir / "checkpoints" / "9" / "files.json"
    path.write_text(json.dumps({name: size for name, (size, _) in json.loads(path.read_text())["files"].items()}))
    assert resume(run[0], workdir, said).step == 9
    assert said == ["checkpoint 9 was written without checksums: its files are not verified"]


def test_of_a_thousand_flipped_bits_none_is_silent(written, tmp_path):
    """Over all files, by size and by number, so that small ones get their share."""
    folder = shutil.copytree(written / "checkpoints" / "9", tmp_path / "9")
    with manifest.Inspection(folder) as inspection:
        inspection.finish()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    random = np.random.default_rng(5)
    sizes = np.array([path.stat().st_size for path in files])
    chosen = [*random.choice(len(files), 500), *random.choice(len(files), 500, p=sizes / sizes.sum())]
    silent = []
    for place in chosen:
        path, bit = files[place], int(random.integers(8 * sizes[place]))
        content = path.read_bytes()
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            with manifest.Inspection(folder) as inspection:
                inspection.finish()
            silent.append((path.name, bit))
        except manifest.Damaged as damage:
            assert path.relative_to(folder).as_posix() in str(damage)
        path.write_bytes(content)
    assert silent == []


@pytest.mark.parametrize(
    "part", ["params/ocdbt.process_0/d", "rest/ocdbt.process_0/d", "metadata", "files.json", "params/_sharding"]
)
def test_a_flipped_bit_is_named_and_training_and_reading_take_the_checkpoint_before(run, workdir, said, capsys, part):
    place = workdir / "checkpoints" / "9" / part
    path = place if place.is_file() else max(place.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert load_run(workdir).step == 6
    assert load_pretrained(workdir).card["step"] == 6
    assert f"{path.name} has changed" in capsys.readouterr().err
    resumed = resume(run[0], workdir, said)
    assert resumed.step == 6 and equal(resumed.state, run[3][6])
    assert f"{path.name} has changed" in said[0]


def test_an_array_that_is_not_the_one_that_was_saved_is_damage(run, tmp_path, said, monkeypatch):
    """Files that are whole but hold something else: what only the checksums of arrays can see."""
    asked, config, corpus, states = run
    with Checkpoints(tmp_path, keep=Keep(2), say=said.append) as checkpoints:
        checkpoints.save(states[6], step=6, data_state={}, description=describe(config, corpus))
        other = jax.tree.map(lambda x: x, states[9].params)
        other["embedding"]["table"] = other["embedding"]["table"].at[3, 2].add(1e-6)
        wrong = checksums({"params": other, "rest": states[9]._replace(params=None)._asdict()})
        monkeypatch.setattr("oasis_jax.training.checkpoints.checksums", lambda tree: wrong)
        checkpoints.save(states[9], step=9, data_state={}, description=describe(config, corpus))
        checkpoints.wait()
        monkeypatch.undo()
        assert checkpoints.resume(asked, MESH).step == 6
    assert said[0].startswith("checkpoint 9 is not whole, step 6 is used instead: array params.embedding.table ")


def test_older_checkpoints_with_damaged_lists_do_not_stop_a_run_that_keeps_the_best(run, workdir, said):
    truncate(workdir / "checkpoints" / "6" / "_CHECKPOINT_METADATA")
    with Checkpoints(workdir, keep=Keep(2, best=1), say=said.append) as checkpoints:
        assert checkpoints.resume(run[0], MESH).step == 9
        assert checkpoints.steps() == [9]
    assert said[0].startswith("checkpoint 6 is not whole: _CHECKPOINT_METADATA has ")


def test_a_checkpoint_whose_run_was_killed_before_its_list_was_complete_is_whole(run, workdir, said):
    folder = workdir / "checkpoints" / "9"
    manifest.write(folder, 9, late=False)
    assert resume(run[0], workdir, said).step == 9
    assert said == []
    truncate(folder / "_CHECKPOINT_METADATA")  # which the resumed run has listed
    assert resume(run[0], workdir, said).step == 6


def test_damage_that_keeps_the_size_falls_back_too(run, workdir, said):
    path = workdir / "checkpoints" / "9" / "metadata" / "metadata"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert resume(run[0], workdir, said).step == 6


def test_the_place_of_a_broken_checkpoint_can_be_saved_to_again(run, workdir, said):
    asked, config, corpus, states = run
    for attempt in range(2):
        truncate(workdir / "checkpoints" / "9" / "rest" / "manifest.ocdbt")
        with Checkpoints(workdir, keep=Keep(2), say=said.append) as checkpoints:
            assert checkpoints.resume(asked, MESH).step == 6
            checkpoints.save(states[9], step=9, data_state={}, description=describe(config, corpus))
        assert len(list((workdir / "checkpoints_broken").iterdir())) == attempt + 1
    assert resume(asked, workdir, said).step == 9


def test_a_deleted_newest_checkpoint(run, workdir, said):
    shutil.rmtree(workdir / "checkpoints" / "9")
    assert resume(run[0], workdir, said).step == 6


def test_what_a_killed_save_leaves_is_cleared(run, workdir, said):
    shutil.copytree(workdir / "checkpoints" / "9", workdir / "checkpoints" / "12.orbax-checkpoint-tmp")
    assert resume(run[0], workdir, said).step == 9
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["6", "9"]


def test_no_whole_checkpoint(run, workdir, said):
    for step in ("6", "9"):
        truncate(workdir / "checkpoints" / step / "files.json")
    for attempt in (lambda: resume(run[0], workdir, said), lambda: load_run(workdir)):
        with pytest.raises(UserError, match=r"no whole checkpoint \(9: .*; 6: ") as error:
            attempt()
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["6", "9"]


def test_what_a_run_deletes_while_it_is_read_is_looked_for_again(run, workdir, written):
    for step in ("6", "9"):
        shutil.rmtree(workdir / "checkpoints" / step)
    folder = shutil.copytree(written / "checkpoints" / "6", workdir / "checkpoints" / "6")
    with Checkpoints(workdir, keep=None, say=print) as checkpoints:
        folder.rename(folder.with_name("12"))
        manifest.write(folder.with_name("12"), 12, late=True)
        assert checkpoints.first_whole(lambda step: step, checkpoints.steps()) == (12, [])


def test_load_run_falls_back(workdir, capsys):
    truncate(workdir / "checkpoints" / "9" / "params" / "manifest.ocdbt")
    assert load_run(workdir).step == 6
    assert capsys.readouterr().err.startswith(
        "checkpoint 9 is not whole, step 6 is used instead: params/manifest.ocdbt has "
    )
    assert (workdir / "checkpoints" / "9").is_dir()
    with pytest.raises(UserError, match=r"no whole checkpoint \(9: params/manifest.ocdbt has"):
        load_run(workdir, step=9)
