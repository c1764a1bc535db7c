"""Paths in object stores: what is one, what is said where one cannot be used."""

import importlib
import pathlib
import socket

import pytest
from stores import forget_file_systems

from oasis_jax.errors import UserError
from oasis_jax.reading import read_bytes, read_json
from oasis_jax.storage import as_path, created, fetched, is_remote, listing, move, paths, reach, write_bytes


def test_local_paths_stay_what_they_are():
    assert as_path("a/b", "--workdir") == pathlib.Path("a/b") and not is_remote("a/b")
    assert as_path(pathlib.Path("gs:/x"), "--workdir") == pathlib.Path("gs:/x")


@pytest.mark.parametrize(
    "text, words",
    [
        ("gcs://bucket/x", "--workdir: 'gcs://bucket/x': scheme: unknown name 'gcs'"),
        ("https://host/x", "allowed: gs, s3"),
        ("gs://", "expected gs://BUCKET/NAME"),
        ("s3://bucket//x", "without empty parts"),
        ("gs://bucket/../x", "without empty parts, . and .."),
    ],
)
def test_other_schemes_and_names_that_no_folder_could_have(text, words):
    with pytest.raises(UserError) as error:
        as_path(text, "--workdir")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("scheme, package, extra", [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_a_package_that_is_not_there_is_named_with_its_extra(monkeypatch, scheme, package, extra):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError) as error:
        as_path(f"{scheme}://bucket/x", "--report")
    assert str(error.value).startswith(f"--report: {scheme}:// needs the package {package}; ")
    assert f"'oasis_jax[{extra}]'" in str(error.value)


def test_what_lies_where(bucket):
    folder = as_path(f"{bucket}/where", "--workdir")
    assert reach(folder, "--workdir") is None and listing(folder) == {}
    write_bytes(folder / "a.txt", b"hello")
    write_bytes(folder / "b" / "c.txt", b"other")
    assert reach(folder, "--workdir") == "directory" and reach(folder / "a.txt", "--workdir") == "file"
    found = listing(folder)
    assert {name: entry.size for name, entry in found.items()} == {"a.txt": 5, "b/c.txt": 5}
    before = found["a.txt"]
    write_bytes(folder / "a.txt", b"hallo")
    changed = listing(folder)  # nothing is remembered
    assert changed["a.txt"] != before and changed["b/c.txt"] == found["b/c.txt"]
    move(folder, as_path(f"{bucket}/elsewhere", "--workdir"))
    assert listing(folder) == {} and listing(as_path(f"{bucket}/elsewhere", "")) == changed


def test_an_object_is_created_once(bucket):
    path = as_path(f"{bucket}/once", "--workdir")
    assert created(path, "first") and not created(path, "second")
    assert path.read_bytes() == b"first"


def test_objects_are_read_as_files_are(bucket):
    folder = as_path(f"{bucket}/read", "--workdir")
    write_bytes(folder / "a.json", b'{"x": 1}')
    write_bytes(folder / "empty", b"")
    assert read_bytes(folder / "a.json", most=8) == b'{"x": 1}' and read_json(folder / "a.json") == {"x": 1}
    assert read_bytes(f"{folder}/empty") == b""
    with pytest.raises(UserError, match=rf"^{folder}/a\.json: has 8 bytes; no more than 7 are read"):
        read_bytes(folder / "a.json", most=7)
    with pytest.raises(UserError, match=f"^{folder}: is no file but a folder"):
        read_bytes(folder)
    with pytest.raises(FileNotFoundError):
        read_bytes(folder / "none")
    with pytest.raises(UserError, match="/none: there is no such file"):
        read_json(folder / "none")


def test_an_object_that_cannot_be_read_is_one_line(s3, monkeypatch):
    path = as_path(f"{s3}/shut", "--workdir")
    write_bytes(path, b"-")

    def denied(*arguments, **options):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(paths.filesystem(path), "cat_file", denied)
    with pytest.raises(UserError, match=rf"^{path}: cannot be read: access is denied \(Access Denied\)$"):
        read_bytes(path)


def test_a_bucket_that_is_not_there(bucket):
    path = as_path(f"{bucket}-of-nobody/run", "--workdir")
    with pytest.raises(UserError, match=r"--workdir: '.*-of-nobody/run': there is no bucket 'bucket-of-nobody'"):
        reach(path, "--workdir")


def test_nothing_at_a_path(bucket):
    with pytest.raises(UserError, match=f"--model: there is nothing at '{bucket}/nothing'"):
        fetched(f"{bucket}/nothing", "--model")


@pytest.fixture
def environment(monkeypatch):
    """Sets variables that a file system reads when it is opened."""

    def set_to(**values):
        for name, value in values.items():
            monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
        forget_file_systems()

    yield set_to
    monkeypatch.undo()
    forget_file_systems()


def test_a_store_that_does_not_answer(s3, monkeypatch, environment):
    monkeypatch.setattr(paths, "_SECONDS_TO_ANSWER", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment(AWS_ENDPOINT_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UserError, match="did not answer for 1 s"):
            reach(as_path(f"{s3}/run", "--workdir"), "--workdir")


def test_a_user_without_credentials(s3, environment, tmp_path):
    nowhere = str(tmp_path / "none")
    environment(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    environment(AWS_SHARED_CREDENTIALS_FILE=nowhere, AWS_CONFIG_FILE=nowhere)
    with pytest.raises(UserError, match=r"--workdir: .*: there are no credentials for it"):
        reach(as_path(f"{s3}/run", "--workdir"), "--workdir")
