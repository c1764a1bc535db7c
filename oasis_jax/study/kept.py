"""The numbers of a study in one file, a line a cell: what is passed on, and what another machine goes on from."""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence

from oasis_jax.errors import UserError
from oasis_jax.study.cells import RESULT, check_all_alike, finished
from oasis_jax.study.design import CELLS, Cell, Study
from oasis_jax.study.records import Record, read_lines, write_json

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
    return read_lines(out / KEPT)


def write_kept(records: Sequence[Record], out: pathlib.Path) -> None:
    """Writes KEPT, whole or not at all; raises OSError."""
    partial = out / f"{KEPT}.{os.getpid()}.partial"
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.replace(out / KEPT)


def take_up_kept(out: pathlib.Path, identity: Mapping[str, str]) -> None:
    """Makes done cells of the lines of KEPT, where a folder has those and no cells yet: nothing in it is done twice.

    identity: of the study's cells, by their paths.

    Raises:
      UserError: a line that is none, or one of this study's cells under other settings.
    """
    if (out / CELLS).exists() or not (out / KEPT).exists():
        return
    partial = out / f"{CELLS}.{os.getpid()}.partial"
    try:
        for record in read_lines(out / KEPT):
            cell = Cell(record["arm"], record["method"], record["seed"])
            if record["identity"] != identity.get(cell.path, record["identity"]):
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
