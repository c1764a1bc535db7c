"""What a study writes down as JSON, read again only as it was written: a changed bit is no other result."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from oasis_jax.errors import UserError
from oasis_jax.reading import read_bytes, with_checksum, without_checksum
from oasis_jax.study.design import NAME

Record = dict[str, Any]

# What a record has, see `oasis_jax.study.cells.run_cell`, and what of it may be null.
_KINDS = {
    "arm": str,
    "method": str,
    "seed": int,
    "values": dict,
    "destroyed": list,
    "failed": str | None,
    "start": dict,
    "corpus": str | None,
    "versions": dict | None,
    "identity": str,
}


def read_json(path: pathlib.Path) -> Record | None:
    """What a file of a study holds, None where there is none; raises UserError for one that is damaged. Files of
    earlier versions have no checksum.
    """
    try:
        found = json.loads(read_bytes(path))
        if not isinstance(found, dict):
            raise ValueError(f"expected a JSON object, got {type(found).__name__}")
        return without_checksum(found)
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all, with a checksum."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    text = json.dumps(with_checksum(value), indent=1)
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"--out: cannot write {str(path)!r}: {error.strerror}") from None


def read_record(path: pathlib.Path) -> Record | None:
    """The record of a cell, as `read_json` reads it."""
    found = read_json(path)
    if found is not None:
        problem = _problem(found)
        start = {} if problem else found["start"]
        settings = start.get("settings")
        whole = isinstance(start.get("parameters"), dict) and _is_settings(settings)
        if not problem and not (whole or _is_compact(start)):
            problem = "it does not say what the cell started from"
        if problem:
            raise _damaged(path, problem)
    return found


def read_lines(path: pathlib.Path) -> list[Record]:
    """Compact records, one a line.

    Raises:
      UserError: a line that is none.
    """
    try:
        lines = read_bytes(path).decode("utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise UserError(f"--out: cannot read {str(path)!r}: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
            problem = _problem(records[-1])
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if not problem and not _is_compact(records[-1]["start"]):
            problem = "it does not say what the cell started from"
        if problem:
            raise UserError(f"--out: cannot read {str(path)!r}, line {number}: {problem}")
    return records


def _damaged(path: pathlib.Path, why: object) -> UserError:
    return UserError(f"--out: cannot read {str(path)!r}: {why}; delete it and its cell is done again")


def _problem(record: object) -> str:
    """What a record lacks, in words; "": nothing."""
    if not isinstance(record, dict):
        return f"expected a JSON object, got {type(record).__name__}"
    if unknown := sorted(set(record) - set(_KINDS)):
        return f"unknown key {unknown[0]!r}"
    wrong = [name for name, kind in _KINDS.items() if not isinstance(record.get(name, ...), kind)]
    if not wrong:  # these become folders
        wrong = [name for name in ("arm", "method") if not NAME.fullmatch(record[name])]
    if not wrong and not all(type(value) in (int, float) for value in record["values"].values()):
        wrong = ["values"]
    if not wrong and not all(isinstance(scheme, str) for scheme in record["destroyed"]):
        wrong = ["destroyed"]
    return f"{wrong[0]!r} is missing or not of its kind" if wrong else ""


def _is_compact(start: Mapping[str, Any]) -> bool:
    """Whether it is that of a line, see `oasis_jax.study.kept.compact`."""
    return set(start) == {"sha256", "steps"} and isinstance(start["steps"], int)


def _is_settings(found: object) -> bool:
    sections = isinstance(found, dict) and all(isinstance(section, dict) for section in found.values())
    return sections and isinstance(found.get("run", {}).get("steps"), int)
