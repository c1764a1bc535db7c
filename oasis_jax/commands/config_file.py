"""A config as a Python file with get_config(), or one that comes with the library, by its name."""

import dataclasses
import importlib.metadata
import os
import pathlib
import re
import traceback
import types
import typing
import warnings
from typing import TypeVar

from oasis_jax.config import Config, field_type, sections
from oasis_jax.errors import UserError, nearest, unknown_name
from oasis_jax.overrides import all_fields
from oasis_jax.storage import local_path

T = TypeVar("T")


def load_config(path: str | os.PathLike[str], flag: str = "--config") -> Config:
    """What `get_config()` of the Python file at `path` gives; see `load_file`."""
    return load_file(path, "get_config", Config, flag)


def load_file(path: str | os.PathLike[str], function: str, expected: type[T], flag: str) -> T:
    """Runs the Python file at `path` and returns what its function gives.

    Args:
      path: of a file, or the name of one that comes with the library, such as "demo".
      function: which one, such as get_config.
      expected: the class of what it returns.
      flag: how messages call the argument that names the file.

    Raises:
      UserError: there is no such file, it does not run, or it has no such function that returns what is expected.
    """
    path = local_path(path, flag)
    if not path.suffix and not path.exists():
        path = _shipped(str(path), flag, studies=function == "get_study")
    code = _compile(path, flag)
    module = types.ModuleType("config_file")
    module.__file__ = str(path)
    try:
        exec(code, module.__dict__)
        make = getattr(module, function, None)
        if not callable(make):
            raise UserError(f"has no function {function}()")
        found = make()
    except (Exception, SystemExit) as error:  # whatever a user's file raises is the user's to mend
        raise UserError(f"{path}{_line_in(path, error)}: {_in_words(error)}") from error
    if not isinstance(found, expected):
        raise UserError(
            f"{path}: {function}() has to return an {expected.__module__.rpartition('.')[0]}.{expected.__name__}, "
            f"got {type(found).__name__}"
        )
    return found


def shipped_configs() -> dict[str, pathlib.Path]:
    """The configs and studies (study_NAME) that come with the library: those of the clone it runs from, else those that
    were installed.
    """
    clone = pathlib.Path(__file__).parents[2]
    paths = list((clone / "configs").glob("*.py")) if (clone / "setup.cfg").is_file() else []
    if not paths:
        try:
            files = importlib.metadata.files("oasis_jax") or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        paths = [pathlib.Path(file.locate()) for file in files if file.parts[-3:-1] == ("oasis_jax", "configs")]
    return {path.stem: path.resolve() for path in sorted(paths) if path.suffix == ".py"}


def _shipped(name: str, flag: str, studies: bool) -> pathlib.Path:
    found = {known: path for known, path in shipped_configs().items() if known.startswith("study_") == studies}
    if name not in found:
        raise UserError(
            f"{flag}: no file {name!r}, and no config of the library has this name{nearest(name, found)}; "
            f"allowed: a file that ends in .py, {', '.join(found)}"
        )
    return found[name]


def _compile(path: pathlib.Path, flag: str) -> types.CodeType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # where it matters, an error comes behind it
            return compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except (FileNotFoundError, NotADirectoryError):
        there = sorted(str(p) for p in path.parent.glob("*.py"))
        found = f"; allowed: {', '.join(there)}" if there else f"; there is no .py file in {path.parent}"
        raise UserError(f"{flag}: no such file {str(path)!r}{nearest(str(path), there)}{found}") from None
    except OSError as error:
        raise UserError(f"{flag}: cannot read {str(path)!r}: {error.strerror}") from None
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        raise UserError(f"{path}{where}: not valid Python: {error.msg}") from None
    except ValueError as error:  # a null byte, in Python 3.11
        raise UserError(f"{path}: not valid Python: {error}") from None


def _line_in(path: pathlib.Path, error: BaseException) -> str:
    """', line 7' for the deepest line of the file that the error passed through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _in_words(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    unexpected = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    for where, cls in _schema():
        if unexpected and unexpected[1] == cls.__name__:
            fields = [field.name for field in dataclasses.fields(cls)]
            return str(unknown_name(f"{where}.{unexpected[2]}", unexpected[2], fields))
    return f"{type(error).__name__}: {error}"


def _schema() -> list[tuple[str, type]]:
    """(name, class) of everything that a config file writes down: config, sections, and what their tables are
    made of.
    """
    parts = [
        (f"{section}.{field.name}", part)
        for section, cls, field in all_fields()
        for part in typing.get_args(field_type(cls, field.name))
        if dataclasses.is_dataclass(part)
    ]
    return [("config", Config), *sections().items(), *parts]
