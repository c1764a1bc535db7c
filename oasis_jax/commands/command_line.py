"""The command line of a config: which file, which fields are set otherwise, and what a user's mistake looks like."""

import argparse
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from oasis_jax.config import METHOD_FIELDS, Config, field_type, sections
from oasis_jax.errors import Preempted, UserError, nearest, unknown_name

# Fields that are tables and not values: they are written in a config file.
FILE_ONLY = ("mesh.rules",)


# Config files


def load_config(path: str | os.PathLike) -> Config:
    """Runs the Python file at `path` and returns what its `get_config()` gives.

    Raises:
      UserError: there is no such file, it does not run, or it has no `get_config()` that returns a Config.
    """
    path = pathlib.Path(path)
    code = _compile(path)
    module = types.ModuleType("config_file")
    module.__file__ = str(path)
    try:
        exec(code, module.__dict__)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError("has no function get_config()")
        config = get_config()
    except Exception as error:  # whatever a user's file raises is the user's to mend
        raise UserError(f"{path}{_line_in(path, error)}: {_in_words(error)}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() has to return an oasis_jax.config.Config, got {type(config).__name__}")
    return config


def _compile(path: pathlib.Path) -> types.CodeType:
    try:
        return compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except (FileNotFoundError, NotADirectoryError):
        there = sorted(str(p) for p in path.parent.glob("*.py"))
        found = f"; allowed: {', '.join(there)}" if there else f"; there is no .py file in {path.parent}"
        raise UserError(f"--config: no such file {str(path)!r}{nearest(str(path), there)}{found}") from None
    except OSError as error:
        raise UserError(f"--config: cannot read {str(path)!r}: {error.strerror}") from None
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        raise UserError(f"{path}{where}: not valid Python: {error.msg}") from None
    except ValueError as error:  # a null byte, in Python 3.11
        raise UserError(f"{path}: not valid Python: {error}") from None


def _line_in(path: pathlib.Path, error: BaseException) -> str:
    """', line 7' for the deepest line of the file that the error passed through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _in_words(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    unexpected = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    for name, cls in {**sections(), "config": Config}.items():
        if unexpected and unexpected[1] == cls.__name__:
            return str(
                unknown_name(f"{name}.{unexpected[2]}", unexpected[2], [f.name for f in dataclasses.fields(cls)])
            )
    return f"{type(error).__name__}: {error}"


# Overrides: --set section.field=value


def apply_overrides(config: Config, assignments: Iterable[str]) -> Config:
    """`config` with every "section.field=value" of `assignments` applied; of two for one field the later counts.

    All are applied at once, so that only the result has to fit together and the order does not matter:
    `model.preset=NAME` first gives the fields of the method their preset's values, then every other assignment is made.

    Raises:
      UserError: an unknown section or field, a value of another type, or a result that does not fit together.
    """
    given: dict[str, dict] = {}
    for assignment in assignments:
        section, name, value = _parse_assignment(assignment)
        given.setdefault(section, {})[name] = value
    if "preset" in given.get("model", {}):
        given["model"] = dict.fromkeys(METHOD_FIELDS) | given["model"]
    changed = {section: dataclasses.replace(getattr(config, section), **values) for section, values in given.items()}
    return dataclasses.replace(config, **changed)


@functools.cache
def _settable() -> dict[str, object]:
    """'section.field' -> its type, for every field that --set can set."""
    names = {
        f"{section}.{f.name}": field_type(cls, f.name)
        for section, cls in sections().items()
        for f in dataclasses.fields(cls)
    }
    return {name: hint for name, hint in names.items() if name not in FILE_ONLY}


def _parse_assignment(assignment: str) -> tuple[str, str, object]:
    """'model.width=64' -> ('model', 'width', 64)."""
    where, equals, text = assignment.partition("=")
    section, dot, name = where.partition(".")
    if not equals or not dot:
        close = nearest(_full_name(where), _settable()) if where else ""
        raise UserError(f"--set: expected section.field=value, got {assignment!r}{close}; --help lists every field")
    if where in FILE_ONLY:
        raise UserError(f"--set: {where} is a table and cannot be set on the command line; write it in a config file")
    if where not in _settable():
        fields = [full for full in _settable() if full.startswith(f"{section}.")] or list(sections())
        raise UserError(
            f"--set: unknown name {where!r}{nearest(_full_name(where), _settable())}; allowed: {', '.join(fields)}"
        )
    return section, name, _parse_value(where, text, _settable()[where])


def _full_name(where: str) -> str:
    """The field's full name where its last part alone says which one is meant, else `where`."""
    last = where.rpartition(".")[2]
    found = [full for full in _settable() if full.partition(".")[2] == last]
    return found[0] if len(found) == 1 else where


def _parse_value(where: str, text: str, hint: object) -> object:
    """The text of a value as the type of its field; names are left for the config to check."""
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{where}: expected true or false, got {text!r}")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return int(text) if hint is int else float(text)
        except ValueError:
            pass
        if hint is int and _is_whole(text):
            return int(float(text))
        raise UserError(f"{where}: expected {'a whole number' if hint is int else 'a number'}, got {text!r}")
    return text


def _is_whole(text: str) -> bool:
    """Whether a number such as '1e3' is a whole one."""
    try:
        return float(text).is_integer()
    except ValueError:
        return False


# Help


def describe_fields(width: int | None = None) -> str:
    """Every field of a config, one a row: name, type, default, what it is.

    Args:
      width: columns to wrap at; None: the terminal's, between 100 and 160.
    """
    width = width or min(max(shutil.get_terminal_size().columns, 100), 160)
    rows = []
    for section, cls in sections().items():
        # A class's own fields, as written, before those it takes over: a model's preset comes first.
        order = {name: place for place, name in enumerate(cls.__annotations__)}
        rows += [
            _row(section, cls, f) for f in sorted(dataclasses.fields(cls), key=lambda f: order.get(f.name, len(order)))
        ]
    columns = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = []
    for *cells, text in rows:
        start = "  " + "".join(cell.ljust(size + 2) for cell, size in zip(cells, columns))
        lines.append(
            textwrap.fill(text, width, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False)
        )
    return "\n".join(lines)


def _row(section: str, cls: type, field: dataclasses.Field) -> tuple[str, str, str, str]:
    hint, text = field_type(cls, field.name), field.metadata["help"]
    kind = "name" if typing.get_origin(hint) is Literal else hint.__name__
    if kind == "name":
        text += f"; one of: {', '.join(typing.get_args(hint))}"
    if f"{section}.{field.name}" in FILE_ONLY:
        text += "; only in a config file"
    return f"{section}.{field.name}", kind, _default(field), text


def _default(field: dataclasses.Field) -> str:
    """The default as one would type it."""
    if field.default is None:
        return "of the preset"
    if isinstance(field.default, tuple):
        return "a table"
    if isinstance(field.default, float):
        return f"{field.default:g}"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default) or "''"


# Parsers and what runs them


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and name the nearest flag. Flags are written out in full."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for arg in args:
            if arg == "--":
                break
            flag = arg.partition("=")[0]
            # Checked before argparse, which would complain first of the flag that is missing because of the
            # misspelling.
            if flag.startswith("--") and flag not in self._option_string_actions:
                flags = [name for name in self._option_string_actions if name.startswith("--")]
                self.error(f"unknown flag {flag}{nearest(flag, flags)}; allowed: {', '.join(flags)}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def train_parser() -> Parser:
    """The command line of train.py."""
    parser = Parser(
        prog="train.py",
        description="Trains the model of a config. The same workdir resumes where the run stopped.",
        epilog=f"fields of a config, for --set (number, true or false, or a name):\n\n{describe_fields()}",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a Python file with get_config(), such as configs/demo.py"
    )
    aim = parser.add_mutually_exclusive_group(required=True)
    aim.add_argument("--workdir", metavar="FOLDER", type=pathlib.Path, help="where checkpoints and metrics are written")
    aim.add_argument(
        "--plan",
        metavar="HARDWARE:SHAPE",
        help="train nothing: compile the step for v5p:4x4x4, h100:8 ... and say whether it fits; exits with 1 "
        "where it does not",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="another value for a field of the config; repeatable",
    )
    parser.add_argument(
        "--profile",
        metavar="FIRST:END",
        help="write a trace of these steps for xprof, the end left out: --profile=10:15",
    )
    group = parser.add_argument_group("several processes, see docs/launch.md")
    group.add_argument(
        "--distributed", action="store_true", help="join the processes that SLURM, Open MPI, Cloud TPU or GKE describe"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="without a scheduler: where process 0 listens")
    group.add_argument("--processes", type=int, metavar="N", help="without a scheduler: how many there are")
    group.add_argument("--process", type=int, metavar="I", help="without a scheduler: which one this is, from 0")
    return parser


class TrainArguments(typing.NamedTuple):
    """What train.py is asked for; processes: (coordinator, count, index), ("", 0, 0) as the scheduler says, None for
    one process.

    Of workdir and plan one is None.
    """

    config: Config
    workdir: pathlib.Path | None
    processes: tuple[str, int, int] | None
    profile: str | None
    plan: str | None


def parse_train(argv: Sequence[str] | None = None) -> TrainArguments:
    """What train.py is asked for; `argv` without the program's name, None: sys.argv's."""
    parser = train_parser()
    args = parser.parse_args(argv)
    by_hand = {"--coordinator": args.coordinator, "--processes": args.processes, "--process": args.process}
    missing = [flag for flag, value in by_hand.items() if value is None]
    if args.distributed and len(missing) < 3:
        parser.error(
            f"--distributed: the scheduler says what {', '.join(flag for flag in by_hand if flag not in missing)} "
            "would; give one or the other"
        )
    if 0 < len(missing) < 3:
        parser.error(f"{', '.join(flag for flag in by_hand if flag not in missing)}: needs {' and '.join(missing)} too")
    if args.plan is not None and (args.distributed or len(missing) < 3 or args.profile is not None):
        parser.error(
            "--plan trains nothing, in one process: leave out --profile, --distributed, --coordinator, --processes "
            "and --process"
        )
    processes = ("", 0, 0) if args.distributed else None if missing else tuple(by_hand.values())
    return TrainArguments(
        apply_overrides(load_config(args.config), args.set), args.workdir, processes, args.profile, args.plan
    )


def run_main(main: Callable[[Sequence[str]], object], argv: Sequence[str] | None = None) -> typing.NoReturn:
    """Runs main(argv) and exits: 0, 2 with one line on stderr after a user's mistake, 130 after Ctrl-C, 143 after
    SIGTERM.

    A SystemExit of main's own passes: train.py ends with 1 where a plan does not fit.

    Any other exception is a bug and keeps its traceback.
    """
    program = pathlib.Path(sys.argv[0]).name
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except Preempted as notice:
        print(f"{program}: {notice}", file=sys.stderr)
        raise SystemExit(143) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0)
