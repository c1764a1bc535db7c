"""`oasis_jax eval`, also eval.py: measures trained runs and writes a report."""

from collections.abc import Sequence

from oasis_jax.commands.options import add_processes, add_set, join_processes, read_processes
from oasis_jax.commands.parser import Parser
from oasis_jax.overrides import parse_overrides

# What an evaluation may set otherwise than the run: `oasis_jax.training.load.HOW`, tables left out.
FIELDS = (
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence", "data.pattern"),
    *("model.attention_implementation", "model.depth_implementation", "model.remat", "model.stack"),
)


def make_parser(program: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=program, description="Measures runs, each loaded from its checkpoint alone, and writes them side by side."
    )
    parser.add_argument("--workdir", action="append", required=True, metavar="FOLDER", help="a trained run; repeatable")
    parser.add_argument(
        "--report", required=True, metavar="FOLDER", help="where index.html, metrics.json and figures/ are written"
    )
    parser.add_argument(
        "--batches", type=int, metavar="N", help="held-out batches to read; as many as run.eval_batches by default"
    )
    parser.add_argument(
        "--measures",
        default="default",
        metavar="NAMES",
        help="default, all, or names of families of measures with commas between, such as sinks,attention_maps,joint",
    )
    parser.add_argument(
        "--interventions",
        default="",
        metavar="NAMES",
        help="what to take away from the model and measure the loss again: all, or names with commas between, such "
        "as sources,beta",
    )
    parser.add_argument(
        "--quantize",
        default="",
        metavar="NAMES",
        help="quantization schemes to measure beside float, with commas between: w8a8_tensor,w4a8+smooth",
    )
    add_set(parser, "how models are computed and where their data lie, such as mesh.fsdp=8", FIELDS)
    add_processes(parser)
    return parser


def main(argv: Sequence[str], program: str = "oasis_jax eval") -> None:
    """Measures, prints the comparison and writes the report."""
    parser = make_parser(program)
    args = parser.parse_args(argv)
    parse_overrides(args.set)  # their names and types are checked before anything is loaded
    join_processes(read_processes(parser, args))

    # Imported here, so that --help and mistakes in flags do not wait for JAX.
    from oasis_jax.evaluation.report.terminal import print_comparison
    from oasis_jax.evaluation.runs import evaluate
    from oasis_jax.training.distributed import is_first

    runs = evaluate(
        args.workdir,
        args.report,
        num_batches=args.batches,
        measures=_names(args.measures),
        interventions=_names(args.interventions),
        quantize=_names(args.quantize),
        overrides=args.set,
    )
    if is_first():
        print_comparison(runs)
        print(f"report: {args.report}/index.html")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
