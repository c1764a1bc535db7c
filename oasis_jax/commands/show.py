"""`oasis_jax show`: a config, and what its model is made of: parameters, and what each sublayer reads and writes; of
two configs, what differs.
"""

import os
import sys
from collections.abc import Sequence

from oasis_jax.commands.config_file import load_config
from oasis_jax.commands.config_tables import differences, set_otherwise
from oasis_jax.commands.options import add_set
from oasis_jax.commands.parser import Parser
from oasis_jax.commands.table import terminal_width
from oasis_jax.config import Config
from oasis_jax.errors import UserError, printable
from oasis_jax.overrides import apply_overrides, parse_overrides
from oasis_jax.storage import as_path, is_remote


def make_parser(program: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=program,
        description="Prints a config, the parameters of its model and, step by step, what sublayers read and write; "
        "of two configs the fields in which they differ.",
    )
    parser.add_argument(
        "source",
        metavar="CONFIG",
        help="a Python file with get_config(), or the workdir of a run, whose newest checkpoint holds its config",
    )
    parser.add_argument("other", nargs="?", metavar="CONFIG", help="another one: prints the fields that differ")
    add_set(parser, "another value for a field of the config, of both where there are two")
    return parser


def main(argv: Sequence[str], program: str = "oasis_jax show") -> None:
    """Prints the tables."""
    args = make_parser(program).parse_args(argv)
    parse_overrides(args.set)  # before anything is loaded
    config, width = read_config(args.source, args.set), terminal_width()
    if args.other is not None:
        text = differences(config, read_config(args.other, args.set), (args.source, args.other), width)
    else:
        # Imported here, so that --help and mistakes in flags do not wait for JAX.
        from oasis_jax.commands.model_tables import describe

        text = f"{describe(config, width)}\n\n{set_otherwise(config, width)}"
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:  # whoever reads has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_config(source: str, assignments: Sequence[str]) -> Config:
    """The config of a file, of a name or of a run, with fields set otherwise; raises UserError where there is none."""
    path = as_path(source, "CONFIG")
    is_run = is_remote(path) or path.is_dir()
    return apply_overrides(stored_config(source) if is_run else load_config(source, "CONFIG"), assignments)


def stored_config(workdir: str | os.PathLike[str]) -> Config:
    """The config that the newest whole checkpoint of a run holds.

    Raises:
      UserError: the folder holds no run, or a checkpoint that this version cannot read.
    """
    from oasis_jax.training.checkpoints import Checkpoints
    from oasis_jax.training.description import stored_config as config_of
    from oasis_jax.training.workdir import readable

    workdir = readable(workdir, "CONFIG")
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
