"""`oasis_jax study`: trains and measures a matrix of methods and seeds, and says what that tells of every claim."""

import functools
import pathlib
from collections.abc import Sequence

from oasis_jax.commands.options import local_folder
from oasis_jax.commands.parser import Parser
from oasis_jax.errors import Preempted, UserError, printable, unknown_name


def make_parser(program: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=program,
        description="Trains and measures every method of a study with every seed, from equal starts, and writes one "
        "report. The same command goes on where it was stopped; started on several hosts with the same folder, each "
        "takes cells that nobody works on.",
    )
    parser.add_argument(
        "study", metavar="STUDY", help="a Python file with get_study(), or the name of one that comes with the library"
    )
    aim = parser.add_mutually_exclusive_group(required=True)
    aim.add_argument(
        "--out", type=local_folder, metavar="FOLDER", help="where cells, numbers and the report are written"
    )
    aim.add_argument(
        "--plan",
        metavar="HARDWARE:SHAPE",
        help="train nothing: compile every method for v5e:2x4, h100:8 ... and say whether it fits; exits with 1 where "
        "one does not",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes at a time on this machine; 1, the default"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="save and end after so many; the same command goes on"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="only the first N seeds; the others may follow later")
    parser.add_argument(
        "--methods", default="", metavar="NAMES", help="only these, with commas between; the others may follow later"
    )
    parser.add_argument(
        "--report", action="store_true", help="train nothing: write the report from the cells that are there"
    )
    return parser


def main(argv: Sequence[str], program: str = "oasis_jax study") -> None:
    """Runs what is left to do and writes the report."""
    parser = make_parser(program)
    args = parser.parse_args(argv)
    for name in ("workers", "seeds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}: must be at least 1, got {getattr(args, name)}")
    if args.minutes is not None and not 0 < args.minutes < 1e6:
        parser.error(f"--minutes: must be above 0, got {args.minutes:g}")
    if (args.report or args.plan) and (args.minutes or args.workers > 1):
        parser.error(f"{'--report' if args.report else '--plan'} trains nothing: leave out --minutes and --workers")
    if args.report and (args.plan or args.methods):
        parser.error("--report shows all cells that are there: leave out --plan and --methods")
    load = functools.partial(load_study, args.study, args.seeds)
    study = load()
    methods = tuple(name.strip() for name in args.methods.split(",") if name.strip())
    for method in methods:
        if method not in study.methods:
            raise unknown_name("--methods", method, study.methods)
    if args.plan is not None:
        plan_study(study, args.plan, methods or tuple(study.methods))
        return

    # Imported here, so that --help and mistakes in flags do not wait for JAX.
    from oasis_jax.study.design import CELLS
    from oasis_jax.study.report import write_study_report
    from oasis_jax.study.run import run_study

    notice = None
    if not args.report:
        try:
            run_study(load, args.out, methods=methods, workers=args.workers, minutes=args.minutes)
        except Preempted as told:
            notice = told
    if notice and not any((args.out / CELLS).glob("*/*/*/result.json")):
        raise notice  # there is nothing to report yet
    found = write_study_report(study, args.out)
    for verdict in found.verdicts:
        where = f" ({verdict.arm})" if verdict.arm and len(study.arms) > 1 else ""
        print(printable(f"{verdict.word}: {verdict.claim.text}{where}: {verdict.reason}"))
    print(printable(f"{found.done} of {found.total} cells; report: {args.out}/index.html"))
    if notice:
        raise notice


def plan_study(study, hardware: str, methods: Sequence[str]) -> None:
    """Prints the plan of methods, in the first arm; exits with 1 where one does not fit."""
    from oasis_jax.evaluation import lower_evaluation
    from oasis_jax.study.design import Cell
    from oasis_jax.training.plan import run_plan

    if study.source:
        raise UserError("--plan: this study measures a model and trains nothing")
    fit = []
    for method in methods:
        print(f"{method}:")
        config = study.config(Cell(next(iter(study.arms)), method, study.seeds[0]))
        fit.append(run_plan(config, hardware, lower_evaluation))
    if not all(fit):
        raise SystemExit(1)


def load_study(path: str | pathlib.Path, seeds: int | None = None):
    """The study of a file, with its first seeds only where a number is given.

    Raises:
      UserError: there is no such file, it does not run, or it has no `get_study()` that returns a Study.
    """
    import dataclasses

    from oasis_jax.commands.config_file import load_file
    from oasis_jax.study.design import Study

    study = load_file(path, "get_study", Study, "STUDY")
    return study if seeds is None else dataclasses.replace(study, seeds=study.seeds[:seeds])
