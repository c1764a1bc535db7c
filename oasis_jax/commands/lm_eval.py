"""`oasis_jax lm-eval`: a model in the language model evaluation harness, whose own command line does the rest."""

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Sequence

from oasis_jax.commands.options import add_set
from oasis_jax.commands.parser import Parser
from oasis_jax.commands.task_model import FIELDS, add_model, model_arguments
from oasis_jax.errors import UserError, nearest

# What this command says to the harness itself.
_OURS = {
    "--model_args": "the flags of this command",
    "--batch_size": "--batch-size",
    "--max_batch_size": "--batch-size",
    "--device": "JAX_PLATFORMS",
}


def make_parser(program: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=program,
        description="Runs tasks of lm-eval, the language model evaluation harness, on a trained run or a pretrained "
        "model. Flags that are not listed here go to the harness as they are: --limit, --num_fewshot, --include_path, "
        "--gen_kwargs, --output_path, --log_samples and more; see `lm-eval run --help`.",
    )
    add_model(parser)
    parser.add_argument("--tasks", required=True, metavar="NAMES", help="tasks, with commas between; or .yaml files")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="requests computed at once; 8")
    parser.add_argument(
        "--max-length", type=int, metavar="T", help="tokens read at once; the model's context, 2048 where it has none"
    )
    add_set(parser, "how a model is split over devices, such as mesh.tensor=2", FIELDS)
    return parser


def main(argv: Sequence[str], program: str = "oasis_jax lm-eval") -> None:
    """Runs the harness, which prints its table."""
    parser = make_parser(program)
    args, others = parser.parse_known_args(argv)
    for flag in others:
        if flag.partition("=")[0] in _OURS:
            parser.error(f"{flag}: not here; what it would say is said by {_OURS[flag.partition('=')[0]]}")
    described = model_arguments(parser, args)
    if args.max_length is not None:
        described["max_length"] = args.max_length

    # Imported here, so that --help and mistakes in flags do not wait for JAX and the harness.
    import oasis_jax.evaluation.tasks.lm_eval  # noqa: F401  (it registers the model)

    own = ["--model=oasis_jax", f"--model_args={json.dumps(described)}", f"--batch_size={args.batch_size}"]
    run_harness(parser, [*own, f"--tasks={args.tasks}", *others])


def run_harness(parser: Parser, arguments: Sequence[str]) -> None:
    """`lm-eval run` with these arguments; what a user can mend in them is one line.

    Raises:
      UserError: a value that does not go together with others, an unknown task, data that cannot be read.
    """
    from lm_eval.__main__ import HarnessCLI, setup_logging
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.tasks import TaskManager

    setup_logging()
    parsed = _parse(parser, HarnessCLI(), arguments)
    try:
        EvaluatorConfig.from_cli(parsed)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"lm-eval: {error}") from None
    try:
        HarnessCLI().execute(parsed)
    except OSError as error:  # data that are not there, a hub that cannot be reached
        raise UserError(f"lm-eval: {type(error).__name__}: {error}") from None
    except ValueError as error:
        said, _, names = str(error).partition("Tasks not found: ")
        if said or not names:
            raise
        close = nearest(names.split(", ")[0], TaskManager(include_path=parsed.include_path).all_tasks)
        raise UserError(f"--tasks: {error}{close}; `lm-eval ls tasks` lists them") from None


def _parse(parser: Parser, harness, arguments: Sequence[str]) -> argparse.Namespace:
    before, said = sys.argv, io.StringIO()
    try:
        sys.argv = ["lm-eval", "run", *arguments]  # the harness reads them nowhere else
        with contextlib.redirect_stderr(said):
            return harness.parse_args()
    except SystemExit:
        problem = said.getvalue().strip().rpartition("error: ")[2]
        flags = [name for name in parser._option_string_actions if name.startswith("--")]
        near = nearest(problem.partition(":")[2].split("=")[0].strip(), flags) if "unrecognized" in problem else ""
        parser.error(f"the harness: {problem}{near}")
    finally:
        sys.argv = before
