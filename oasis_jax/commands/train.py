"""`oasis_jax train`, also train.py: trains the model of a config, or plans whether that fits."""

from collections.abc import Sequence
from typing import NamedTuple

from oasis_jax.commands.config_file import load_config
from oasis_jax.commands.options import ProcessFlags, add_processes, add_set, folder, join_processes, read_processes
from oasis_jax.commands.parser import Parser
from oasis_jax.config import Config
from oasis_jax.overrides import apply_overrides
from oasis_jax.storage import Path


class Arguments(NamedTuple):
    """What the command is asked for; of workdir and plan one is None."""

    config: Config
    workdir: Path | None
    plan: str | None
    profile: str | None
    processes: ProcessFlags | None


def make_parser(program: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=program, description="Trains the model of a config. The same workdir resumes where the run stopped."
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a Python file with get_config(), or the name of one that comes with the library: demo",
    )
    aim = parser.add_mutually_exclusive_group(required=True)
    aim.add_argument(
        "--workdir",
        metavar="FOLDER",
        type=folder,
        help="where checkpoints and metrics are written; also gs:// or s3://",
    )
    aim.add_argument(
        "--plan",
        metavar="HARDWARE:SHAPE",
        help="train nothing: compile training and evaluation for v5p:4x4x4, h100:8 ... and say whether they fit; exits "
        "with 1 where they do not",
    )
    add_set(parser, "another value for a field of the config")
    parser.add_argument(
        "--profile",
        metavar="FIRST:END",
        help="write a trace of these steps for xprof, the end left out: --profile=10:15",
    )
    add_processes(parser)
    return parser


def parse(argv: Sequence[str], program: str) -> Arguments:
    """What the command is asked for.

    Raises:
      UserError: a mistake in the config or in what is set otherwise; one in the flags exits with one line.
    """
    parser = make_parser(program)
    args = parser.parse_args(argv)
    processes = read_processes(parser, args)
    if args.plan is not None and (processes is not None or args.profile is not None):
        parser.error(
            "--plan trains nothing, in one process: leave out --profile, --distributed, --coordinator, --processes "
            "and --process"
        )
    config = apply_overrides(load_config(args.config), args.set)
    return Arguments(config, args.workdir, args.plan, args.profile, processes)


def main(argv: Sequence[str], program: str = "oasis_jax train") -> None:
    """Trains or plans; a plan that does not fit exits with 1."""
    args = parse(argv, program)
    if args.plan is not None:
        plan(args.config, args.plan)
        return
    join_processes(args.processes)
    from oasis_jax.training.loop import fit
    from oasis_jax.training.profiling import parse_steps

    evaluators = {}
    if args.config.run.eval_interval:
        from oasis_jax.evaluation import evaluate_params

        evaluators = {"all": evaluate_params}
    fit(args.config, args.workdir, evaluators=evaluators, profile=args.profile and parse_steps(args.profile))


def plan(config: Config, hardware: str) -> None:
    """Prints the plan of training and evaluation; exits with 1 where they do not fit."""
    from oasis_jax.evaluation import lower_evaluation
    from oasis_jax.training.plan import run_plan

    if not run_plan(config, hardware, lower_evaluation):
        raise SystemExit(1)
