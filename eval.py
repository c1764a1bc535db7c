"""Measures trained runs and writes a report: `python eval.py --workdir runs/a --workdir runs/b --report
runs/report`.
"""

from collections.abc import Sequence

from oasis_jax.commands.command_line import Parser, run_main


def parser() -> Parser:
    """The command line of eval.py."""
    parser = Parser(
        prog="eval.py",
        description="Measures runs, each loaded from its checkpoint alone, and writes them side by side.",
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
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)

    # Imported here, so that --help and mistakes in flags do not wait for JAX.
    from oasis_jax.evaluation.report.terminal import print_comparison
    from oasis_jax.evaluation.runs import evaluate

    runs = evaluate(
        args.workdir,
        args.report,
        num_batches=args.batches,
        measures=_names(args.measures),
        interventions=_names(args.interventions),
        quantize=_names(args.quantize),
    )
    print_comparison(runs)
    print(f"report: {args.report}/index.html")


if __name__ == "__main__":
    run_main(main)
