"""Files that others may have written, read whole: only where they are files, and of a size that can be. They may lie in
an object store.
"""

import contextlib
import errno
import json
import os
import pathlib
import stat
import zlib
from collections.abc import Mapping
from typing import Any

from oasis_jax import storage
from oasis_jax.errors import UserError

MOST = 2**28  # bytes: of a tokenizer, a config, an index; the largest in use have a few dozen MB
# Opening or reading these would wait or never end.
_KINDS = {
    stat.S_ISDIR: "folder",
    stat.S_ISFIFO: "FIFO",
    stat.S_ISSOCK: "socket",
    stat.S_ISCHR: "character device",
    stat.S_ISBLK: "block device",
}


def other_kind(mode: int) -> str:
    """What a path with this st_mode is where it is no regular file, such as "FIFO"; "" where it is one."""
    if stat.S_ISREG(mode):
        return ""
    return next((kind for is_it, kind in _KINDS.items() if is_it(mode)), "link")


def require_file(path: str | os.PathLike) -> None:
    """Raises UserError for what is there and is no regular file, nor a link to one."""
    try:
        kind = other_kind(os.stat(path).st_mode)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if kind:
        raise UserError(f"{path}: is no file but a {kind}")


def read_bytes(path: str | os.PathLike, most: int = MOST) -> bytes:
    """What is in a file or an object.

    Raises:
      FileNotFoundError: there is none.
      UserError: it is no regular file, has more than `most` bytes, or cannot be read.
    """
    if storage.is_remote(path):
        return _read_object(path, most)
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            found = os.fstat(file.fileno())
            if kind := other_kind(found.st_mode):
                raise UserError(f"{path}: is no file but a {kind}")
            if found.st_size > most:
                raise UserError(f"{path}: has {found.st_size} bytes; no more than {most} are read")
            return file.read(most)
    except IsADirectoryError:
        raise UserError(f"{path}: is no file but a folder") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _read_object(path: str | os.PathLike, most: int) -> bytes:
    with storage.in_words(path, f"{path}: cannot be read"), contextlib.suppress(FileNotFoundError):
        return storage.read_bytes(path, most)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO that nobody writes to would hold the process for ever


def read_json(path: pathlib.Path, kind: type = dict, most: int = MOST) -> Any:
    """The JSON in a file.

    Raises:
      UserError: there is none, it cannot be read, or is something else than expected.
    """
    try:
        found = json.loads(read_bytes(path, most).decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(found, kind):
        raise UserError(
            f"{path}: expected a JSON {'object' if kind is dict else kind.__name__}, got {type(found).__name__}"
        )
    return found


_CHECKSUM = "checksum"  # the key of it


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a JSON file of ours is to hold, so that `without_checksum` sees every changed bit."""
    plain = json.loads(json.dumps(values, allow_nan=False))  # as it will be read
    return {**plain, _CHECKSUM: _checksum(plain)}


def without_checksum(found: Mapping[str, Any]) -> dict[str, Any]:
    """What was given to `with_checksum`; raises ValueError where it is no longer that. What has no checksum was written
    by an earlier version, and passes.
    """
    values = {name: value for name, value in found.items() if name != _CHECKSUM}
    if _CHECKSUM in found and found[_CHECKSUM] != _checksum(values):
        raise ValueError("it has changed since it was written")
    return values


def _checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())
