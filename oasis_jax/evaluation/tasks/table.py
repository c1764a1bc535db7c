"""The table of tasks of `oasis_jax eval --tasks`, and how each is run on every model, in float and quantized."""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from oasis_jax.config import MeshConfig
from oasis_jax.errors import UserError, printable, unknown_name
from oasis_jax.evaluation.quantization import check_texts
from oasis_jax.evaluation.tasks import gsm8k
from oasis_jax.evaluation.tasks.loading import load_model

# Name -> (its settings, what reads its files and runs it). A new task is one file and one line here.
TASKS = {
    "gsm8k": (gsm8k.Settings, gsm8k.Task.of),
}


def prepare(names: Sequence[str], given: Mapping[str, Any], schemes: Sequence[str]) -> dict[str, Any]:
    """Tasks by name, with their files read and their settings checked, before any model is loaded.

    Args:
      given: fields of the tasks' settings, as far as they are given.

    Raises:
      UserError: an unknown task, one twice, settings that cannot be, a scheme under which no text is made.
    """
    tasks = {}
    for name in names:
        if name not in TASKS:
            raise unknown_name("--tasks", name, TASKS)
        if name in tasks:
            raise UserError(f"--tasks: {name!r} is given twice")
        settings, read = TASKS[name]
        tasks[name] = read(settings(**given))
    for scheme in schemes if tasks else ():
        check_texts(scheme)
    if tasks and jax.process_count() > 1:
        raise UserError("--tasks: run in one process; split a model over its devices with --set mesh.tensor")
    return tasks


def run_tasks(
    tasks: Mapping[str, Any],
    source: str,
    label: str,
    folder: pathlib.Path,
    schemes: Sequence[str],
    *,
    dtype: str | None,
    begin_token: str,
    mesh: MeshConfig | None,
) -> dict[str, dict[str, dict]]:
    """What each task says of a model: {task: {"float" or scheme: result}}; texts go to folder/task/label/scheme.jsonl.

    Raises:
      UserError: see `load_model` and the tasks' own.
    """
    results: dict[str, dict[str, dict]] = {name: {} for name in tasks}
    for scheme in ["", *schemes] if tasks else ():
        model = load_model(source, dtype=dtype, mesh=mesh, begin_token=begin_token, quantize=scheme)
        how = scheme or "float"
        for name, task in tasks.items():
            print(printable(f"{name}: {label}, {how} ..."), file=sys.stderr, flush=True)
            path = folder / name / label.strip("/").replace("/", "__") / f"{how}.jsonl"
            results[name][how] = task.run(model, path, f"{name} {label} {how}")
    return results
