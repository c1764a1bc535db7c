"""`oasis_jax prepare`: turns text into shards of tokens, to train on with data.corpus=prepared."""

import sys
from collections.abc import Sequence

from oasis_jax.commands.options import add_set, read_set
from oasis_jax.commands.parser import Parser
from oasis_jax.overrides import apply_overrides

FIELDS = ("data.text_key", "data.corrupt", "data.holdout_fraction", "data.bpe_vocab_size")


def make_parser(program: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=program,
        description="Writes the tokens of texts as ArrayRecord shards with an index.json. The same command goes on "
        "where it was stopped.",
    )
    parser.add_argument("--source", metavar="GLOB", help="of .txt, .jsonl (also .gz, .zst) or .parquet files")
    parser.add_argument(
        "--tokenizer",
        metavar="SOURCE",
        help="bytes, bpe (learned from the training part), or a model with one: a folder, a .gguf file, owner/name",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the shards lie")
    parser.add_argument("--licence", default="", metavar="TEXT", help="of the text, as index.json is to say it")
    parser.add_argument("--verify", action="store_true", help="write nothing, compare the shards with their checksums")
    add_set(parser, "how texts are read and split", FIELDS)
    return parser


def main(argv: Sequence[str], program: str = "oasis_jax prepare") -> None:
    """Writes the folder, or looks whether it is whole."""
    parser = make_parser(program)
    args = parser.parse_args(argv)
    read_set(parser, args, FIELDS)
    if args.verify:
        if args.source or args.tokenizer:
            parser.error("--verify: goes with --out alone")
        from oasis_jax.data.prepared import verify

        print(f"{args.out}: {verify(args.out)} shards, all as they were written")
        return
    if not (args.source and args.tokenizer):
        parser.error("the following arguments are required: --source and --tokenizer, or --verify")

    # Imported here, so that --help and mistakes in flags do not wait for JAX.
    from oasis_jax.config import Config
    from oasis_jax.data.prepare import prepare

    trained = args.tokenizer in ("bytes", "bpe")
    kind = args.tokenizer if trained else "library"
    words = ["data.corpus=files", f"data.pattern={args.source}", f"data.tokenizer={kind}", *args.set]
    data = apply_overrides(Config(), words).data
    tokenizer = None if trained else _tokenizer_of(args.tokenizer)
    say = lambda text: print(text, file=sys.stderr, flush=True)
    index = prepare(data, tokenizer, args.out, licence=args.licence, say=say)
    train, heldout = (index["parts"][part] for part in ("train", "heldout"))
    print(
        f"{args.out}: {train['tokens']} tokens to train on in {len(train['shards'])} shards, {heldout['tokens']} held "
        f"out in {len(heldout['shards'])}; train with data.corpus=prepared data.pattern={args.out} "
        f"data.tokenizer={kind}"
    )


def _tokenizer_of(source: str):
    from oasis_jax.errors import UserError
    from oasis_jax.pretrained.load import source_model, source_tokenizer
    from oasis_jax.pretrained.source import open_source

    files = open_source(source)
    tokenizer, _ = source_tokenizer(files, source_model(files))
    if tokenizer is None:
        raise UserError(f"--tokenizer: {source!r} comes without a tokenizer; allowed: bytes, bpe, or a model with one")
    return tokenizer
