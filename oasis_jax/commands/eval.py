"""`oasis_jax eval`, also eval.py: measures trained runs and pretrained models and writes a report."""

import argparse
from collections.abc import Sequence

from oasis_jax.commands.options import add_processes, add_set, folder, join_processes, read_processes
from oasis_jax.commands.parser import Parser
from oasis_jax.commands.task_flags import add_tasks, task_settings
from oasis_jax.errors import printable
from oasis_jax.overrides import parse_overrides

# What an evaluation may set otherwise than the run: `oasis_jax.training.load.HOW`, tables left out.
FIELDS = (
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence", "data.pattern"),
    *("model.attention_implementation", "model.depth_implementation", "model.remat", "model.stack"),
)
# Flags that say something about pretrained models only -> what they are without being given.
MODEL_FLAGS = {
    "text": "stdlib",
    "length": 512,
    "batch_size": 8,
    "begin_token": "auto",
    "dtype": "float32",
    "transplant": "",
    "rotate": False,
}


def make_parser(program: str) -> Parser:
    """The flags of the command."""
    parser = Parser(prog=program, description="Measures runs and pretrained models and writes them side by side.")
    parser.add_argument(
        "--workdir", action="append", default=[], type=folder, metavar="FOLDER", help="a trained run; repeatable"
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="SOURCE",
        help="a pretrained model: a folder of safetensors, a .gguf file, owner/name on a hub; repeatable",
    )
    parser.add_argument(
        "--report",
        required=True,
        type=folder,
        metavar="FOLDER",
        help="where index.html, metrics.json and figures/ are written",
    )
    parser.add_argument(
        "--batches",
        type=int,
        metavar="N",
        help="batches to read; by default of a run as many as its run.eval_batches, of a model 8",
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
    _add_model_flags(parser)
    add_tasks(parser)
    add_set(parser, "how models are computed and where their data lie, such as mesh.fsdp=8", FIELDS)
    add_processes(parser)
    return parser


def _add_model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("with --model")
    group.add_argument("--text", metavar="GLOB", help="what it reads: .txt or .jsonl files, or stdlib, the default")
    group.add_argument("--length", type=int, metavar="T", help="tokens of a sequence, the begin token not counted; 512")
    group.add_argument("--batch-size", type=int, metavar="B", help="sequences of a batch; 8")
    group.add_argument(
        "--begin-token", metavar="TOKEN", help="what texts begin with: auto, as the model's do; none; or its number"
    )
    group.add_argument(
        "--dtype", metavar="NAME", help="of parameters and computations: float32, the default, or bfloat16"
    )
    group.add_argument(
        "--transplant",
        metavar="TOKENS",
        help="measure it also with its sink transplanted: begin, its begin token; auto, also those at which massive "
        "activations are left; or numbers of tokens with commas between",
    )
    group.add_argument(
        "--rotate", action="store_true", default=None, help="measure it also with its residual stream rotated, and both"
    )


def main(argv: Sequence[str], program: str = "oasis_jax eval") -> None:
    """Measures, prints the comparison and writes the report."""
    parser = make_parser(program)
    args = parser.parse_args(argv)
    overrides = parse_overrides(args.set)  # their names and types are checked before anything is loaded
    given = {name: value for name in MODEL_FLAGS if (value := getattr(args, name)) is not None}
    _check(parser, args, given, overrides)
    settings = task_settings(parser, args)
    join_processes(read_processes(parser, args))

    # Imported here, so that --help and mistakes in flags do not wait for JAX.
    from oasis_jax.config import MeshConfig
    from oasis_jax.evaluation.report.terminal import print_comparison
    from oasis_jax.evaluation.runs import evaluate
    from oasis_jax.evaluation.subjects import ModelOptions
    from oasis_jax.training.distributed import is_first

    mesh = MeshConfig(**overrides["mesh"]) if overrides.get("mesh") else None
    options = ModelOptions(
        **(MODEL_FLAGS | given), num_batches=args.batches or 8, mesh=mesh, computed=overrides.get("model", {})
    )
    runs = evaluate(
        args.workdir,
        args.report,
        models=args.model,
        options=options,
        num_batches=args.batches,
        measures=_names(args.measures),
        interventions=_names(args.interventions),
        quantize=_names(args.quantize),
        overrides=args.set,
        tasks=_names(args.tasks),
        task_settings=settings,
        unwritten=print_comparison,
    )
    if is_first():
        print_comparison(runs)
        print(printable(f"report: {args.report}/index.html"))


def _check(parser: Parser, args: argparse.Namespace, given: dict, overrides: dict) -> None:
    """Ends with one line where flags do not go together."""
    if not args.workdir and not args.model:
        parser.error("give at least one --workdir FOLDER or --model SOURCE")
    if not args.workdir and overrides.get("data"):
        parser.error("--set data.pattern: only with --workdir; a model reads --text")
    if given and not args.model:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        parser.error(f"{flags}: only with --model; a run reads its own held-out data")
    for name in ("length", "batch_size"):
        if given.get(name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1, got {given[name]}")
    if given.get("dtype", "float32") not in ("float32", "bfloat16"):
        parser.error(f"--dtype: must be float32 or bfloat16, got {given['dtype']!r}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
