"""Local copies of what lies in an object store: what is read is fetched once, what is written is kept up to date."""

import concurrent.futures
import fnmatch
import glob
import hashlib
import itertools
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence

from oasis_jax.errors import UserError
from oasis_jax.storage.paths import Path, Stored, as_path, filesystem, in_words, is_remote, listing, reach, stored

_TRANSFERS = 8  # at a time


def cache_folder() -> pathlib.Path:
    """Where fetched files lie: OASIS_JAX_CACHE, or oasis_jax in the user's cache folder."""
    if found := os.environ.get("OASIS_JAX_CACHE"):
        return pathlib.Path(found)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "oasis_jax"


def fetched(path: str | os.PathLike, what: str, wanted: Sequence[str] = ("*",)) -> pathlib.Path:
    """A local path as it is, or the local copy of a file or folder in a store. What has not changed there, by size and
    checksum, is not fetched again; what is gone there is removed here.

    Args:
      what: the flag or field, for messages.
      wanted: patterns of names below a folder; others stay where they are.

    Raises:
      UserError: there is nothing, or it cannot be read; a file came shorter or longer than the store says; no room.
    """
    path = as_path(path, what)
    if not is_remote(path):
        return path
    kind, where = reach(path, what), os.fspath(path)
    if kind is None:
        raise UserError(f"{what}: there is nothing at {where!r}")
    target = _copy_of(path)
    if kind == "directory":
        _fetch_folder(path, target, what, wanted)
        return target
    with in_words(path, f"{what}: {where!r}"):
        entry = stored(filesystem(path).info(where))
        _update(path.parent, target.parent, {path.name: entry}, what)
    return target


def _fetch_folder(path: Path, target: pathlib.Path, what: str, wanted: Sequence[str] = ("*",)) -> None:
    with in_words(path, f"{what}: {os.fspath(path)!r}"):
        there = listing(path)
        chosen = {name: x for name, x in there.items() if any(fnmatch.fnmatchcase(name, p) for p in wanted)}
        target.mkdir(parents=True, exist_ok=True)
        _update(path, target, chosen, what)
        for name in _files(target) - there.keys():
            (target / name).unlink(missing_ok=True)


def fetched_glob(pattern: str, what: str) -> list[pathlib.Path]:
    """Local copies of the objects that a glob in a store matches, laid out as they are there; [] where none does."""
    path = as_path(pattern, what)
    if not glob.has_magic(pattern):
        return [fetched(path, what)] if reach(path, what) == "file" else []
    plain = itertools.takewhile(lambda part: not glob.has_magic(part), os.fspath(path).split("/"))
    root = as_path("/".join(plain), what)
    reach(root, what)
    with in_words(root, f"{what}: {pattern!r}"):
        prefix = os.fspath(root).partition("://")[2] + "/"
        found = filesystem(root).glob(pattern, detail=True)
        entries = {name.removeprefix(prefix): stored(x) for name, x in found.items() if x["type"] == "file"}
        _update(root, _copy_of(root), entries, what)
    return [_copy_of(root) / name for name in sorted(entries)]


def _copy_of(path: Path, kind: str = "objects") -> pathlib.Path:
    """Where a copy lies: of what is read; or what is "written" here, which a reader on this machine must not touch."""
    scheme, _, rest = os.fspath(path).partition("://")
    return cache_folder() / kind / scheme / rest


def _record(folder: pathlib.Path) -> pathlib.Path:
    """Where it is noted what the copies in a folder were made from."""
    return cache_folder() / "fetched" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"


def _files(folder: pathlib.Path) -> set[str]:
    names = ((pathlib.Path(where, file), file) for where, _, files in os.walk(folder) for file in files)
    return {path.relative_to(folder).as_posix() for path, file in names if not file.endswith(".partial")}


def _update(remote: Path, local: pathlib.Path, entries: Mapping[str, Stored], what: str) -> None:
    """Fetches those of the objects that are not here as they are there."""
    record = _record(local)
    try:
        known = json.loads(record.read_bytes())
    except (OSError, ValueError):
        known = {}

    def is_here(name: str, entry: Stored) -> bool:
        path = local / name
        return known.get(name) == list(entry) and path.is_file() and path.stat().st_size == entry.size

    def fetch(name: str) -> None:
        entry, path = entries[name], local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            store.get_file(os.fspath(remote / name), str(partial))
            if (size := partial.stat().st_size) != entry.size:
                raise UserError(f"{what}: {os.fspath(remote / name)!r} came with {size} bytes instead of {entry.size}")
            partial.replace(path)  # a reader never sees half a file
        finally:
            partial.unlink(missing_ok=True)

    for name in entries:
        if any(part in ("", ".", "..") or "\0" in part for part in name.split("/")):
            raise UserError(f"{what}: {os.fspath(remote)!r} holds {name!r}, which no folder can")
    store, missing = filesystem(remote), [name for name, entry in entries.items() if not is_here(name, entry)]
    if missing:
        _all(fetch, missing)
        record.parent.mkdir(parents=True, exist_ok=True)
        partial = record.with_name(f"{record.name}.{uuid.uuid4().hex[:8]}.partial")
        partial.write_text(json.dumps(known | entries))
        partial.replace(record)


def _all(act: Callable[[str], None], names: Collection[str]) -> None:
    with concurrent.futures.ThreadPoolExecutor(_TRANSFERS) as threads:
        list(threads.map(act, names))


class Mirror:
    """A folder that is written here and kept in a store, or, where its path is local, only here.

    An object appears whole or not at all, a folder does not: of what changed, `last` is uploaded after all else, so
    that a reader who finds it finds the rest.

    Args:
      path: local, or in a store; what is there already is fetched.
      what: the flag, for messages.
      last: names of files, without folders, that say that the others are complete.

    Attributes:
      folder: the local one.

    Raises:
      UserError: see `fetched`; what is in a store cannot be written.
    """

    def __init__(self, path: str | os.PathLike, what: str, last: Collection[str] = ()):
        self._remote, self._what, self._last = as_path(path, what), what, last
        self.folder, self._known = self._remote, {}
        if is_remote(self._remote):
            self.folder = _copy_of(self._remote, "written")
            reach(self._remote, what)
            _fetch_folder(self._remote, self.folder, what)
            self._known = self._found()
            check_writable(self._remote, what)

    def upload(self) -> None:
        """Makes the folder in the store what it is here; nothing to do for a local one.

        Raises:
          UserError: it cannot be written.
        """
        if not is_remote(self._remote):
            return
        found, store = self._found(), filesystem(self._remote)
        changed = [name for name, state in found.items() if self._known.get(name) != state]
        final = {name for name in changed if name.rpartition("/")[2] in self._last}
        put = lambda name: store.put_file(str(self.folder / name), os.fspath(self._remote / name))
        with in_words(self._remote, f"{self._what}: cannot write to {os.fspath(self._remote)!r}"):
            for names in ([name for name in changed if name not in final], final):
                _all(put, names)
            if gone := [os.fspath(self._remote / name) for name in self._known.keys() - found.keys()]:
                # what says that others are complete goes first
                for path in sorted(gone, key=lambda path: path.rpartition("/")[2] not in self._last):
                    store.rm_file(path)
        self._known = found

    def _found(self) -> dict[str, tuple[int, int]]:
        states = {name: (self.folder / name).stat() for name in _files(self.folder)}
        return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}


def check_writable(path: Path, what: str) -> None:
    """Writes an object into a folder of a store and removes it; raises UserError where that is not allowed."""
    probe = os.fspath(path / f".writable-{uuid.uuid4().hex[:8]}")
    with in_words(path, f"{what}: cannot write to {os.fspath(path)!r}"):
        filesystem(path).pipe_file(probe, b"-")
        filesystem(path).rm_file(probe)
