"""The list of a checkpoint's files with their checksums, and the look that tells whether each is still what was
written.
"""

import base64
import concurrent.futures
import contextlib
import fnmatch
import importlib.util
import json
import os
import pathlib
import stat
import zlib
from collections.abc import Iterator
from typing import Any

from oasis_jax.errors import UserError
from oasis_jax.reading import MOST, other_kind, read_bytes
from oasis_jax.storage import Path, is_remote, listing, write_bytes

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


def write(folder: Path, step: int, *, late: bool) -> None:
    """Lists what is in the folder of a checkpoint: {"step", "sealed", "files": {name: [bytes, CRC-32]}, "checksum"}.

    Of a folder in an object store the checksums are those that the store computed when it took the objects: nothing is
    read back.

    Args:
      late: whether the files that Orbax completes last are complete.
    """
    found = _found(folder)
    names = [name for name in found if late or name not in _LATE]
    _replace(folder, {"step": step, "sealed": late, "files": _contents(folder, names, found)})


def seal(folder: Path) -> None:
    """Adds the files that are complete only since the checkpoint has its final name; nothing to do where they are
    listed, or where this cannot be told.
    """
    try:
        listed = _read(folder)
    except Damaged:
        return
    if isinstance(listed.get("files"), dict) and not listed["sealed"]:
        found = _found(folder)
        late = _contents(folder, [name for name in _LATE if name in found], found)
        _replace(folder, {**listed, "sealed": True, "files": {**listed["files"], **late}})


class Inspection:
    """Compares the files of a checkpoint with its list; a context manager.

    The list, the names, the sizes and all small files are looked at at once. Large files are read in threads, beside
    whatever restores the checkpoint meanwhile; `finish` waits for them.

    Args:
      folder: of the checkpoint.
      part, parts: of large files, every `parts`-th is looked at, from number `part` on: each process takes some.

    Attributes:
      unverified: why files are not compared with their checksums; "": they are.

    Raises:
      Damaged: names the first file that is missing, added or changed.
    """

    def __init__(self, folder: Path, part: int = 0, parts: int = 1):
        self._pending = []
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS)
        listed, found = _read(folder), _found(folder)
        self.unverified = "" if "files" in listed else "was written without checksums"
        if self.unverified:  # by a version that listed sizes only
            _check_sizes(listed, found)
            return
        files = listed["files"]
        if listed["step"] != int(folder.name):
            raise Damaged(f"{NAME} is that of step {listed['step']}")
        _check_sizes({name: size for name, (size, _) in files.items()}, found)
        if added := [name for name in found if name not in files and (listed["sealed"] or name not in _LATE)]:
            raise Damaged(f"{added[0]} was not there when it was written")
        unread = [name for name, (_, checksum) in files.items() if not _told(name, checksum, found[name][1])]
        if any(isinstance(files[name][1], str) for name in unread) and not importlib.util.find_spec("google_crc32c"):
            self.unverified = "was written to gs://, whose checksums need the package google-crc32c"
            return
        for name in unread:
            if files[name][0] < _SMALL:
                _compare(folder, name, files[name][1])
        for name in [name for name in unread if files[name][0] >= _SMALL][part::parts]:
            self._pending.append(self._threads.submit(_compare, folder, name, files[name][1]))

    def __enter__(self) -> "Inspection":
        return self

    def __exit__(self, *exception) -> None:
        self._threads.shutdown(cancel_futures=True)

    def finish(self) -> None:
        """Returns when every file has been looked at; raises Damaged for one that has changed."""
        for compared in self._pending:
            compared.result()


def _found(folder: Path) -> dict[str, tuple[int, str | None]]:
    """Every file below the folder, but for the list itself: {name, with / between folders: (bytes, the checksum by
    which an object store knows its content)}.

    Raises:
      Damaged: something there is neither a file nor a folder. Nothing that writes checkpoints makes links or devices,
        and behind those anything could be opened.
    """
    if is_remote(folder):
        found = {name: tuple(entry) for name, entry in listing(folder).items()}
    else:
        found = {name: (size, None) for name, size in _sizes(folder)}
    return {name: found[name] for name in sorted(found) if name not in (NAME, f"{NAME}.partial")}


def _sizes(folder: pathlib.Path) -> Iterator[tuple[str, int]]:
    for where, folders, files in os.walk(folder):
        for path in (pathlib.Path(where, name) for name in [*folders, *files]):
            with contextlib.suppress(FileNotFoundError):  # a run that trains deletes checkpoints
                found, name = os.lstat(path), path.relative_to(folder).as_posix()
                if stat.S_ISDIR(found.st_mode):
                    continue
                if kind := other_kind(found.st_mode):
                    raise Damaged(f"{name} is no file but a {kind}")
                yield name, found.st_size


def _contents(folder: Path, names: list[str], found: dict[str, tuple[int, str | None]]) -> dict[str, tuple]:
    """{name: (bytes, checksum)}."""
    if is_remote(folder):
        return {name: found[name] for name in names}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(names, threads.map(lambda name: _size_and_checksum(folder / name), names)))


def _told(name: str, checksum: int | str, known: str | None) -> bool:
    """Whether a store's own checksum tells that a file is what was written; raises Damaged where it tells otherwise.
    Of a folder that was copied from elsewhere it may tell nothing.
    """
    if known is None or not isinstance(checksum, str):
        return False
    if known != checksum:
        raise Damaged(f"{name} has changed since it was written ({known} instead of {checksum})")
    return True


def _check_sizes(sizes: dict[str, int], found: dict[str, tuple[int, str | None]]) -> None:
    for name, size in sizes.items():
        there = found[name][0] if name in found else None
        if there != size:
            raise Damaged(f"{name} {'is missing' if there is None else f'has {there} bytes instead of {size}'}")
        holds_arrays = any(fnmatch.fnmatch(part, kind) for part in name.split("/")[1:] for kind in _ARRAYS)
        if size > MOST and not holds_arrays:
            raise Damaged(f"{name} has {size} bytes; no more than {MOST} are read")


def _compare(folder: Path, name: str, checksum: int | str) -> None:
    """Reads a file and compares it with its checksum. The CRC-32C of a checkpoint that was copied out of gs:// takes
    google-crc32c, which the extra gcs brings.
    """
    try:
        found = _crc32c(folder / name) if isinstance(checksum, str) else _size_and_checksum(folder / name)[1]
    except OSError as error:
        raise Damaged(f"{name} cannot be read: {error.strerror}") from None
    if found != checksum:
        one, other = (x if isinstance(x, str) else f"CRC-32 {x:08x}" for x in (found, checksum))
        raise Damaged(f"{name} has changed since it was written ({one} instead of {other})")


def _blocks(path: Path) -> Iterator[memoryview]:
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb") if is_remote(path) else open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            yield block[:count]


def _size_and_checksum(path: Path) -> tuple[int, int]:
    size = checksum = 0
    for block in _blocks(path):
        checksum, size = zlib.crc32(block, checksum), size + len(block)
    return size, checksum


def _crc32c(path: Path) -> str:
    from google_crc32c import Checksum

    checksum = Checksum()
    for block in _blocks(path):
        checksum.update(bytes(block))
    return f"crc32c:{base64.b64encode(checksum.digest()).decode()}"


def _text(listed: dict[str, Any]) -> str:
    """The list with the checksum of itself: one way to write each list, so that every changed bit is seen."""
    body = json.dumps(listed, sort_keys=True)
    return json.dumps(listed | {"checksum": zlib.crc32(body.encode())}, sort_keys=True)


def _replace(folder: Path, listed: dict[str, Any]) -> None:
    if is_remote(folder):
        write_bytes(folder / NAME, _text(listed).encode())
        return
    partial = folder / f"{NAME}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(_text(listed))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / NAME)


def _read(folder: Path) -> dict[str, Any]:
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
