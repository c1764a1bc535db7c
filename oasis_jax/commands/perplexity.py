"""`oasis_jax perplexity`: the perplexity of a text in strided windows."""

import json
import math
from collections.abc import Sequence

from oasis_jax.commands.options import add_set, local
from oasis_jax.commands.parser import Parser
from oasis_jax.commands.task_model import FIELDS, add_model, load_described, model_arguments
from oasis_jax.errors import UserError
from oasis_jax.storage import fetched


def make_parser(program: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=program,
        description="The perplexity of a text, every token of it scored once, by token, word and byte; see "
        "docs/benchmarks.md.",
    )
    add_model(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8; read as one piece")
    parser.add_argument("--window", required=True, type=int, metavar="W", help="tokens that the model reads at once")
    parser.add_argument("--stride", required=True, type=int, metavar="S", help="tokens from one window to the next")
    parser.add_argument(
        "--begin-at",
        default="text",
        metavar="WHERE",
        help="where a begin token stands: text, the default, before the first token only; windows, before every window",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="windows computed at once; 8")
    parser.add_argument("--out", type=local, metavar="FILE", help="where all numbers are written as JSON")
    add_set(parser, "how a model is split over devices, such as mesh.tensor=2", FIELDS)
    return parser


def main(argv: Sequence[str], program: str = "oasis_jax perplexity") -> None:
    """Prints one line, and writes the file that --out names."""
    parser = make_parser(program)
    args = parser.parse_args(argv)
    described = model_arguments(parser, args)
    text = _read(args.text)
    if args.out:
        _write(args.out, "", "a")  # fails before anything is computed, and loses nothing

    # Imported here, so that --help and mistakes in flags do not wait for JAX.
    from oasis_jax.evaluation.tasks.perplexity import strided_perplexity

    model = load_described(described)
    windows = {"window": args.window, "stride": args.stride, "begin_at": args.begin_at}
    found = strided_perplexity(model, text, **windows, batch_size=args.batch_size)
    begin = "no begin token" if model.begin_token is None else f"begin token {model.begin_token} at {args.begin_at}"
    print(
        f"perplexity {found['perplexity']:.4f} per token, {found['word_perplexity']:.2f} per word, "
        f"{found['bits_per_byte']:.4f} bits per byte: {found['tokens']} tokens, window {args.window}, "
        f"stride {args.stride}, {begin}"
    )
    if args.out:
        numbers = {name: value if math.isfinite(value) else None for name, value in found.items()}
        everything = {**described, **windows, "text": args.text, "begin_token": model.begin_token, **numbers}
        _write(args.out, json.dumps(everything, indent=1, allow_nan=False) + "\n", "w")


def _read(file: str) -> str:
    try:
        return fetched(file, "--text").read_bytes().decode()
    except OSError as error:
        raise UserError(f"--text: cannot read {file!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--text: {file!r} is not UTF-8 at byte {error.start}") from None


def _write(file: str, text: str, mode: str) -> None:
    try:
        with open(file, mode, encoding="utf-8") as out:
            out.write(text)
    except OSError as error:
        raise UserError(f"--out: cannot write {file!r}: {error.strerror}") from None
