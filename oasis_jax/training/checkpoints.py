"""Checkpoints that say what they are: arrays, the place in the data, the full config, tokenizer, corpus and
versions.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import LatestN

from oasis_jax.config import Config
from oasis_jax.data import Tokenizer
from oasis_jax.errors import UserError
from oasis_jax.plain_names import plain
from oasis_jax.storage import Path, is_remote, move, remove_tree
from oasis_jax.training import manifest
from oasis_jax.training.array_checksums import checksums, differing
from oasis_jax.training.description import (
    LAYOUT,
    check_length,
    differing_fields,
    stored_config,
    stored_tokenizer,
    versions,
)
from oasis_jax.training.distributed import agreed, is_first, wait_for_all
from oasis_jax.training.keep import Keep, held_out_loss
from oasis_jax.training.quiet import Quiet
from oasis_jax.training.state import TrainState, abstract_state

T = TypeVar("T")
_FILES = 128  # and folders that a checkpoint may have; one of a small model has 44


class Resumed(NamedTuple):
    """A run as its newest whole checkpoint has it."""

    step: int
    state: TrainState
    data_state: dict  # of the training iterator
    tokenizer: Tokenizer | None
    corpus_identity: dict


def _one_line(error: Exception) -> str:
    """The start of what a failed restore says; its full text holds tracebacks of the storage library."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."


def _remove_unfinished(folder: Path) -> None:
    """Removes what a killed save left. The manager would do it in a thread that nobody waits for when a run ends before
    its first save. In an object store a checkpoint is written under its own name, and whole with its last object.
    """
    if is_remote(folder):
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name.isdecimal() and not (path / ocp.path.atomicity.COMMIT_SUCCESS_FILE).exists():
                remove_tree(path)
        return
    for unfinished in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(unfinished)


class Checkpoints:
    """The checkpoints of a workdir, written in the background, each one whole or not there; a context manager.

    Args:
      workdir: an existing folder, or one in gs://.
      keep: which checkpoints stay; None: the folder is only read.
      say: prints one line about a checkpoint that is passed over.
    """

    def __init__(self, workdir: Path, *, keep: Keep | None, say: Callable[[str], None]):
        self.folder, self._broken_folder, self._say = workdir / "checkpoints", workdir / "checkpoints_broken", say
        if keep is not None and is_first():
            _remove_unfinished(self.folder)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(None) if keep is None else keep.policy(),
            create=keep is not None,
            best_fn=held_out_loss,  # without one metrics are not written, and a resumed run would not know them
            lightweight_initialize=True,  # no file of a checkpoint is read before it is looked at
            async_options=ocp.AsyncOptions(post_finalization_callback=self._list_files),
        )
        wait_for_all("unfinished checkpoints are removed")
        self._saving: int | None = None
        self._failed = False  # a write
        self._skipped: set[int] = set()  # checkpoints whose step was
        if keep is not None and not is_remote(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        # The library takes [ ] * ? for patterns, and a backslash for something else than itself.
        place = self.folder if is_remote(self.folder) else plain(self.folder.absolute(), odd="[]*?\\")
        self._manager = ocp.CheckpointManager(place, options=options)
        self._quiet = Quiet()
        self._quiet.start()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *exception) -> None:
        try:
            with self._storage():
                self._manager.close()
                self._seal(self._saving)
        except UserError:
            if kind is None:  # else what ended the run is said already
                raise
        finally:
            if not self._failed:
                self._quiet.end()

    @contextlib.contextmanager
    def _storage(self) -> Iterator[None]:
        """Says in a line what the storage library could not write."""
        try:
            yield
        except (UserError, AssertionError):
            raise
        # the storage library has no one kind of error; on other processes it repeats the text of the first's
        except Exception as error:
            self._failed = True
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
        good = [step for step in self.steps() if step not in self._skipped]
        return f"the last good checkpoint is step {good[0]} in {self.folder}" if good else "there is no checkpoint yet"

    def wait(self) -> None:
        """Returns when the checkpoint that is being written is whole.

        Raises:
          UserError: it could not be written, because the disk is full or the like.
        """
        with self._storage():
            self._manager.wait_until_finished()
            self._seal(self._saving)

    def save(
        self,
        state: TrainState,
        *,
        step: int,
        data_state: dict,
        description: dict,
        loss: float | None = None,
        skipped: bool = False,
    ) -> None:
        """Starts to write a checkpoint; returns when the state's arrays may be given up.

        Args:
          state: what is saved, after `step`.
          data_state: of the training iterator.
          description: see `describe`.
          loss: on held-out data, for `Keep.best`.
          skipped: the step changed nothing (optimizer.nonfinite=skip). Such a checkpoint stays while it is the newest,
            and pushes none out that is good.

        Raises:
          UserError: this checkpoint or the one before could not be written, because the disk is full or the like.
        """
        rest = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
        self.wait()
        self._saving = step
        self._skipped |= {step} if skipped else set()
        self._check_space(state)
        arrays = checksums({"params": state.params, "rest": rest})
        with self._storage():
            saved = self._manager.save(
                step,
                metrics={"skipped": float(skipped)} | ({} if loss is None else {"loss": loss}),
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    rest=ocp.args.StandardSave(rest),
                    metadata=ocp.args.JsonSave(description | {"data_state": data_state, "arrays": arrays}),
                ),
            )
        if not saved:
            raise RuntimeError(f"checkpoint {step} was not saved; there are {self.steps()}")

    def _check_space(self, state: TrainState) -> None:
        """A disk that is full is found here, not by the storage library's threads, whose complaints fill the
        terminal.
        """
        if is_remote(self.folder):
            return
        needed = sum(x.nbytes for x in jax.tree.leaves(state._replace(rng=None)))
        free, found = shutil.disk_usage(self.folder).free, os.statvfs(self.folder)
        short = ""
        if free < needed:
            short = f"it takes up to {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free"
        elif found.f_files and found.f_favail < _FILES:  # some file systems have no such limit
            short = f"it takes up to {_FILES} files, there is room for {found.f_favail}"
        if short:
            raise UserError(f"{self.folder}: no room for checkpoint {self._saving}: {short}; {self.last_good()}")

    def _list_files(self) -> None:
        """Leaves a list of what was written in the checkpoint, before it gets its final name."""
        if is_first():
            (folder,) = (path for path in self.folder.iterdir() if path.name.split(".")[0] == str(self._saving))
            manifest.write(folder, self._saving, late=False)

    def _seal(self, step: int | None) -> None:
        if is_first() and step is not None and (self.folder / str(step)).is_dir():
            try:
                manifest.seal(self.folder / str(step))
            except OSError as error:
                raise UserError(
                    f"{self.folder}: checkpoint {step} is written, but not its whole list of files: {error.strerror}"
                ) from None

    def metadata(self, step: int) -> dict:
        """What a checkpoint says about itself, as `describe` made it, and its "data_state"."""
        found = self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())).metadata
        missing = [name for name in ("config", "corpus", "tokenizer", "versions") if name not in (found or {})]
        if missing:
            raise UserError(
                f"{self.folder}: checkpoint {step} does not say its {', '.join(missing)}; without that its model "
                "cannot be built and measured"
            )
        if found.get("layout") != LAYOUT:
            raise UserError(
                f"{self.folder}: checkpoint {step} holds its parameters in the layout {found.get('layout')!r}, this "
                f"version reads {LAYOUT!r}; use the oasis_jax that wrote it "
                f"({found['versions'].get('oasis_jax')}), or take another workdir"
            )
        return found

    def params(self, step: int, abstract: dict) -> dict:
        """Only the parameters of a checkpoint."""
        return self._arrays(step, params=abstract)["params"]

    def state(self, step: int, abstract: TrainState) -> TrainState:
        """The state of a checkpoint, laid out as `abstract` says."""
        rest = {"step": abstract.step, "opt_state": abstract.opt_state, "rng": abstract.rng}
        restored = self._arrays(step, rest=rest, params=abstract.params)  # the larger first: less is left to look at
        return TrainState(params=restored["params"], **restored["rest"])

    def _arrays(self, step: int, **abstract: dict) -> dict[str, dict]:
        """Parts of a checkpoint, restored in the order given; raises Damaged where an array is not the one that was
        saved. A part's arrays are looked at in threads while the next one is restored.
        """
        read = lambda **parts: self._manager.restore(step, args=ocp.args.Composite(**parts))
        stored = (read(metadata=ocp.args.JsonRestore()).metadata or {}).get("arrays")
        # Programs on devices of several processes have to start in one order, those of the storage library among them.
        alone, found, sums = jax.process_count() == 1, {}, []
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            for name, tree in abstract.items():
                found[name] = read(**{name: ocp.args.StandardRestore(tree)})[name]
                if alone and stored:
                    sums.append(thread.submit(checksums, {name: found[name]}))
        found_sums = [one.result() for one in sums] if alone or not stored else [checksums(found)]
        changed = [name for one in found_sums for name in differing(one, stored)]
        if changed:
            others = f" and {len(changed) - 1} more" if changed[1:] else ""
            raise manifest.Damaged(f"array {changed[0]}{others} is not the one that was saved")
        return found

    def first_whole(self, restore: Callable[[int], T], steps: list[int]) -> tuple[T, list[int]]:
        """restore(step) of the first of these steps that it can read, and the ones before that it cannot,
        each named in a line.

        Raises:
          UserError: none is whole, or `restore` refuses a whole one.
        """
        broken = {}
        for step in steps:
            try:
                found = self._inspected(step, restore)
            except UserError:
                raise
            except Exception as error:  # the storage library has no one kind of error for damaged contents
                broken[step] = _one_line(error)
                continue
            for bad, reason in broken.items():
                self._say(
                    f"checkpoint {bad} is not whole, step {step} is used instead: {reason}; {bad - step} steps lost"
                )
            return found, list(broken)
        there = [path.name for path in self.folder.iterdir()]
        replaced = [int(name) for name in there if name.isascii() and name.isdecimal() and int(name) > max(steps)]
        if replaced and not any((self.folder / str(step)).exists() for step in broken):
            self._manager.reload()
            return self.first_whole(restore, sorted(replaced, reverse=True))  # a run that is training deleted them
        reasons = "; ".join(f"{step}: {reason}" for step, reason in broken.items())
        raise UserError(f"{self.folder}: no whole checkpoint ({reasons}); restore one or take another workdir")

    def _inspected(self, step: int, restore: Callable[[int], T]) -> T:
        """restore(step), with a look at every file of the checkpoint; raises Damaged where one is not what was written.

        A single process restores while the large files are looked at. Several look first, each at a part of them, and
        agree on what they found, since none can restore alone.
        """
        with contextlib.ExitStack() as stack:
            damage = ""
            try:
                part, parts = jax.process_index(), jax.process_count()
                inspection = stack.enter_context(manifest.Inspection(self.folder / str(step), part, parts))
                if parts > 1:
                    inspection.finish()
            except manifest.Damaged as error:
                damage = str(error)
            if damage := agreed(damage):
                raise manifest.Damaged(damage)
            try:
                found = restore(step)
            finally:
                inspection.finish()  # damage is the reason of whatever else it led to
        if inspection.unverified:
            self._say(f"checkpoint {step} {inspection.unverified}: its files are not verified")
        return found

    def resume(self, config: Config, mesh: Mesh) -> Resumed | None:
        """The run of this workdir, on this mesh; None where there is no checkpoint. Broken newer ones are
        moved aside.

        Raises:
          UserError: the checkpoint's run is another one (the differing fields are named) or longer than the config's,
            or none is whole.
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
            if note := check_length(config, stored, step, self.folder.parent):
                self._say(note)
            self._compare_versions(metadata["versions"])
            state = self.state(step, abstract_state(dataclasses.replace(stored, mesh=config.mesh), mesh))
            return Resumed(step, state, metadata["data_state"], stored_tokenizer(metadata), metadata["corpus"])

        resumed, broken = self.first_whole(restore, self.steps())
        older = [step for step in self.steps() if step < resumed.step]
        for step in [*broken, *filter(self._is_damaged, older)]:
            self._move_aside(step)
        self._seal(resumed.step)
        self._manager.reload()  # with the metrics of all of them, which `Keep` compares
        self._skipped = {step for step in self.steps() if (self._manager.metrics(step) or {}).get("skipped")}
        return resumed

    def _is_damaged(self, step: int) -> bool:
        """Whether the list or a small file of an older checkpoint is damaged; says so."""
        damage = ""
        try:
            with manifest.Inspection(self.folder / str(step), parts=2**30):
                pass
        except manifest.Damaged as error:
            damage = str(error)
        if damage := agreed(damage):
            self._say(f"checkpoint {step} is not whole: {damage}")
        return bool(damage)

    def _compare_versions(self, stored: dict[str, str]) -> None:
        changed = [
            f"{name} {stored.get(name)} -> {version}"
            for name, version in versions().items()
            if stored.get(name) != version and name != "commit"
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
            if not is_remote(self.folder):
                self._broken_folder.mkdir(exist_ok=True)
            there = {path.name for path in self._broken_folder.iterdir()} if self._broken_folder.is_dir() else set()
            names = (f"{step}{suffix}" for suffix in ("", *(f"-{i}" for i in range(1, len(there) + 1))))
            move(self.folder / str(step), self._broken_folder / next(name for name in names if name not in there))
            self._say(f"checkpoint {step} is set aside in {self._broken_folder}")
        wait_for_all(f"broken checkpoint {step} is moved aside")
