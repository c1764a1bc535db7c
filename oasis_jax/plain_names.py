"""Names that libraries outside of Python can take, for paths that may hold any byte."""

import atexit
import functools
import itertools
import os
import pathlib
import shutil
import tempfile

_numbers = itertools.count()


def plain(path: str | os.PathLike, odd: str = "") -> pathlib.Path:
    """The path, or a link to it with a plain name, which stays until this process ends.

    Args:
      path: absolute, or relative to the folder that is the current one now.
      odd: characters that whoever reads the name takes for something else; bytes that are no UTF-8 always are odd.
    """
    text = os.fspath(path)
    if not any(character in odd or "\ud800" <= character <= "\udfff" for character in os.path.abspath(text)):
        return pathlib.Path(text)
    return _link(os.path.abspath(text))


@functools.cache
def _link(path: str) -> pathlib.Path:
    link = _scratch(os.getpid()) / str(next(_numbers))
    link.symlink_to(path)
    return link


@functools.cache
def _scratch(pid: int) -> pathlib.Path:
    """Of this process: a forked one makes its own, and its parent's goes with the parent."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="oasis_jax-"))
    atexit.register(lambda: os.getpid() == pid and shutil.rmtree(folder, ignore_errors=True))
    return folder
