"""Flags that say which model a task runs on, and how."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from oasis_jax.commands.options import folder, read_set
from oasis_jax.commands.parser import Parser

if TYPE_CHECKING:
    from oasis_jax.pretrained import Pretrained

FIELDS = ("mesh.data", "mesh.fsdp", "mesh.tensor")


def add_model(parser: Parser) -> None:
    """--model or --workdir, --dtype, --begin-token and --quantize; `model_arguments` reads them."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="SOURCE", help="a folder of safetensors, a .gguf file, owner/name on a hub")
    source.add_argument("--workdir", type=folder, metavar="FOLDER", help="a trained run")
    parser.add_argument("--dtype", metavar="NAME", help="of parameters and computations: float32 or bfloat16")
    parser.add_argument(
        "--begin-token",
        default="auto",
        metavar="TOKEN",
        help="what texts begin with: auto, as the model's do; none; or its number",
    )
    parser.add_argument(
        "--quantize", metavar="NAME", help="a quantization scheme, such as w8a8 or w4a4_g32+rotate; float by default"
    )


def model_arguments(parser: Parser, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `oasis_jax.evaluation.tasks.loading.load_model`, as JSON has them; those not given left out."""
    if args.dtype not in (None, "float32", "bfloat16"):
        parser.error(f"--dtype: must be float32 or bfloat16, got {args.dtype!r}")
    found = {
        "source": args.model or str(args.workdir),
        "dtype": args.dtype,
        "begin_token": args.begin_token,
        "quantize": args.quantize,
        "mesh": read_set(parser, args, FIELDS).get("mesh"),
    }
    return {name: value for name, value in found.items() if value is not None}


def load_described(described: Mapping[str, Any], **options: Any) -> "Pretrained":
    """The model that `model_arguments` describes; options are those of `load_model`."""
    from oasis_jax.config import MeshConfig
    from oasis_jax.evaluation.tasks.loading import load_model

    mesh = described.get("mesh")
    return load_model(**{**described, "mesh": mesh and MeshConfig(**mesh)}, **options)
