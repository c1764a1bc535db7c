"""`oasis_jax export`: writes a model as safetensors with config.json and its tokenizer."""

from collections.abc import Sequence

from oasis_jax.commands.options import add_set, local_folder, read_set
from oasis_jax.commands.parser import Parser
from oasis_jax.errors import printable

# What the files of OASIS' published code do not say.
FIELDS = tuple(f"model.{x}" for x in ("normalizer", "depth_normalizer", "clip_gamma", "clip_zeta", "clip_alpha"))


def make_parser(program: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=program,
        description="Writes a trained run or a pretrained model as a folder of safetensors: of its own family where it "
        "is one, else of this library's.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a workdir, a folder of safetensors, a .gguf file, owner/name")
    parser.add_argument(
        "--out", required=True, type=local_folder, metavar="FOLDER", help="where to write; has to be empty or missing"
    )
    parser.add_argument("--dtype", metavar="NAME", help="of the tensors: float32, bfloat16, float16; as the source's")
    parser.add_argument(
        "--transplant", default="", metavar="TOKENS", help="transplant its sink first: begin, or numbers with commas"
    )
    parser.add_argument(
        "--rotate", action="store_true", help="rotate its residual stream first, so that its family's readers know it"
    )
    add_set(parser, "how a checkpoint of OASIS' published code was trained, which its files do not say", FIELDS)
    return parser


def main(argv: Sequence[str], program: str = "oasis_jax export") -> None:
    """Writes the folder and says what it is."""
    parser = make_parser(program)
    args = parser.parse_args(argv)
    given = read_set(parser, args, FIELDS)

    # Imported here, so that --help and mistakes in flags do not wait for JAX.
    from oasis_jax.errors import UserError
    from oasis_jax.pretrained import load_pretrained, rotate, save_pretrained, transplant_sink

    model = load_pretrained(args.source, normalizers=given.get("model"))
    if args.transplant:
        tokens = args.transplant.split(",")
        if args.transplant != "begin" and not all(token.strip().isdecimal() for token in tokens):
            raise UserError(f"--transplant: must be begin or numbers with commas between, got {args.transplant!r}")
        model = transplant_sink(model, None if args.transplant == "begin" else [int(token) for token in tokens])
    if args.rotate:
        model = rotate(model, online=False)
    kind = save_pretrained(model, args.out, dtype=args.dtype)
    readers = "read it with oasis_jax.load_pretrained" if kind == "oasis" else "transformers reads it, too"
    print(printable(f"{args.out}: model_type {kind}; {readers}"))
