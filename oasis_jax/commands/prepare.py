"""`oasis_jax prepare`: turns text into shards of tokens, to train on with data.corpus=prepared."""

import os
import shlex
import sys
from collections.abc import Sequence

from oasis_jax.commands.options import add_set, local_folder, read_set
from oasis_jax.commands.parser import Parser
from oasis_jax.errors import printable
from oasis_jax.overrides import apply_overrides

FIELDS = ("data.text_key", "data.corrupt", "data.holdout_fraction", "data.bpe_vocab_size")


def make_parser(program: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=program,
        description="Writes the tokens of texts as ArrayRecord shards with an index.json. The same command goes on "
        "where it was stopped.",
    )
    parser.add_argument(
        "--source",
        metavar="SOURCE",
        action="append",
        help="a glob of .txt, .jsonl (also .gz, .zst) or .parquet files, or a data set on a hub or in a folder: "
        "hf:NAME[/CONFIG][:SPLIT[:COLUMN]], such as hf:wikitext/wikitext-2-raw-v1; may be given more than once",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="SOURCE",
        help="bytes, bpe (learned from the training part), a tokenizer.json, a .model file of sentencepiece, "
        "tiktoken:NAME, or a model with one: a folder, a .gguf file, owner/name",
    )
    parser.add_argument("--out", required=True, type=local_folder, metavar="FOLDER", help="where the shards lie")
    parser.add_argument(
        "--licence",
        default="",
        metavar="TEXT",
        help="of the text, as index.json is to say it; by default what a data set says of itself",
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read and tokenize; by default one a core"
    )
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

        print(printable(f"{args.out}: {verify(args.out)} shards, all as they were written"))
        return
    if not (args.source and args.tokenizer):
        parser.error("the following arguments are required: --source and --tokenizer, or --verify")
    if args.workers < 0:
        parser.error(f"--workers: must be at least 0, got {args.workers}")

    # Imported here, so that --help and mistakes in flags do not wait for JAX.
    from oasis_jax.config import Config
    from oasis_jax.data.prepare import prepare
    from oasis_jax.pretrained.tokenizer import open_tokenizer

    trained = args.tokenizer in ("bytes", "bpe")
    tokenizer = None if trained else open_tokenizer(args.tokenizer)
    kind = args.tokenizer if trained else tokenizer.kind
    words = ["data.corpus=files", f"data.pattern={args.source[0]}", f"data.tokenizer={kind}", *args.set]
    data = apply_overrides(Config(), words).data
    say = lambda text: print(printable(text), file=sys.stderr, flush=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    index = prepare(
        data, tokenizer, args.out, sources=args.source, licence=args.licence, workers=args.workers or cores, say=say
    )
    train, heldout = (index["parts"][part] for part in ("train", "heldout"))
    said = (
        f"{args.out}: {train['tokens']} tokens to train on in {len(train['shards'])} shards, {heldout['tokens']} held "
        f"out in {len(heldout['shards'])}; train with data.corpus=prepared "
        f"{shlex.quote(f'data.pattern={args.out}')} data.tokenizer={kind}"
    )
    print(printable(said))
