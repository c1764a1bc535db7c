"""The numbers of a study in one file, a line a cell: what is passed on, and what another machine goes on from."""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Sequence

from oasis_jax.errors import UserError
from oasis_jax.reading import read_bytes
from oasis_jax.study.cells import RESULT, Record, check_all_alike, finished, write_json
from oasis_jax.study.design import CELLS, NAME, Cell, Study

KEPT = "cells.jsonl"


def compact(record: Record) -> Record:
    """A record as it is kept in one line: its numbers to 6 digits, its start by a digest. One that is, is itself."""
    if "sha256" in record["start"]:
        return record
    start = json.dumps(record["start"]["parameters"], sort_keys=True).encode()
    return {
        **record,
        "values": {name: float(f"{value:.6g}") for name, value in record["values"].items()},
        "start": {
            "sha256": hashlib.sha256(start).hexdigest()[:16],
            "steps": record["start"]["settings"]["run"]["steps"],
        },
    }


def kept_records(study: Study, out: pathlib.Path) -> list[Record]:
    """The compact records of the cells that are done here; where there is no folder of cells, those that KEPT holds.

    Raises:
      UserError: cells that did not start alike, or a file that cannot be read.
    """
    if (out / CELLS).is_dir() or not (out / KEPT).exists():
        records = list(finished(study, out))
        check_all_alike(records, study.factors)
        return [compact(record) for record in records]
    return _read(out / KEPT)


def write_kept(records: Sequence[Record], out: pathlib.Path) -> None:
    """Writes KEPT, whole or not at all; raises OSError."""
    partial = out / f"{KEPT}.{os.getpid()}.partial"
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.replace(out / KEPT)


def take_up_kept(study: Study, out: pathlib.Path) -> None:
    """Makes done cells of the lines of KEPT, where a folder has those and no cells yet: nothing in it is done twice.

    Raises:
      UserError: a line that is none, or one of this study's cells under other settings.
    """
    if (out / CELLS).exists() or not (out / KEPT).exists():
        return
    identity = {cell: study.identity(cell) for cell in study.cells()}
    partial = out / f"{CELLS}.{os.getpid()}.partial"
    try:
        for record in _read(out / KEPT):
            cell = Cell(record["arm"], record["method"], record["seed"])
            if record["identity"] != identity.get(cell, record["identity"]):
                raise UserError(
                    f"--out: {str(out / KEPT)!r} holds another study: the settings of {cell.path} were others; take "
                    "another folder"
                )
            folder = partial / cell.path
            folder.mkdir(parents=True)
            write_json(folder / RESULT, record)
        try:
            (partial / CELLS).rename(out / CELLS)  # at once: whoever comes later finds all or nothing
        except OSError:
            if not (out / CELLS).is_dir():  # nor has another process been first
                raise
    except OSError as error:
        raise UserError(f"--out: cannot write to {str(out)!r}: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(path: pathlib.Path) -> list[Record]:
    """The lines of KEPT, which somebody else may have written: their names become folders."""
    records = []
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            record = json.loads(line)
            names = all(NAME.fullmatch(record[name]) for name in ("arm", "method"))
            if not (names and isinstance(record["seed"], int) and record["identity"] and record["start"]["sha256"]):
                raise ValueError("names no cell")
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"--out: {str(path)!r}, line {number} is no cell of a study: {what}") from None
        records.append(record)
    return records
