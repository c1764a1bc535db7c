"""What the models of a report are, and in what they differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from oasis_jax.config import to_dict
from oasis_jax.evaluation.report.comparison import MeasuredRun, method
from oasis_jax.evaluation.report.markup import chip, escaped, html_table

_MOST_ROWS = 40
# Fields that follow from others, or say how a run is computed and kept and not what it is.
_LEFT_OUT = (
    *("model.preset", "mesh.", "run.log_interval", "run.telemetry_interval", "run.tensorboard", "run.wandb"),
    "run.keep_",
)


def tokens_trained(run: MeasuredRun) -> int | None:
    """Tokens (or vectors) that a run has read; None for a model of others, which does not say."""
    return None if run.notes else run.step * run.config.data.batch_size * run.config.data.sequence_length


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def differing(runs: Sequence[MeasuredRun]) -> dict[str, list[object]]:
    """Field of the config, or what follows from it -> its value in every run, where they are not all the same."""
    configs = [_flat(to_dict(run.config)) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    fields = {name: [config.get(name, "") for config in configs] for name in names if not name.startswith(_LEFT_OUT)}
    versions = dict.fromkeys(name for run in runs for name in run.versions)
    fields |= {name: [run.versions.get(name, "") for run in runs] for name in versions}
    return {name: values for name, values in fields.items() if any(value != values[0] for value in values)}


def what_differs(runs: Sequence[MeasuredRun]) -> str:
    """The first thing to know of a comparison: size, length of training, and every field that is not the same."""
    sizes = {
        "parameters": [f"{run.parameters:,}" if run.parameters else "" for run in runs],
        "tokens trained on": ["" if (n := tokens_trained(run)) is None else f"{n:,}" for run in runs],
    }
    fields = differing(runs)
    rows = sizes | {name: [_short(value) for value in values] for name, values in list(fields.items())[:_MOST_ROWS]}
    heads = ["", *(f"{chip(index)}&nbsp;{escaped(run.label)}" for index, run in enumerate(runs))]
    table = html_table(heads, [[escaped(cell) for cell in (name, *values)] for name, values in rows.items()], left=1)
    more = f"; {len(fields) - _MOST_ROWS} more fields differ" if len(fields) > _MOST_ROWS else ""
    note = f"Fields of the configs and versions that are not the same{more}." if len(runs) > 1 else ""
    title = "What differs" if len(runs) > 1 else "What it is"
    return f"<section><h2>{title}</h2><p class='note'>{note}</p>{table}</section>\n"


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def origins(runs: Sequence[MeasuredRun]) -> str:
    """Where each run comes from, what it read, and what it was made with."""
    entries = "".join(
        f"<dt>{escaped(run.label)}</dt><dd>{escaped(run.workdir)}, "
        f"{escaped('; '.join(run.notes)) if run.notes else f'step {run.step}'}; preset "
        f"{escaped(method(run.config))}, {run.config.model.num_layers} layers, "
        f"width {run.config.model.width}; corpus {escaped(run.corpus['name'])}, sha256 "
        f"{escaped(run.corpus['sha256'][:12])}; "
        f"read {run.samples['sequences']} sequences, {run.samples['positions']} positions; "
        f"{escaped(', '.join(f'{name} {version}' for name, version in run.versions.items()))}.</dd>"
        for run in runs
    )
    return f"<section><details><summary>Where the runs come from</summary><dl>{entries}</dl></details></section>\n"
