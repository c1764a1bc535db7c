"""What a checkpoint says about itself, JSON-able, and whether a run may go on from it."""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess

from oasis_jax.config import Config, from_dict, sections, to_dict
from oasis_jax.data import Corpus, Tokenizer
from oasis_jax.errors import UserError
from oasis_jax.training.optimizer import learning_rate

_PACKAGES = ("oasis_jax", "jax", "flax", "optax", "orbax-checkpoint")
# What may be another when a run is resumed: how it computes and what it shows, never what it computes. The files of a
# pattern are compared by content. run.steps shapes the schedule and is the one exception: `check_length`.
MAY_DIFFER = {
    *("model.remat", "model.stack", "model.attention_implementation", "model.depth_implementation"),
    *("data.pattern", "optimizer.accumulation_steps"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence", "mesh.rules"),
    *("run.log_interval", "run.telemetry_interval", "run.eval_interval", "run.eval_batches"),
    *(
        "run.checkpoint_interval",
        "run.keep_checkpoints",
        "run.keep_every",
        "run.keep_best",
        "run.tensorboard",
        "run.wandb",
    ),
    *("optimizer.nonfinite", "optimizer.nonfinite_limit", "run.steps"),
}
# Filled in from the data: 0 in a config means what the checkpoint has.
_FROM_DATA = ("vocab_size", "vector_dim")

# How parameters are named and laid out, see oasis_jax.model.decoder and layout; another number with every change of it.
LAYOUT = "2: embedding, head, layers, routers, final_norm"


def versions() -> dict[str, str]:
    """What is running: versions of Python and of the packages that decide what is computed, and the commit of a
    clone.
    """
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | ({"commit": commit} if (commit := _commit()) else {})


@functools.cache
def _commit() -> str:
    """The commit of the clone that this runs from, with a + where files were changed since; '' where there is none."""
    clone = pathlib.Path(__file__).parents[2]
    if not (clone / ".git").exists():
        return ""
    try:
        git = functools.partial(subprocess.run, cwd=clone, capture_output=True, text=True, timeout=10, check=True)
        head = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+" if changed else "")


def describe(config: Config, corpus: Corpus) -> dict:
    """What every checkpoint of a run says about itself, JSON-able."""
    tokenizer = corpus.tokenizer and {"identity": corpus.tokenizer.identity, "json": corpus.tokenizer.to_json()}
    return {
        "config": to_dict(config),
        "corpus": corpus.identity,
        "tokenizer": tokenizer,
        "versions": versions(),
        "layout": LAYOUT,
    }


def differing_fields(asked: Config, stored: Config) -> list[str]:
    """In words, every field in which a config differs from a checkpoint's and must not; see `MAY_DIFFER`."""
    found = []
    for section, cls in sections().items():
        for field in dataclasses.fields(cls):
            name = f"{section}.{field.name}"
            new, old = (getattr(getattr(config, section), field.name) for config in (asked, stored))
            unset = field.name in _FROM_DATA and new == 0
            if new != old and name not in MAY_DIFFER and not unset:
                found.append(f"{name} is {old!r} there, {new!r} now")
    return found


def check_length(asked: Config, stored: Config, step: int, workdir: str | os.PathLike[str]) -> str:
    """In words, what becomes of a run whose checkpoint after `step` is resumed with another run.steps; "" with the
    same. What is left of it follows the schedule of the new length.

    Raises:
      UserError: the checkpoint is beyond the end.
    """
    old, new = stored.run.steps, asked.run.steps
    if step > new:
        raise UserError(
            f"run.steps: {new} asked for, but {workdir} is at step {step} already; go on with --set run.steps=N of at "
            f"least {step}, or take another workdir"
        )
    if old == new:
        return ""
    schedule = asked.optimizer.schedule
    if step == new:
        rates = ""
    elif schedule == "constant":
        rates = "; the learning rate is constant and stays"
    else:
        before, now = (float(learning_rate(asked.optimizer, steps)(step)) for steps in (old, new))
        rates = (
            f"; from here on the {schedule} schedule is that of {new} steps: step {step + 1} has learning rate "
            f"{now:.4g}, not {before:.4g}"
        )
    return f"run.steps: {old} until step {step}, {new} now{rates}"


def check_corpus(corpus: Corpus, identity: dict) -> None:
    """Raises UserError, naming what differs, where a corpus is not the one of a checkpoint."""
    differing = [name for name in {**identity, **corpus.identity} if identity.get(name) != corpus.identity.get(name)]
    if not differing:
        return
    found = "; ".join(f"{name} was {identity.get(name)!r}, is {corpus.identity.get(name)!r}" for name in differing)
    if set(differing) <= {"holdout", "split"}:
        raise UserError(
            f"data: the text is the one this run was trained on, but this version holds out another part of it "
            f"({found}); go on with the version that wrote the run, or take another workdir"
        )
    raise UserError(
        f"data: the corpus is not the one this run was trained on ({found}); restore it or take another workdir"
    )


def stored_config(metadata: dict) -> Config:
    """The config that a checkpoint's `metadata` holds; raises UserError for a field that this version does not know."""
    return from_dict(metadata["config"], metadata["versions"].get("oasis_jax", ""))


def stored_tokenizer(metadata: dict) -> Tokenizer | None:
    """The tokenizer that a checkpoint's `metadata` holds; None for vectors."""
    stored = metadata["tokenizer"]
    if stored is None:
        return None
    tokenizer = Tokenizer.from_json(stored["json"])
    if tokenizer.identity != stored["identity"]:
        raise UserError(f"tokenizer: the checkpoint's says {stored['identity']}, read back it is {tokenizer.identity}")
    return tokenizer
