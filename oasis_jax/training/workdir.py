"""Where a run lives: a folder, here or in an object store."""

import os
import tempfile

import jax

from oasis_jax.config import RunConfig
from oasis_jax.errors import UserError
from oasis_jax.storage import Path, as_path, fetched, is_remote, reach
from oasis_jax.storage.mirror import check_writable
from oasis_jax.training.limits import refuse_links

# What a run writes in its workdir, and what is inside of some of it.
_WRITES = (
    *("metrics.jsonl", "metrics.partial", "training.lock", "tensorboard", "wandb", "wandb_run_id", "profile"),
    *("checkpoints", "checkpoints/*", "checkpoints_broken", "checkpoints_broken/*"),
)


def is_copied(workdir: Path) -> bool:
    """Whether a run is written here first and then copied to where it belongs: Orbax writes arrays to gs:// itself, and
    not to s3://.
    """
    return os.fspath(workdir).startswith("s3://")


def readable(workdir: str | os.PathLike, what: str) -> Path:
    """A workdir to read checkpoints and metrics from; what has to be local for that is fetched.

    Args:
      what: the flag or field, for messages.

    Raises:
      UserError: its store cannot be read.
    """
    workdir = as_path(workdir, what)
    if is_remote(workdir) and reach(workdir, what) and is_copied(workdir):
        return fetched(workdir, what)
    return workdir


def writable(workdir: str | os.PathLike, run: RunConfig, *, profile: bool = False) -> Path:
    """The folder, made where it is missing.

    Args:
      run: what is asked for that not every place can hold.
      profile: whether a trace is.

    Raises:
      UserError: it cannot be written, or not by several processes, or not what is asked for.
    """
    workdir = as_path(workdir, "--workdir")
    if is_remote(workdir):
        if is_copied(workdir) and jax.process_count() > 1:
            raise UserError(
                f"--workdir: {os.fspath(workdir)!r}: {jax.process_count()} processes cannot write one checkpoint to "
                "s3://; take gs:// or a folder that all of them share"
            )
        for flag, asked in {"run.tensorboard": run.tensorboard, "--profile": profile}.items():
            if asked and not is_copied(workdir):
                raise UserError(f"{flag}: cannot be written to gs://; leave it out, or take a local --workdir")
        if run.wandb:  # its folder changes all the time, in ways of its own
            raise UserError("run.wandb: needs a folder beside the run; leave it out, or take a local --workdir")
        reach(workdir, "--workdir")
        check_writable(workdir, "--workdir")
        return workdir
    refuse_links(workdir, _WRITES)
    for name in ("checkpoints", "checkpoints_broken"):
        if (workdir / name).exists() and not (workdir / name).is_dir():
            raise UserError(f"--workdir: {str(workdir / name)!r} is no folder; remove it, or take another workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(f"--workdir: cannot write to {str(workdir)!r}: {error.strerror}") from None
    return workdir
