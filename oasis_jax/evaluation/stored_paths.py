"""Paths that a run's checkpoint holds are text of whoever wrote it. They are opened where they lead into the current
folder or the run's own, or where the user has named them. What lies in an object store is the run's own below its
workdir there.
"""

import os
import pathlib
import shlex
import stat
from collections.abc import Sequence

from oasis_jax.config import DataConfig
from oasis_jax.errors import UserError
from oasis_jax.storage import is_remote

_SLACK = 2**20  # bytes


def patterns(data: DataConfig) -> list[str]:
    """Where a corpus says that its files lie."""
    if not data.pattern:
        return []
    return [part.strip() for part in data.pattern.split(",")] if data.mixture else [data.pattern]


def check_stored(data: DataConfig, workdir: str | os.PathLike) -> None:
    """Raises UserError, before anything there is looked at, for a path outside of the current folder and of the run's.

    Args:
      data: as the run's checkpoint has it.
      workdir: of the run.
    """
    for pattern in patterns(data):
        climbs = ".." in pathlib.PurePath(pattern).parts  # behind a **, nobody knows from where
        if climbs or not _is_own(pattern, workdir):
            raise UserError(
                f"data.pattern: the run stores {pattern!r}, which is outside of the current folder and of the run's; "
                "stored paths are not opened unasked: say where its data lie with "
                f"--set {shlex.quote(f'data.pattern={data.pattern}')}"
            )


def check_found(files: Sequence[pathlib.Path], workdir: str | os.PathLike, size: int | None) -> None:
    """Raises UserError, before any of them is read, for files that a link in the run's folder names elsewhere, and for
    far more text than the run was trained on.

    Args:
      size: bytes of the corpus as the run's checkpoint has it; None: it does not say.
    """
    own = None if is_remote(workdir) else os.path.abspath(workdir)  # a store has no links
    for file in files:
        if own and _inside(str(file), own) and not _inside(os.path.realpath(file), os.path.realpath(own)):
            raise UserError(f"data.pattern: {str(file)!r} leads out of the run's folder; it is not opened")
    total = sum(found.st_size for found in map(os.stat, files) if stat.S_ISREG(found.st_mode))
    if isinstance(size, int) and total > 2 * size + _SLACK:
        raise UserError(
            f"data: the corpus is not the one this run was trained on (bytes was {size}, is {total}); restore it, or "
            "say where it lies with --set data.pattern=..."
        )


def _is_own(pattern: str, workdir: str | os.PathLike) -> bool:
    if is_remote(pattern):
        return pattern.startswith(f"{os.fspath(workdir).rstrip('/')}/")
    path = os.path.abspath(os.path.expanduser(pattern))
    return _inside(path, os.getcwd()) or (not is_remote(workdir) and _inside(path, os.path.abspath(workdir)))


def _inside(path: str, folder: str) -> bool:
    return folder != os.path.abspath(os.sep) and os.path.commonpath([path, folder]) == folder
