"""One cell of a study: trained from the start that its companions have, measured, and written down."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from oasis_jax.config import Config, to_dict
from oasis_jax.errors import UserError
from oasis_jax.evaluation import choose
from oasis_jax.evaluation.interventions import choose as choose_interventions
from oasis_jax.evaluation.quantization import parse_schemes
from oasis_jax.evaluation.report.comparison import MeasuredRun
from oasis_jax.evaluation.runs import measure_subject
from oasis_jax.evaluation.subjects import ModelOptions, Subject, subject_of_form, subject_of_run
from oasis_jax.study.design import Cell, Study
from oasis_jax.study.records import Record, read_json, read_record, write_json
from oasis_jax.training.array_checksums import checksums
from oasis_jax.training.load import load_run
from oasis_jax.training.loop import TrainingStopped, fit

RESULT, START, LOG = "result.json", "start.json", "log.txt"


def run_cell(study: Study, cell: Cell, out: pathlib.Path) -> Record:
    """Trains and measures a cell, going on where it was left, or measures a form; what it prints is kept in its folder.

    Returns:
      What RESULT holds: "values", one number each; "destroyed", the schemes under which the model is none any more;
      "failed", in words why there are no values (a diverged model), or None; "start", "versions" and "identity".

    Raises:
      UserError: it does not start as its companions of the same seed do, or something the user can mend.
      Preempted: told to end.
    """
    folder = out / cell.path
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOG, "a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        found = _measured_form(study, cell) if study.source else _trained(study, cell, folder)
    record = cell._asdict() | found | {"identity": study.identity(cell)}
    for method in study.methods:  # its companions: those of the same arm and seed
        if other := read_record(out / cell._replace(method=method).path / RESULT):
            check_alike(record, other, study.factors)
    write_json(folder / RESULT, record)
    return record


def _trained(study: Study, cell: Cell, folder: pathlib.Path) -> Record:
    """A run from its start, or from where it was left, to its measures."""
    config, failed, measured = study.config(cell), None, None
    try:
        fit(config, folder, on_start=lambda params: write_json(folder / START, start_of(config, params)))
        pattern = config.data.pattern  # the study's own, not what the folder says
        subject = subject_of_run(load_run(folder), str(folder), folder.name, study.eval_batches, pattern)
        measured = _measure(study, subject)
    except TrainingStopped as error:
        failed = str(error)
    start = read_json(folder / START)
    if start is None:
        raise UserError(
            f"--out: {str(folder)!r} has a run but no {START}; delete the folder and the cell is done again"
        )
    return _record(measured, failed, start)


def _measured_form(study: Study, cell: Cell) -> Record:
    """A form of the source's model on its part of the text; all begin with that model."""
    reads, form = study.source, study.methods[cell.method]
    options = ModelOptions(
        text=reads.text,
        length=reads.length,
        num_batches=-(-reads.sequences // reads.batch_size) * reads.parts,
        batch_size=reads.batch_size,
    )
    subject = subject_of_form(reads.model, cell.method, options, form.make, (cell.seed, reads.parts))
    settings = {"run": {"steps": 0}, "source": dataclasses.asdict(reads) | {"part": cell.seed}}
    return _record(_measure(study, subject), None, {"parameters": {}, "settings": settings})


def _record(measured: MeasuredRun | None, failed: str | None, start: Record) -> Record:
    return {
        "values": values_of(measured) if measured else {},
        "destroyed": _destroyed(measured) if measured else [],
        "failed": failed,
        "start": start,
        "corpus": measured.corpus["sha256"] if measured else None,
        "versions": measured.versions if measured else None,
    }


def finished(study: Study, out: pathlib.Path) -> Iterator[Record]:
    """The records of all cells that are done, in the study's order."""
    for cell in study.cells():
        path = out / cell.path / RESULT
        if record := read_record(path):
            if (record["arm"], record["method"], record["seed"]) != cell:
                raise UserError(f"--out: {str(path)!r} is that of another cell; delete it and its cell is done again")
            yield record


# Equal starts


def start_of(config: Config, params: Mapping[str, Any]) -> Record:
    """What a run starts from: a checksum of every parameter with its shape, and all of its config but the model."""
    sums = checksums(params)
    shapes = {name: list(x.shape) for name, x in _named(params)}
    rest = {section: values for section, values in to_dict(config).items() if section != "model"}
    return {
        "parameters": {name: [*shapes[name], value] for name, value in sums.items()},
        "settings": json.loads(json.dumps(rest)),
    }


def _named(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_alike(one: Record, other: Record, factors: tuple[str, ...]) -> None:
    """Raises UserError where two cells of one arm and seed differ in more than their model: in what data they read in
    which order, steps, optimizer, or in the first value of a parameter that both have in the same shape. Of a cell that
    is kept in one line (`kept.compact`) only the data are known.
    """
    cells = f"{one['method']} and {other['method']}, arm {one['arm']}, seed {one['seed']}"
    if one["corpus"] and other["corpus"] and one["corpus"] != other["corpus"]:
        raise UserError(f"unequal start: {cells}: they read different data")
    if "parameters" not in one["start"] or "parameters" not in other["start"]:
        return
    first, second = one["start"]["settings"], other["start"]["settings"]
    for section in first:
        for name, value in first[section].items():
            others = second.get(section, {}).get(name)
            if value != others and f"{section}.{name}" not in factors:
                raise UserError(f"unequal start: {cells}: {section}.{name} is {value!r} and {others!r}")
    theirs = other["start"]["parameters"]
    for name, (*shape, value) in one["start"]["parameters"].items():
        if name not in theirs:
            continue
        *other_shape, other_value = theirs[name]
        if shape == other_shape and value != other_value:
            raise UserError(f"unequal start: {cells}: {name} begins with other values")


def check_all_alike(records: Iterable[Record], factors: tuple[str, ...]) -> None:
    """`check_alike` for every cell and the first one of its arm and seed."""
    first: dict[tuple, Record] = {}
    for record in records:
        check_alike(record, first.setdefault((record["arm"], record["seed"]), record), factors)


# Measures


def _measure(study: Study, subject: Subject) -> MeasuredRun:
    return measure_subject(
        subject,
        choose(study.measures, "study.measures"),
        choose_interventions(study.interventions, "study.interventions"),
        parse_schemes(study.schemes),
    )


def values_of(run: MeasuredRun) -> dict[str, float]:
    """Every single number that was measured of a run, by its name in `Outcome.value`."""
    values = {name: value for name, value in run.metrics.items() if isinstance(value, int | float)}
    for scheme, found in run.quantization.items():
        numbers = {"": found["value"], ".change": found["relative_change"], ".nats": found.get("nats")}
        numbers[".d_sink"] = found.get("d_sink")
        values |= {f"quantized.{scheme}{end}": value for end, value in numbers.items() if value is not None}
    for effect in run.interventions:
        parts = [effect.intervention, effect.family, effect.sublayers, effect.band]
        parts.append("renormalized" if effect.renormalized else None)
        if effect.change is not None:
            values[".".join(["without", *filter(None, parts)])] = effect.change
    return values


def _destroyed(run: MeasuredRun) -> list[str]:
    return [scheme for scheme, found in run.quantization.items() if found.get("destroyed")]
