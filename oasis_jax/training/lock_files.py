"""What a lock needs of the place it lies in: a file that one of several creates, and a clock that all of them see."""

import contextlib
import json
import os
import pathlib
import uuid
from typing import Any

from oasis_jax.errors import UserError
from oasis_jax.reading import read_bytes
from oasis_jax.storage import Path, created, write_bytes
from oasis_jax.storage.paths import filesystem

Read = tuple[dict[str, Any], float | None]
_MOST = 2**16  # bytes of a lock


class LocalFiles:
    """Files of a folder, which others on a shared file system see, too.

    One of several creates a file by a hard link, which shared file systems make whole or not at all.
    """

    away = (OSError, UserError)  # what a file system that is away for a moment raises

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def create(self, name: str, content: dict[str, Any]) -> bool:
        """Whether the file was not there and is now; one of several that try has True."""
        path, mine = self._folder / name, self._folder / f".{name.lstrip('.')}-{uuid.uuid4().hex}"
        try:
            mine.write_text(json.dumps(content))
            return _linked(mine, path)
        finally:
            mine.unlink(missing_ok=True)

    def read(self, name: str) -> Read:
        """What a file says, {} where that is not readable, and when it was touched; None: there is none."""
        path = self._folder / name
        try:
            text = read_bytes(path, _MOST)  # opening it asks a shared file system for its newest state
            return _parsed(text), os.stat(path).st_mtime
        except FileNotFoundError:
            return {}, None

    def touch(self, name: str, content: dict[str, Any]) -> None:
        """Shows that the holder lives."""
        os.utime(self._folder / name)

    def now(self) -> float:
        """The time by which `read` says when a file was touched, the file system's."""
        clock = self._folder / f".clock-{uuid.uuid4().hex}"
        try:
            clock.touch()
            return clock.stat().st_mtime
        finally:
            clock.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        (self._folder / name).unlink(missing_ok=True)


def _linked(source: pathlib.Path, path: pathlib.Path) -> bool:
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(path, "x") as file:
                file.write(source.read_text())
        except FileExistsError:
            return False
    return True


class ObjectFiles:
    """Objects of a folder in a store, which writes one for the first of several that ask it to only where there is
    none. Touching is writing anew.
    """

    away = Exception  # the packages underneath have no one kind of error

    def __init__(self, folder: Path):
        self._folder = folder

    def create(self, name: str, content: dict[str, Any]) -> bool:
        """See `LocalFiles.create`. What was written counts also where the answer was lost and it was tried again."""
        path = self._folder / name
        return created(path, json.dumps(content)) or self.read(name)[0] == content

    def read(self, name: str) -> Read:
        """See `LocalFiles.read`."""
        path = self._folder / name
        try:
            text = read_bytes(path, _MOST)
            return _parsed(text), filesystem(path).modified(os.fspath(path)).timestamp()
        except FileNotFoundError:
            return {}, None

    def touch(self, name: str, content: dict[str, Any]) -> None:
        """See `LocalFiles.touch`."""
        write_bytes(self._folder / name, json.dumps(content).encode())

    def now(self) -> float:
        """See `LocalFiles.now`: the store's."""
        clock = self._folder / f".clock-{uuid.uuid4().hex}"
        try:
            write_bytes(clock, b"-")
            return filesystem(clock).modified(os.fspath(clock)).timestamp()
        finally:
            self.remove(clock.name)

    def remove(self, name: str) -> None:
        """See `LocalFiles.remove`."""
        with contextlib.suppress(FileNotFoundError):
            filesystem(self._folder).rm_file(os.fspath(self._folder / name))


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
