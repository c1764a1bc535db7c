"""The list of a checkpoint's files with their checksums, and the look that tells whether each is still what was
written.
"""

import concurrent.futures
import fnmatch
import json
import os
import pathlib
import stat
import zlib
from typing import Any

from oasis_jax.errors import UserError
from oasis_jax.reading import MOST, other_kind, read_bytes

NAME = "files.json"
# Orbax completes these two after it has called back for the list, when it gives the checkpoint its final name. They are
# listed as soon as that is done, see `seal`.
_LATE = ("_CHECKPOINT_METADATA", "commit_success.txt")
_SMALL = 2**20  # bytes; smaller files are looked at before anything is read from a checkpoint
_BLOCK = 2**20
_ARRAYS = ("d", "ocdbt.process_*")  # folders of arrays; what lies elsewhere is read whole, as JSON
_THREADS = 4


class Damaged(Exception):
    """A file of a checkpoint is not what was written; the message names it."""


def write(folder: pathlib.Path, step: int, *, late: bool) -> None:
    """Lists what is in the folder of a checkpoint: {"step", "sealed", "files": {name: [bytes, CRC-32]}, "checksum"}.

    Args:
      late: whether the files that Orbax completes last are complete.
    """
    names = [name for name in _found(folder) if late or name not in _LATE]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        files = dict(zip(names, threads.map(lambda name: _size_and_checksum(folder / name), names)))
    _replace(folder, {"step": step, "sealed": late, "files": files})


def seal(folder: pathlib.Path) -> None:
    """Adds the files that are complete only since the checkpoint has its final name; nothing to do where they are
    listed, or where this cannot be told.
    """
    try:
        listed = _read(folder)
    except Damaged:
        return
    if isinstance(listed.get("files"), dict) and not listed["sealed"]:
        late = {name: _size_and_checksum(folder / name) for name in _LATE if (folder / name).is_file()}
        _replace(folder, {**listed, "sealed": True, "files": {**listed["files"], **late}})


class Inspection:
    """Compares the files of a checkpoint with its list; a context manager.

    The list, the names, the sizes and all small files are looked at at once. Large files are read in threads, beside
    whatever restores the checkpoint meanwhile; `finish` waits for them.

    Args:
      folder: of the checkpoint.
      part, parts: of large files, every `parts`-th is looked at, from number `part` on: each process takes some.

    Raises:
      Damaged: names the first file that is missing, added or changed.
    """

    def __init__(self, folder: pathlib.Path, part: int = 0, parts: int = 1):
        self._pending = []
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS)
        listed = _read(folder)
        self.verified = "files" in listed
        if not self.verified:  # by a version that listed sizes only
            _check_sizes(folder, _found(folder), listed)
            return
        files = listed["files"]
        if listed["step"] != int(folder.name):
            raise Damaged(f"{NAME} is that of step {listed['step']}")
        found = _found(folder)
        _check_sizes(folder, found, {name: size for name, (size, _) in files.items()})
        if added := [name for name in found if name not in files and (listed["sealed"] or name not in _LATE)]:
            raise Damaged(f"{added[0]} was not there when it was written")
        for name, (size, checksum) in files.items():
            if size < _SMALL:
                _compare(folder, name, checksum)
        large = [name for name, (size, _) in files.items() if size >= _SMALL]
        for name in large[part::parts]:
            checksum = files[name][1]
            self._pending.append(self._threads.submit(_compare, folder, name, checksum))

    def __enter__(self) -> "Inspection":
        return self

    def __exit__(self, *exception) -> None:
        self._threads.shutdown(cancel_futures=True)

    def finish(self) -> None:
        """Returns when every file has been looked at; raises Damaged for one that has changed."""
        for compared in self._pending:
            compared.result()


def _found(folder: pathlib.Path) -> list[str]:
    """Names of all files below the folder, with / between folders, but for the list itself.

    Raises:
      Damaged: something there is neither a file nor a folder. Nothing that writes checkpoints makes links or devices,
        and behind those anything could be opened.
    """
    names = []
    for where, folders, files in os.walk(folder):
        inside = lambda name, where=where: pathlib.Path(where, name).relative_to(folder).as_posix()
        for name in [*folders, *files]:
            mode = os.lstat(pathlib.Path(where, name)).st_mode
            if not stat.S_ISDIR(mode) and (kind := other_kind(mode)):
                raise Damaged(f"{inside(name)} is no file but a {kind}")
        names += map(inside, files)
    return sorted(name for name in names if name != NAME and name != f"{NAME}.partial")


def _check_sizes(folder: pathlib.Path, found: list[str], sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        there = (folder / name).stat().st_size if name in found else None
        if there != size:
            raise Damaged(f"{name} {'is missing' if there is None else f'has {there} bytes instead of {size}'}")
        holds_arrays = any(fnmatch.fnmatch(part, kind) for part in name.split("/")[1:] for kind in _ARRAYS)
        if size > MOST and not holds_arrays:
            raise Damaged(f"{name} has {size} bytes; no more than {MOST} are read")


def _compare(folder: pathlib.Path, name: str, checksum: int) -> None:
    try:
        found = _size_and_checksum(folder / name)[1]
    except OSError as error:
        raise Damaged(f"{name} cannot be read: {error.strerror}") from None
    if found != checksum:
        raise Damaged(f"{name} has changed since it was written (CRC-32 {found:08x} instead of {checksum:08x})")


def _size_and_checksum(path: pathlib.Path) -> tuple[int, int]:
    size = checksum = 0
    block = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            checksum, size = zlib.crc32(block[:count], checksum), size + count
    return size, checksum


def _text(listed: dict[str, Any]) -> str:
    """The list with the checksum of itself: one way to write each list, so that every changed bit is seen."""
    body = json.dumps(listed, sort_keys=True)
    return json.dumps(listed | {"checksum": zlib.crc32(body.encode())}, sort_keys=True)


def _replace(folder: pathlib.Path, listed: dict[str, Any]) -> None:
    partial = folder / f"{NAME}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(_text(listed))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / NAME)


def _read(folder: pathlib.Path) -> dict[str, Any]:
    """The list as `write` makes it, or {name: bytes} as earlier versions did."""
    try:
        text = read_bytes(folder / NAME).decode("utf-8")
        listed = json.loads(text)
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except UserError as error:
        raise Damaged(str(error).removeprefix(f"{folder}/")) from None
    except (ValueError, RecursionError):
        listed = None
    if isinstance(listed, dict) and listed and all(type(size) is int for size in listed.values()):
        return listed
    expected = isinstance(listed, dict) and {key: value for key, value in listed.items() if key != "checksum"}
    if not expected or not expected.get("files") or text != _text(expected):
        raise Damaged(f"{NAME} has changed since it was written")
    return expected
