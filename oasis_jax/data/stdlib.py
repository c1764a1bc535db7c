"""Corpus `stdlib`: the Python source of the running interpreter's standard library, text that is on every
machine with Python.
"""

import functools
import os
import pathlib
import platform
import sysconfig

from oasis_jax.config import DataConfig
from oasis_jax.data.corpus import Corpus
from oasis_jax.data.split import hold_out_by_name
from oasis_jax.data.text import TextFile, read, text_corpus
from oasis_jax.data.tokenizers import Tokenizer
from oasis_jax.errors import UserError

# Third-party packages live inside the library's folder; tests are half of its text and mostly tables of values.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def library_files(root: pathlib.Path) -> list[TextFile]:
    """The .py files below root in order of their relative names, third-party packages and tests left out."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths += [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    files = []
    for name, path in named:
        content = read(path, "data.corpus=stdlib")
        files.append(TextFile.from_content(name, content, [content]))
    return files


def read_files() -> list[TextFile]:
    """The standard library's files; raises UserError where this Python has none as source."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = library_files(root)
    if not files:
        raise UserError(f"data.corpus=stdlib: no Python source in {root}; use data.corpus=files with text of your own")
    return files


def load(config: DataConfig, *, seed: int, tokenizer: Tokenizer | None) -> Corpus:
    """One document a source file; the identity records the Python version, because its text changes with it.

    Held-out files are chosen by name, so that they are the same ones in every Python. A Python ships a few tiny files
    twice, which may lie on both sides: 135 of 12 million bytes in Python 3.11.
    """
    del seed  # the text is what it is
    identity = {"name": "stdlib", "python": platform.python_version()}
    files = read_files()
    documents = {file.name: document for file in files for document in file.documents}
    divide = functools.partial(hold_out_by_name, list(documents), list(documents.values()))
    return text_corpus(files, config, tokenizer, identity=identity, divide=divide)
