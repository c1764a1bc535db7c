"""Checkpoints that someone else has made up: what is no file of theirs is damage, and nothing behind it is opened."""

import json
import os
import pathlib
import shutil
import socket

import pytest
from saved_runs import resume

from oasis_jax.errors import UserError
from oasis_jax.training import manifest
from oasis_jax.training.load import load_run


def fifo(path: pathlib.Path) -> None:
    os.mkfifo(path)


def device(path: pathlib.Path) -> None:
    path.symlink_to("/dev/zero")


def link(path: pathlib.Path) -> None:
    path.symlink_to(shutil.move(path.with_name(f"{path.name}.old"), path.parents[3] / "moved"))


def bound(path: pathlib.Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("harm, kind", [(fifo, "FIFO"), (device, "link"), (link, "link"), (bound, "socket")])
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "beside"])
def test_what_is_no_file_is_damage(workdir, capsys, harm, kind, listed):
    """Instead of a file, or as one more; a list that fits would be no help."""
    path = workdir / "checkpoints" / "9" / "metadata" / ("metadata" if listed else "more")
    if listed:
        path.rename(path.with_name("metadata.old"))
    else:
        path.with_name("more.old").write_text("")
    harm(path)
    path.with_name(f"{path.name}.old").unlink(missing_ok=True)
    assert load_run(workdir).step == 6
    assert f"{path.parent.name}/{path.name} is no file but a {kind}" in capsys.readouterr().err


def test_a_folder_that_is_a_link_is_damage(run, workdir, said):
    place = workdir / "checkpoints" / "9" / "params"
    place.rename(workdir / "params")
    place.symlink_to(workdir / "params")
    assert resume(run[0], workdir, said).step == 6
    assert "params is no file but a link" in said[0]


def rewritten(folder: pathlib.Path, change) -> None:
    """The list with something else in it and a checksum that fits."""
    listed = json.loads((folder / "files.json").read_text())
    del listed["checksum"]
    change(listed["files"])
    (folder / "files.json").write_text(manifest._text(listed))


@pytest.mark.parametrize("name", ["../6/files.json", "../../../outside", "/etc/passwd", "params/../../6/files.json"])
def test_a_list_that_names_something_outside_opens_nothing(workdir, capsys, name, monkeypatch):
    folder = workdir / "checkpoints" / "9"
    (workdir.parent / "outside").write_text("x")
    size = (folder / name).stat().st_size
    rewritten(folder, lambda files: files.update({name: [size, 0]}))
    assert load_run(workdir).step == 6
    assert f"{name} is missing" in capsys.readouterr().err


def test_a_config_of_a_model_beyond_all_memory_allocates_nothing(workdir):
    folder = workdir / "checkpoints" / "9"
    stored = json.loads((folder / "metadata" / "metadata").read_text())
    stored["config"]["model"] |= dict(num_layers=4096, width=2**16, mlp_dim=2**18)
    (folder / "metadata" / "metadata").write_text(json.dumps(stored))
    manifest.write(folder, 9, late=True)
    with pytest.raises(
        UserError, match=r"checkpoint 9: its parameters take at least .* GiB, all devices together"
    ) as error:
        load_run(workdir)
    assert "\n" not in str(error.value)


def test_text_of_an_absurd_size_is_not_read(workdir, capsys):
    """A file without content takes no room, whatever size it says."""
    folder, size = workdir / "checkpoints" / "9", 2**40
    os.truncate(folder / "metadata" / "metadata", size)
    rewritten(folder, lambda files: files.update({"metadata/metadata": [size, 0]}))
    assert load_run(workdir).step == 6
    assert f"metadata/metadata has {size} bytes; no more than" in capsys.readouterr().err
