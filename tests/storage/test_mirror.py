"""Local copies of what lies in a store, and folders that are kept there."""

import pytest

from oasis_jax.errors import UserError
from oasis_jax.storage import Mirror, as_path, fetched, fetched_glob, listing, mirror, write_bytes
from oasis_jax.storage.paths import filesystem


@pytest.fixture
def folder(bucket, request):
    found = as_path(f"{bucket}/{request.node.name.partition('[')[0]}", "--model")
    write_bytes(found / "config.json", b"{}")
    write_bytes(found / "sub" / "weights.bin", bytes(range(256)) * 50)
    return found


@pytest.fixture
def downloads(folder, monkeypatch):
    """The names that are fetched."""
    store, names = filesystem(folder), []
    get = type(store).get_file
    monkeypatch.setattr(store, "get_file", lambda source, target: (names.append(source), get(store, source, target))[1])
    return names


def contents(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_folder_is_fetched_once_and_what_changes_again(folder, downloads):
    first = fetched(folder, "--model")
    assert contents(first) == {"config.json": b"{}", "sub/weights.bin": bytes(range(256)) * 50}
    assert len(downloads) == 2 and fetched(str(folder), "--model") == first and len(downloads) == 2
    write_bytes(folder / "config.json", b"[]")  # as long as before
    (folder / "sub" / "weights.bin").unlink()
    fetched(folder, "--model")
    assert contents(first) == {"config.json": b"[]"} and downloads[2:] == [str(folder / "config.json")]
    (first / "config.json").write_bytes(b"cut short")
    assert contents(fetched(folder, "--model")) == {"config.json": b"[]"}


def test_a_file_and_some_of_a_folder(folder, downloads):
    assert fetched(folder / "config.json", "--model").read_bytes() == b"{}"
    assert contents(fetched(folder, "--model", ["*.json"])) == {"config.json": b"{}"}
    assert not any(name.endswith(".bin") for name in downloads)


def test_globs(bucket, folder):
    for name in ("a/1.txt", "a/2.txt", "b/3.txt", "b/4.jsonl"):
        write_bytes(folder / name, name.encode())
    names = lambda pattern: [path.read_text() for path in fetched_glob(f"{folder}/{pattern}", "data.pattern")]
    assert names("a/*.txt") == ["a/1.txt", "a/2.txt"]
    assert names("**/*.txt") == ["a/1.txt", "a/2.txt", "b/3.txt"]
    assert names("?/3.txt") == names("b/3.txt") == ["b/3.txt"]
    assert names("c/*.txt") == names("a") == names("none.txt") == []


def test_a_file_that_comes_short_is_refused_and_not_kept(folder, monkeypatch):
    store = filesystem(folder)
    get = type(store).get_file

    def cut(source, target):
        get(store, source, target)
        if source.endswith("weights.bin"):
            with open(target, "r+b") as file:
                file.truncate(700)

    monkeypatch.setattr(store, "get_file", cut)
    with pytest.raises(UserError, match=r"weights.bin' came with 700 bytes instead of 12800"):
        fetched(folder, "--model")
    monkeypatch.undo()
    monkeypatch.setenv("OASIS_JAX_CACHE", str(mirror.cache_folder()))
    assert contents(fetched(folder, "--model"))["sub/weights.bin"] == bytes(range(256)) * 50


def test_names_that_would_leave_the_folder_are_refused(folder, monkeypatch):
    found = listing(folder)["config.json"]
    monkeypatch.setattr(mirror, "listing", lambda path: {"../../outside": found})
    with pytest.raises(UserError, match="which no folder can"):
        fetched(folder, "--model")


def test_a_mirror_follows_a_folder(bucket, tmp_path, monkeypatch):
    remote = as_path(f"{bucket}/mirrored", "--report")
    one = Mirror(remote, "--report", last=("index.html",))
    order, store = [], filesystem(remote)
    put = type(store).put_file
    monkeypatch.setattr(store, "put_file", lambda source, target: (order.append(target), put(store, source, target))[1])
    (one.folder / "figures").mkdir()
    for name in ("index.html", "metrics.json", "figures/a.png"):
        (one.folder / name).write_text(name)
    one.upload()
    assert sorted(listing(remote)) == ["figures/a.png", "index.html", "metrics.json"]
    assert order[-1] == f"{remote}/index.html"
    order.clear()
    (one.folder / "metrics.json").write_text("other")
    (one.folder / "figures/a.png").unlink()
    one.upload()
    assert order == [f"{remote}/metrics.json"] and sorted(listing(remote)) == ["index.html", "metrics.json"]
    monkeypatch.setenv("OASIS_JAX_CACHE", str(tmp_path / "other machine"))
    assert contents(Mirror(remote, "--report").folder) == {"index.html": b"index.html", "metrics.json": b"other"}


def test_what_was_never_uploaded_is_not_taken_for_what_is_there(bucket):
    remote = as_path(f"{bucket}/gone", "--workdir")
    (Mirror(remote, "--workdir").folder / "left").write_text("over")
    assert contents(Mirror(remote, "--workdir").folder) == {}


def test_a_reader_on_the_same_machine_leaves_what_is_being_written(bucket):
    remote = as_path(f"{bucket}/both", "--workdir")
    write_bytes(remote / "a", b"a")
    written = Mirror(remote, "--workdir").folder
    (written / "b").write_text("not uploaded yet")
    assert contents(fetched(remote, "--workdir")) == {"a": b"a"}
    assert contents(written) == {"a": b"a", "b": b"not uploaded yet"}


def test_a_local_mirror_is_the_folder_itself(tmp_path):
    local = Mirror(tmp_path / "report", "--report")
    local.upload()
    assert local.folder == tmp_path / "report"
