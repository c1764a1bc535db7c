"""Files of others: what is no file, has no end or is larger than anything can be is named and not read."""

import os
import pathlib
import socket

import pytest

from oasis_jax.data import prepared
from oasis_jax.errors import UserError
from oasis_jax.pretrained import chat_template
from oasis_jax.pretrained.folder import Folder
from oasis_jax.pretrained.tokenizer import from_folder
from oasis_jax.reading import MOST, read_bytes, read_json
from oasis_jax.study.records import read_json as read_study_json
from oasis_jax.training import lock_files, manifest
from oasis_jax.training.metrics import read_metrics


def device(path: pathlib.Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: pathlib.Path) -> None:
    """Takes no room, but as bytes it would be more than this machine has."""
    path.touch()
    os.truncate(path, 2**40)


# Harm -> what is said of it
HARMS = {
    os.mkfifo: "is no file but a FIFO",
    device: "is no file but a character device",
    pathlib.Path.mkdir: "is no file but a folder",
    huge: f"has {2**40} bytes; no more than",
}
# File -> who reads it, where the folder is
READERS = {
    "metrics.jsonl": read_metrics,
    "index.json": prepared.read_index,
    "config.json": Folder,
    "model.safetensors.index.json": lambda folder: Folder(with_config(folder)),
    "tokenizer.json": lambda folder: from_folder(folder, {}),
    "chat_template.jinja": chat_template.from_folder,
    "tokenizer_config.json": chat_template.from_folder,
    "result.json": lambda folder: read_study_json(folder / "result.json"),
    "training.lock": lambda folder: lock_files.LocalFiles(folder).read("training.lock"),
    "files.json": lambda folder: manifest.Inspection(folder),
}


def with_config(folder: pathlib.Path) -> pathlib.Path:
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_or_too_large_is_named_and_not_read(tmp_path, name, harm):
    harm(tmp_path / name)
    with pytest.raises((UserError, manifest.Damaged), match=HARMS[harm]) as error:
        READERS[name](tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("harm", [os.mkfifo, device, pathlib.Path.mkdir], ids=lambda harm: harm.__name__)
def test_tensors_are_read_from_files_alone(tmp_path, harm):
    harm(with_config(tmp_path) / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: is no file but a") as error:
        Folder(tmp_path)
    assert "\n" not in str(error.value)


def test_a_socket_and_what_is_not_there(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(UserError, match="s: cannot be read: "):
            read_bytes(tmp_path / "s")
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")
    with pytest.raises(UserError, match="there is no such file"):
        read_json(tmp_path / "none")


def test_files_and_links_to_them_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b'{"x": 1}')
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert read_bytes(tmp_path / "b") == b'{"x": 1}' and read_json(tmp_path / "b") == {"x": 1}
    assert read_bytes(tmp_path / "a", most=8) == b'{"x": 1}'
    with pytest.raises(UserError, match="has 8 bytes; no more than 7 are read"):
        read_bytes(tmp_path / "a", most=7)
    assert MOST < 2**40


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, "\xff", '{"a": ' + "1" * 5000 + "}"])
def test_json_that_is_none_or_something_else_is_one_line(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"x\.json: (cannot be read as JSON|expected a JSON object)") as error:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(error.value)
