"""Checkpoints that say what they are: arrays, the place in the data, the full config, tokenizer, corpus and
versions.
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import pathlib
import platform
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN, PreservationPolicy

from oasis_jax.config import Config, RunConfig, from_dict, sections, to_dict
from oasis_jax.data import Corpus, Tokenizer
from oasis_jax.errors import UserError
from oasis_jax.training.distributed import is_first, wait_for_all
from oasis_jax.training.state import TrainState, abstract_state

_PACKAGES = ("oasis_jax", "jax", "flax", "optax", "orbax-checkpoint")
# What may be another when a run is resumed: how it computes and what it shows, never what it computes. The files of a
# pattern are compared by content. run.steps shapes the schedule, so it joins them only where the schedule is constant.
MAY_DIFFER = {
    *("model.remat", "model.stack", "model.attention_implementation", "model.depth_implementation"),
    *("data.pattern", "optimizer.accumulation_steps"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence", "mesh.rules"),
    *("run.log_interval", "run.telemetry_interval", "run.eval_interval", "run.eval_batches"),
    *("run.checkpoint_interval", "run.keep_checkpoints", "run.keep_every", "run.keep_best", "run.tensorboard"),
    *("optimizer.nonfinite", "optimizer.nonfinite_limit"),
}
# Filled in from the data: 0 in a config means what the checkpoint has.
_FROM_DATA = ("vocab_size", "vector_dim")

_FILE_LIST = "files.json"
# How parameters are named and laid out, see oasis_jax.model.decoder and layout; another number with every change of it.
_LAYOUT = "2: embedding, head, layers, routers, final_norm"

T = TypeVar("T")


class Resumed(NamedTuple):
    """A run as its newest whole checkpoint has it."""

    step: int
    state: TrainState
    data_state: dict  # of the training iterator
    tokenizer: Tokenizer | None
    corpus_identity: dict


def versions() -> dict[str, str]:
    """What is running: versions of Python and of the packages that decide what is computed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe(config: Config, corpus: Corpus) -> dict:
    """What every checkpoint of a run says about itself, JSON-able."""
    tokenizer = corpus.tokenizer and {"identity": corpus.tokenizer.identity, "json": corpus.tokenizer.to_json()}
    return {
        "config": to_dict(config),
        "corpus": corpus.identity,
        "tokenizer": tokenizer,
        "versions": versions(),
        "layout": _LAYOUT,
    }


def differing_fields(asked: Config, stored: Config) -> list[str]:
    """In words, every field in which a config differs from a checkpoint's and must not; see `MAY_DIFFER`."""
    free = MAY_DIFFER | (
        {"run.steps"} if asked.optimizer.schedule == stored.optimizer.schedule == "constant" else set()
    )
    found = []
    for section, cls in sections().items():
        for field in dataclasses.fields(cls):
            name = f"{section}.{field.name}"
            new, old = (getattr(getattr(config, section), field.name) for config in (asked, stored))
            unset = field.name in _FROM_DATA and new == 0
            if new != old and name not in free and not unset:
                found.append(f"{name} is {old!r} there, {new!r} now")
    return found


def check_corpus(corpus: Corpus, identity: dict) -> None:
    """Raises UserError, naming what differs, where a corpus is not the one of a checkpoint."""
    differing = [name for name in {**identity, **corpus.identity} if identity.get(name) != corpus.identity.get(name)]
    if differing:
        found = "; ".join(f"{name} was {identity.get(name)!r}, is {corpus.identity.get(name)!r}" for name in differing)
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


def _one_line(error: Exception) -> str:
    """The start of what a failed restore says; its full text holds tracebacks of the storage library."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."


class Keep(NamedTuple):
    """Which checkpoints stay: the newest, those of every so many steps (0: none), and those with the lowest loss (0:
    none).
    """

    latest: int
    every: int = 0
    best: int = 0

    @classmethod
    def of(cls, run: RunConfig) -> "Keep":
        return cls(run.keep_checkpoints, run.keep_every, run.keep_best)

    def policy(self) -> PreservationPolicy:
        policies = [LatestN(self.latest)]
        if self.every:
            policies.append(EveryNSteps(self.every))
        if self.best:
            policies.append(
                BestN(
                    get_metric_fn=lambda metrics: metrics["loss"],
                    reverse=True,
                    n=self.best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return AnyPreservationPolicy(policies)


class Checkpoints:
    """The checkpoints of a workdir, written in the background, each one whole or not there; a context manager.

    Args:
      workdir: an existing folder.
      keep: which checkpoints stay; None: the folder is only read.
      say: prints one line about a checkpoint that is passed over.
    """

    def __init__(self, workdir: pathlib.Path, *, keep: Keep | None, say: Callable[[str], None]):
        self.folder, self._broken_folder, self._say = workdir / "checkpoints", workdir / "checkpoints_broken", say
        if keep is not None and is_first():
            # What a killed save left. The manager would do it in a thread that nobody waits for when a run ends before
            # its first save.
            for unfinished in self.folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(unfinished)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(None) if keep is None else keep.policy(),
            create=keep is not None,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._list_files),
        )
        wait_for_all("unfinished checkpoints are removed")
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *exception) -> None:
        try:
            with self._storage():
                self._manager.close()
        except UserError:
            if kind is None:  # else what ended the run is said already
                raise

    @contextlib.contextmanager
    def _storage(self) -> Iterator[None]:
        """Says in a line what the storage library could not write."""
        try:
            yield
        except (UserError, AssertionError):
            raise
        # the storage library has no one kind of error; on other processes it repeats the text of the first's
        except Exception as error:
            full = "No space left on device" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
            why = "the disk is full" if full else _one_line(error)
            raise UserError(
                f"{self.folder}: checkpoint {self._saving} could not be written: {why}; {self.last_good()}"
            ) from error

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def last_good(self) -> str:
        """In words, where a run that has to stop can go on from."""
        good = self.steps()
        return f"the last good checkpoint is step {good[0]} in {self.folder}" if good else "there is no checkpoint yet"

    def wait(self) -> None:
        """Returns when the checkpoint that is being written is whole.

        Raises:
          UserError: it could not be written, because the disk is full or the like.
        """
        with self._storage():
            self._manager.wait_until_finished()

    def save(
        self, state: TrainState, *, step: int, data_state: dict, description: dict, loss: float | None = None
    ) -> None:
        """Starts to write a checkpoint; returns when the state's arrays may be given up.

        Args:
          state: what is saved, after `step`.
          data_state: of the training iterator.
          description: see `describe`.
          loss: on held-out data, for `Keep.best`.

        Raises:
          UserError: this checkpoint or the one before could not be written, because the disk is full or the like.
        """
        rest = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
        self.wait()
        self._saving = step
        self._check_space(state)
        with self._storage():
            saved = self._manager.save(
                step,
                metrics=None if loss is None else {"loss": loss},
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    rest=ocp.args.StandardSave(rest),
                    metadata=ocp.args.JsonSave(description | {"data_state": data_state}),
                ),
            )
        if not saved:
            raise RuntimeError(f"checkpoint {step} was not saved; there are {self.steps()}")

    def _check_space(self, state: TrainState) -> None:
        """A disk that is full is found here, not by the storage library's threads, whose complaints fill the
        terminal.
        """
        needed = sum(x.nbytes for x in jax.tree.leaves(state._replace(rng=None)))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.folder}: no room for checkpoint {self._saving}: it takes up to {needed / 2**20:.1f} MiB, "
                f"{free / 2**20:.1f} MiB are free; "
                f"{self.last_good()}"
            )

    def _list_files(self) -> None:
        """Leaves a list of what was written in the checkpoint, before it gets its final name."""
        if not is_first():
            return
        (folder,) = (path for path in self.folder.iterdir() if path.name.split(".")[0] == str(self._saving))
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.glob("*/**/*") if path.is_file()
        }
        (folder / _FILE_LIST).write_text(json.dumps(files))

    def _check_files(self, step: int) -> None:
        """Raises an error where a file of the checkpoint is missing or has another size than it was written with.

        Reading arrays from damaged files fails too, but fills the terminal with what the storage library's threads have
        to say.
        """
        folder = self.folder / str(step)
        if not (folder / _FILE_LIST).exists():
            raise ValueError(f"{_FILE_LIST} is missing")
        for name, size in json.loads((folder / _FILE_LIST).read_text()).items():
            found = (folder / name).stat().st_size if (folder / name).exists() else None
            if found != size:
                raise ValueError(f"{name} {'is missing' if found is None else f'has {found} bytes instead of {size}'}")

    def metadata(self, step: int) -> dict:
        """What a checkpoint says about itself, as `describe` made it, and its "data_state"."""
        found = self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())).metadata
        missing = [name for name in ("config", "corpus", "tokenizer", "versions") if name not in (found or {})]
        if missing:
            raise UserError(
                f"{self.folder}: checkpoint {step} does not say its {', '.join(missing)}; without that its model "
                "cannot be built and measured"
            )
        if found.get("layout") != _LAYOUT:
            raise UserError(
                f"{self.folder}: checkpoint {step} holds its parameters in the layout {found.get('layout')!r}, this "
                f"version reads {_LAYOUT!r}; use the oasis_jax that wrote it "
                f"({found['versions'].get('oasis_jax')}), or take another workdir"
            )
        return found

    def params(self, step: int, abstract: dict) -> dict:
        """Only the parameters of a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract))).params

    def state(self, step: int, abstract: TrainState) -> TrainState:
        """The state of a checkpoint, laid out as `abstract` says."""
        rest = {"step": abstract.step, "opt_state": abstract.opt_state, "rng": abstract.rng}
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params), rest=ocp.args.StandardRestore(rest)
            ),
        )
        return TrainState(params=restored.params, **restored.rest)

    def first_whole(self, restore: Callable[[int], T], steps: list[int]) -> tuple[T, list[int]]:
        """restore(step) of the first of these steps that it can read, and the ones before that it cannot,
        each named in a line.

        Raises:
          UserError: none is whole, or `restore` refuses a whole one.
        """
        broken = {}
        for step in steps:
            try:
                self._check_files(step)
                found = restore(step)
            except UserError:
                raise
            except Exception as error:  # the storage library has no one kind of error for damaged contents
                broken[step] = _one_line(error)
                continue
            for bad, reason in broken.items():
                self._say(f"checkpoint {bad} is not whole, step {step} is used instead: {reason}")
            return found, list(broken)
        reasons = "; ".join(f"{step}: {reason}" for step, reason in broken.items())
        raise UserError(f"{self.folder}: no whole checkpoint ({reasons}); restore one or take another workdir")

    def resume(self, config: Config, mesh: Mesh) -> Resumed | None:
        """The run of this workdir, on this mesh; None where there is no checkpoint. Broken newer ones are
        moved aside.

        Raises:
          UserError: the checkpoint's run is another one (the differing fields are named), or none is whole.
        """
        if not self.steps():
            return None

        def restore(step: int) -> Resumed:
            metadata = self.metadata(step)
            stored = stored_config(metadata)
            differing = differing_fields(config, stored)
            if differing:
                raise UserError(
                    f"{self.folder.parent} holds a run with another config: {'; '.join(differing)}; take these "
                    "values or another workdir"
                )
            self._compare_versions(metadata["versions"])
            state = self.state(step, abstract_state(dataclasses.replace(stored, mesh=config.mesh), mesh))
            return Resumed(step, state, metadata["data_state"], stored_tokenizer(metadata), metadata["corpus"])

        resumed, broken = self.first_whole(restore, self.steps())
        for step in broken:
            self._move_aside(step)
        return resumed

    def _compare_versions(self, stored: dict[str, str]) -> None:
        changed = [
            f"{name} {stored.get(name)} -> {version}"
            for name, version in versions().items()
            if stored.get(name) != version
        ]
        if changed:
            self._say(
                f"versions changed since the checkpoint ({', '.join(changed)}): losses may differ in their last bits"
            )

    def _move_aside(self, step: int) -> None:
        """Frees the step's name for the checkpoint that will come again, without destroying what is left of the old
        one.
        """
        if is_first():
            self._broken_folder.mkdir(exist_ok=True)
            there = {path.name for path in self._broken_folder.iterdir()}
            names = (f"{step}{suffix}" for suffix in ("", *(f"-{i}" for i in range(1, len(there) + 1))))
            (self.folder / str(step)).rename(self._broken_folder / next(name for name in names if name not in there))
        wait_for_all(f"broken checkpoint {step} is moved aside")
        self._manager.reload()
