"""Generations on disk as they are made: a .jsonl file that is gone on with; its first line says what they are of."""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from oasis_jax.errors import UserError
from oasis_jax.reading import require_file


class Records:
    """A file that is appended to, safely on disk after every `add`; a context manager.

    Attributes:
      found: the records that an earlier, interrupted run has left.
    """

    def __init__(self, path: pathlib.Path, header: Mapping[str, Any]):
        """Opens or makes the file. A last line that a kill has torn is cut off.

        Raises:
          UserError: the file is of something else, which is named; it is damaged, is no file, or cannot be written.
        """
        header = json.loads(json.dumps(header))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                require_file(path)
            self._file = open(path, "a+b")  # noqa: SIM115 (`__exit__` closes it)
            self._file.seek(0)
            content = self._file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._file.truncate(len(whole))
        except OSError as error:
            raise UserError(f"--report: cannot write {str(path)!r}: {error.strerror}") from None
        try:
            lines = [_read(line, f"{path}:{n}") for n, line in enumerate(whole.split(b"\n")[:-1], start=1)]
            if lines:
                _check_header(path, lines[0], header)
        except UserError:
            self._file.close()
            raise
        self.found: list[dict] = lines[1:]
        if not lines:
            self.add([header])

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes records behind the others and waits until they are on disk."""
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        try:
            self._file.write(text.encode("utf-8", "backslashreplace"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"--report: cannot write {self._file.name!r}: {error.strerror}; what is in it stays, and the same "
                "command goes on"
            ) from None

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(OSError):  # said by `add` already
            self._file.close()


def _read(line: bytes, where: str) -> dict:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{where}: is no record of a generation; move the file away to begin anew")
    return record


def _check_header(path: pathlib.Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in {**found, **wanted}:
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{path}: holds generations with {name}={found.get(name)!r}, and asked for is {wanted.get(name)!r}; "
                "take another --report, or move the file away to begin anew"
            )
