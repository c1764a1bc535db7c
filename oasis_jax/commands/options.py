"""Flags that several commands have: fields of the config that are set otherwise, and the processes of one run."""

import argparse
import dataclasses
import pathlib
import typing
from collections.abc import Collection
from typing import Literal, NamedTuple

from oasis_jax.commands.parser import Parser
from oasis_jax.commands.table import aligned, terminal_width
from oasis_jax.config import METHOD_FIELDS, field_type
from oasis_jax.config.schema import range_in_words
from oasis_jax.errors import UserError
from oasis_jax.overrides import all_fields, is_table, parse_overrides
from oasis_jax.storage import Path, as_path, local_path

# Folders


def folder(text: str) -> Path:
    """A folder that a flag names, here or in an object store; an empty name, as an unset variable leaves it, would be
    the current one.
    """
    if not text:
        raise argparse.ArgumentTypeError("names no folder; for the current one write .")
    try:
        return as_path(text, "folder")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("folder: ")) from None


def local(text: str) -> str:
    """A path that a flag names and that has to be here."""
    try:
        local_path(text, "path")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("path: ")) from None
    return text


def local_folder(text: str) -> pathlib.Path:
    """See `folder` and `local`."""
    return folder(local(text))


# --set


def add_set(parser: Parser, help: str, fields: Collection[str] | None = None) -> None:
    """--set SECTION.FIELD=VALUE, as often as one likes, and below the help a list of the fields (None: of all)."""
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help=f"{help}; repeatable")
    parser.epilog = (
        f"fields of a config, for --set (number, true or false, or a name):\n\n{describe_fields(fields=fields)}"
    )


def read_set(parser: Parser, args: argparse.Namespace, fields: Collection[str]) -> dict[str, dict[str, object]]:
    """What --set gives, {section: {field: value}}; exits with one line for a field that cannot be set here."""
    given = parse_overrides(args.set)
    names = [f"{section}.{name}" for section, values in given.items() for name in values]
    if other := [name for name in names if name not in fields]:
        parser.error(f"--set: {other[0]} cannot be set here; allowed: {', '.join(fields)}")
    return given


def describe_fields(width: int | None = None, fields: Collection[str] | None = None) -> str:
    """Fields of a config, one a row: name, type, default, what it is.

    Args:
      width: columns to wrap at; None: the terminal's, between 100 and 160.
      fields: names such as "mesh.fsdp"; None: every field.
    """
    rows = [_row(section, cls, field) for section, cls, field in all_fields()]
    return aligned([row for row in rows if fields is None or row[0] in fields], width or terminal_width())


def _row(section: str, cls: type, field: dataclasses.Field) -> tuple[str, str, str, str]:
    hint, text = field_type(cls, field.name), field.metadata["help"]
    kind = "table" if is_table(hint) else "name" if typing.get_origin(hint) is Literal else hint.__name__
    if kind == "name":
        text += f"; one of: {', '.join(typing.get_args(hint))}"
    if words := range_in_words(field.metadata.get("range", {})):
        text += f"; {words}"
    if kind == "table":
        text += "; only in a config file"
    return f"{section}.{field.name}", kind, _default(section, field, kind), text


def _default(section: str, field: dataclasses.Field, kind: str) -> str:
    """The default as one would type it."""
    if section == "model" and field.name in METHOD_FIELDS:
        return "of the preset"
    if kind == "table":
        return "a table" if field.default else "none"
    if isinstance(field.default, float):
        return f"{field.default:g}"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default) or "''"


# Processes


class ProcessFlags(NamedTuple):
    """How the processes of a run find each other; ("", 0, 0): as the scheduler says."""

    coordinator: str = ""
    count: int = 0
    index: int = 0


def add_processes(parser: Parser) -> None:
    """--distributed, --coordinator, --processes and --process; `read_processes` reads them."""
    group = parser.add_argument_group("several processes, see docs/launch.md")
    group.add_argument(
        "--distributed", action="store_true", help="join the processes that SLURM, Open MPI, Cloud TPU or GKE describe"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="without a scheduler: where process 0 listens")
    group.add_argument("--processes", type=int, metavar="N", help="without a scheduler: how many there are")
    group.add_argument("--process", type=int, metavar="I", help="without a scheduler: which one this is, from 0")


def read_processes(parser: Parser, args: argparse.Namespace) -> ProcessFlags | None:
    """What the flags say of the processes, None for a single one; exits with one line where they do not go together."""
    by_hand = {"--coordinator": args.coordinator, "--processes": args.processes, "--process": args.process}
    missing = [flag for flag, value in by_hand.items() if value is None]
    given = ", ".join(flag for flag in by_hand if flag not in missing)
    if args.distributed and given:
        parser.error(f"--distributed: the scheduler says what {given} would; give one or the other")
    if given and missing:
        parser.error(f"{given}: needs {' and '.join(missing)} too")
    if args.distributed:
        return ProcessFlags()
    return None if missing else ProcessFlags(*by_hand.values())


def join_processes(flags: ProcessFlags | None) -> None:
    """Joins this process to the others of its run, before anything uses JAX; nothing to do for a single one.

    Raises:
      UserError: flags that cannot be, or the others did not come.
    """
    if flags is not None:
        from oasis_jax.training.distributed import Processes, start

        start(Processes(*flags))
