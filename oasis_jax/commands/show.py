"""`oasis_jax show`: what a model is made of, from its config alone: parameters, and what each sublayer reads and
writes.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

from oasis_jax.commands.config_file import load_config
from oasis_jax.commands.options import add_set
from oasis_jax.commands.parser import Parser
from oasis_jax.commands.table import terminal_width
from oasis_jax.config import Config
from oasis_jax.errors import UserError, printable
from oasis_jax.overrides import apply_overrides, parse_overrides


def make_parser(program: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=program, description="Prints a model's parameters and, step by step, what its sublayers read and write."
    )
    parser.add_argument(
        "source",
        metavar="CONFIG",
        help="a Python file with get_config(), or the workdir of a run, whose newest checkpoint holds its config",
    )
    add_set(parser, "another value for a field of the config")
    return parser


def main(argv: Sequence[str], program: str = "oasis_jax show") -> None:
    """Prints the tables."""
    args = make_parser(program).parse_args(argv)
    parse_overrides(args.set)  # before anything is loaded
    config = stored_config(args.source) if pathlib.Path(args.source).is_dir() else load_config(args.source, "CONFIG")
    config = apply_overrides(config, args.set)

    # Imported here, so that --help and mistakes in flags do not wait for JAX.
    from oasis_jax.commands.model_tables import describe

    try:
        print(printable(describe(config, terminal_width())), flush=True)
    except BrokenPipeError:  # whoever reads has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stored_config(workdir: str | pathlib.Path) -> Config:
    """The config that the newest whole checkpoint of a run holds.

    Raises:
      UserError: the folder holds no run, or a checkpoint that this version cannot read.
    """
    from oasis_jax.training.checkpoints import Checkpoints
    from oasis_jax.training.description import stored_config as config_of

    workdir = pathlib.Path(workdir)
    if not (workdir / "checkpoints").is_dir():
        raise UserError(
            f"CONFIG: there is no run in {str(workdir)!r} (it has no folder 'checkpoints'); give a config file or "
            "a workdir"
        )

    def restore(step: int) -> Config:
        return config_of(checkpoints.metadata(step))

    with Checkpoints(workdir, keep=None, say=lambda text: print(printable(text), file=sys.stderr)) as checkpoints:
        if not checkpoints.steps():
            raise UserError(f"CONFIG: the run in {str(workdir)!r} has no checkpoint yet")
        return checkpoints.first_whole(restore, checkpoints.steps())[0]
