"""`python -m oasis_jax COMMAND`, which an installation also has as `oasis_jax COMMAND`."""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from oasis_jax.commands import COMMANDS
from oasis_jax.commands.parser import run_main
from oasis_jax.errors import UserError, nearest

USAGE = "usage: oasis_jax COMMAND [flags]; oasis_jax COMMAND --help lists its flags"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command that `argv` (None: sys.argv's) names, and exits with its code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in COMMANDS:
        command = importlib.import_module(f"oasis_jax.commands.{name.replace('-', '_')}")
        run_main(command.main, rest, program=f"oasis_jax {name}")
    run_main(_no_command, [name], program="oasis_jax")


def _no_command(argv: Sequence[str], program: str) -> None:
    (name,) = argv
    if name in ("-h", "--help"):
        print("\n".join([USAGE, "", *(f"  {command:10} {text}" for command, text in COMMANDS.items())]))
        return
    problem = f"unknown command {name!r}{nearest(name, COMMANDS)}" if name else "which command?"
    raise UserError(f"{problem}; allowed: {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
