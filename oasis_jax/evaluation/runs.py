"""From workdirs and pretrained models to a report: load each, measure it on its text, write down what was found.
Several processes compute together, the first one writes.
"""

import itertools
import json
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from oasis_jax.errors import UserError, printable
from oasis_jax.evaluation import DEFINITIONS, Evaluator, bootstrap, choose
from oasis_jax.evaluation import evaluate as evaluate_decoder
from oasis_jax.evaluation.interventions import INTERVENTIONS, intervene
from oasis_jax.evaluation.interventions import choose as choose_interventions
from oasis_jax.evaluation.quantization import Scheme, parse_schemes, quantization
from oasis_jax.evaluation.report.comparison import MeasuredRun, groups, not_comparable
from oasis_jax.evaluation.report.page import write_report
from oasis_jax.evaluation.report.views import look
from oasis_jax.evaluation.subjects import ModelOptions, Subject, subject_of_run, subjects_of_model
from oasis_jax.evaluation.tasks.table import prepare, run_tasks
from oasis_jax.overrides import parse_overrides
from oasis_jax.storage import Mirror, as_path, is_remote
from oasis_jax.training.distributed import is_first, wait_for_all
from oasis_jax.training.limits import refuse_links
from oasis_jax.training.load import load_run

_DEFAULT_OPTIONS = ModelOptions()

# What a report is, beside the folders of tasks.
_WRITES = ("index.html", "metrics.json", "metrics.json.partial", "figures", "figures/*")


def evaluate(
    workdirs: Sequence[str | os.PathLike],
    report: str | os.PathLike[str],
    *,
    models: Sequence[str] = (),
    options: ModelOptions = _DEFAULT_OPTIONS,
    num_batches: int | None = None,
    measures: Sequence[str] = ("default",),
    interventions: Sequence[str] = (),
    quantize: Sequence[str] = (),
    overrides: Iterable[str] = (),
    tasks: Sequence[str] = (),
    task_settings: Mapping[str, Any] = MappingProxyType({}),
    unwritten: Callable[[Sequence[MeasuredRun]], None] | None = None,
) -> list[MeasuredRun]:
    """Measures runs and pretrained models and writes report/metrics.json, report/index.html and report/figures/*.png.

    Every process of a distributed run has to call it; the first one writes.

    Args:
      workdirs: of trained runs; each is loaded from its newest whole checkpoint.
      report: folder, made where it is missing; one in gs:// or s3:// is written here and uploaded after each model.
      models: sources of pretrained models; see `oasis_jax.load_pretrained`.
      options: what models read and what is done to them.
      num_batches: held-out batches to read of a run; None: as many as its own evaluations (run.eval_batches).
      measures: names of families of measures; "default" and "all" stand for several.
      interventions: names of interventions, or "all"; see `oasis_jax.evaluation.interventions`.
      quantize: quantization schemes such as "w8a8_tensor" or "w4a8+smooth"; each is measured beside float.
      overrides: "section.field=value" of how models are computed, such as "mesh.fsdp=8"; by default all devices split
        the batch.
      tasks: names of `oasis_jax.evaluation.tasks.table.TASKS`: what each source is scored on as it is, in float and
        under each scheme. Their texts are kept in report/<task>/; what an interrupted evaluation has left is not made
        again.
      task_settings: fields of the tasks' settings, such as {"gsm8k_file": "test.jsonl"}.
      unwritten: shows what was measured where metrics.json cannot be written, or not be uploaded.

    Raises:
      UserError: a workdir twice or without a run, a model that cannot be read, a corpus that is not the run's, an
        unknown measure, intervention, scheme or task, an override of what was trained, a report that cannot be
        written, a stored data.pattern that leads elsewhere.
    """
    if num_batches is not None and num_batches < 1:
        raise UserError(f"--batches: must be at least 1, got {num_batches}")
    evaluators, interventions = choose(measures, "--measures"), choose_interventions(interventions, "--interventions")
    schemes = parse_schemes(quantize)
    prepared = prepare(tasks, task_settings, quantize)
    labels, overrides = unique_labels(workdirs, models), list(overrides)
    pattern = parse_overrides(overrides).get("data", {}).get("pattern")
    mirror = Mirror(report, "--report", last=("index.html",))
    folder = mirror.folder
    if is_first():
        _check_writable(folder, tasks)
    loaded = [load_run(workdir, overrides=overrides) for workdir in workdirs]  # all, before the first is measured
    subjects = itertools.chain(
        (subject_of_run(*of, num_batches, pattern) for of in zip(loaded, map(str, workdirs), labels)),
        *(subjects_of_model(model, label, options) for model, label in zip(models, labels[len(workdirs) :])),
    )
    runs = []
    for subject in subjects:
        runs.append(measure_subject(subject, evaluators, interventions, schemes))
        if is_first():  # what is measured is written before anything else can go wrong
            try:
                _write_metrics(runs, folder, complete=False)
                mirror.upload()
            except UserError as error:  # by the end there may be room again
                print(printable(str(error)), file=sys.stderr)
    if prepared:
        runs = _with_tasks(runs, [*map(str, workdirs)], prepared, folder, quantize, options)
    if is_first():
        try:
            _write_metrics(runs, folder, complete=True)
            for problem in write_report(runs, folder):
                print(printable(f"{problem}; all numbers are in {folder / 'metrics.json'}"), file=sys.stderr)
            mirror.upload()
        except UserError:
            if unwritten:
                unwritten(runs)
            raise
    wait_for_all("the report is written")
    return runs


def _with_tasks(
    runs: Sequence[MeasuredRun],
    workdirs: Sequence[str],
    tasks: Mapping[str, Any],
    folder: pathlib.Path,
    schemes: Sequence[str],
    options: ModelOptions,
) -> list[MeasuredRun]:
    """The runs with what tasks say of them. A run is loaded as it computes, a model as the options say."""
    found = []
    for run in runs:
        how: dict[str, Any] = dict(dtype=options.dtype, begin_token=options.begin_token, mesh=options.mesh)
        if run.workdir in workdirs:
            mesh = run.config.mesh if jax.device_count() > 1 else None
            how = dict(dtype=None, begin_token="auto", mesh=mesh)
        results = run_tasks(tasks, run.workdir, run.label, folder, schemes, **how)
        found.append(run._replace(tasks=_finite(results)))
    return found


def _write_metrics(runs: Sequence[MeasuredRun], folder: pathlib.Path, *, complete: bool) -> None:
    text = json.dumps({"complete": complete, **as_json(runs)}, indent=1, allow_nan=False, ensure_ascii=False)
    partial = folder / "metrics.json.partial"
    try:
        partial.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        partial.replace(folder / "metrics.json")
    except OSError as error:
        raise UserError(f"--report: cannot write {str(folder / 'metrics.json')!r}: {error.strerror}") from None


def unique_labels(workdirs: Sequence[str | os.PathLike], models: Sequence[str] = ()) -> list[str]:
    """The shortest ends of the paths that tell them apart; raises UserError where two are one folder, or
    there is none.
    """
    sources = [("--workdir", workdir) for workdir in workdirs] + [("--model", model) for model in models]
    if not sources:
        raise UserError("--workdir or --model: give at least one")
    paths = [path if is_remote(path := as_path(source, flag)) else path.resolve() for flag, source in sources]
    for index, ((flag, source), path) in enumerate(zip(sources, paths)):
        if path in paths[:index]:
            raise UserError(f"{flag}: {str(source)!r} is given twice")
    named = [path.with_suffix("") if path.suffix == ".gguf" else path for path in paths]
    for count in range(1, max(len(path.parts) for path in named) + 1):
        # bytes of a name that are no UTF-8 stand as \xff, which every font and terminal has
        labels = [os.fsencode("/".join(path.parts[-count:])).decode(errors="backslashreplace") for path in named]
        if len(set(labels)) == len(labels):
            break
    return labels


def _check_writable(folder: pathlib.Path, tasks: Sequence[str]) -> None:
    """Before anything is measured."""
    refuse_links(folder, [*_WRITES, *(f"{name}{inside}" for name in tasks for inside in ("", "/*", "/*/*"))])
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--report: cannot write to {str(folder)!r}: {error.strerror}") from None


@np.errstate(all="ignore")  # of a diverged model numbers are NaN, which is what is said of them
def measure_subject(
    subject: Subject,
    evaluators: Mapping[str, Evaluator],
    interventions: Sequence[str] = (),
    schemes: Mapping[str, Scheme] = MappingProxyType({}),
) -> MeasuredRun:
    """Runs evaluators, interventions and quantization schemes on what a subject reads."""
    if is_first():
        print(printable(f"measuring {subject.label} ..."), file=sys.stderr, flush=True)
    batches, model = subject.batches, (subject.params, subject.config.model, subject.placement)
    measurements = evaluate_decoder(*model, batches, evaluators)
    effects = []
    if interventions:
        effects = intervene(*model, batches, interventions=interventions, begin_token=subject.begin_token)
    metrics, sequences = measurements.values, measurements.identity["sequences"]
    quantized = {}
    if schemes:
        loss = measurements.estimates.get("loss")
        base = loss and {"loss": loss.totals[:, 0], "weight": loss.counts[:, 0]}
        quantized = quantization(*model, batches, subject.calibration(), schemes, base)
    return MeasuredRun(
        label=subject.label,
        workdir=subject.source,
        step=subject.step,
        config=subject.config,
        corpus=subject.corpus,
        tokenizer=subject.tokenizer and subject.tokenizer.identity,
        samples={"sequences": sequences, "positions": sequences * measurements.identity["positions"]},
        metrics={name: _finite(metrics.get(name)) for name in DEFINITIONS},
        absent={name: _why_absent(name, metrics) for name in DEFINITIONS if _finite(metrics.get(name)) is None},
        history=subject.history,
        versions=subject.versions,
        measurements=measurements,
        intervals={name: interval and _finite(list(interval)) for name, interval in measurements.intervals().items()},
        interventions=effects,
        view=_finite(look(*model, batches[0], subject.tokenizer)),
        quantization=_finite(quantized),
        notes=subject.notes,
        parameters=sum(x.size for x in jax.tree.leaves(subject.params)),
    )


def _finite(value):
    """None in place of numbers that JSON does not have: a diverged model."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _why_absent(name: str, metrics: Mapping) -> str:
    if name not in metrics:
        return "not measured: --measures does not name it"
    return (
        f"not applicable: only for {DEFINITIONS[name]['applies_to']}"
        if metrics[name] is None
        else f"not finite: {metrics[name]}"
    )


def as_json(runs: Sequence[MeasuredRun]) -> dict:
    """What metrics.json holds: of every run or model each value, its definition and the samples it was read from."""
    return {
        "comparable": [[_key(run, runs) for run in group] for group in groups(runs)],
        "note": not_comparable(runs),
        "intervals": bootstrap.DESCRIPTION,
        "paired": _paired(runs),
        "runs": {_key(run, runs): _run_as_json(run) for run in runs},
    }


def _key(run: MeasuredRun, runs: Sequence[MeasuredRun]) -> str:
    """A run is called by its workdir; the forms of one model by their labels."""
    return run.workdir if sum(other.workdir == run.workdir for other in runs) == 1 else run.label


def _paired(runs: Sequence[MeasuredRun]) -> list[dict]:
    """Every two runs: the differences of their scalars with intervals, or why these two cannot be paired."""
    found = []
    for one, other in itertools.combinations([run for run in runs if run.measurements], 2):
        first, second = one.measurements, other.measurements
        try:
            pair = {
                "differences": bootstrap.paired_differences(
                    first.estimates, second.estimates, (first.identity, second.identity)
                )
            }
        except UserError as error:
            pair = {"refused": str(error)}
        found.append({"first": _key(one, runs), "second": _key(other, runs), **_finite(pair)})
    return found


def _run_as_json(run: MeasuredRun) -> dict:
    metrics = {}
    for name, definition in DEFINITIONS.items():
        reason = {"reason": run.absent[name]} if name in run.absent else {}
        interval = {"interval": run.intervals[name]} if run.intervals.get(name) else {}
        metrics[name] = {"value": run.metrics[name], **interval, **reason, **definition, "samples": run.samples}
    return {
        "label": run.label,
        "source": run.workdir,
        "notes": list(run.notes),
        "step": run.step,
        "preset": run.config.model.preset,
        "parameters": run.parameters,
        "corpus": run.corpus,
        "tokenizer": run.tokenizer,
        "versions": run.versions,
        "read": run.measurements and run.measurements.identity,
        "metrics": metrics,
        "interventions": [
            _finite(effect._asdict()) | {"what": INTERVENTIONS[effect.intervention], "samples": run.samples}
            for effect in run.interventions
        ],
        "quantization": run.quantization,
        "tasks": dict(run.tasks),
        "view": run.view,
    }
