"""Flags of `oasis_jax eval` that say on which questions models are scored, and how they are asked."""

import argparse
from typing import Any

from oasis_jax.commands.parser import Parser


def add_tasks(parser: Parser) -> None:
    """--tasks and what goes with it; `task_settings` reads the latter."""
    group = parser.add_argument_group("with --tasks")
    group.add_argument(
        "--tasks", default="", metavar="NAMES", help="what to score models on, in float and under --quantize: gsm8k"
    )
    group.add_argument("--gsm8k-file", metavar="FILE", help="questions and answers as .jsonl")
    group.add_argument("--gsm8k-train", metavar="FILE", help="worked examples as .jsonl; by default eight fixed ones")
    group.add_argument(
        "--gsm8k-prompt", metavar="NAME", help="cot, worked examples, the default; boxed; or chat, boxed in chat"
    )
    group.add_argument("--shots", type=int, metavar="N", help="worked examples before each question; 8")
    group.add_argument("--samples", type=int, metavar="N", help="texts a question; 1")
    group.add_argument("--pass-at", type=int, metavar="K", help="a question counts where one of K samples is right; 1")
    group.add_argument("--temperature", type=float, metavar="X", help="0, the default: the likeliest token")
    group.add_argument(
        "--top-p", type=float, metavar="X", help="draw from the likeliest with this probability together"
    )
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of an answer at the most; 256")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    group.add_argument("--rows", type=int, metavar="N", help="texts made at once; 8")
    group.add_argument("--seed", type=int, metavar="N", help="of what is drawn; 0")


_NAMES = (
    *("gsm8k_file", "gsm8k_train", "gsm8k_prompt", "shots", "samples", "pass_at", "temperature", "top_p"),
    *("max_new_tokens", "limit", "rows", "seed"),
)


def task_settings(parser: Parser, args: argparse.Namespace) -> dict[str, Any]:
    """What is given of a task's settings, by name; exits with one line where flags do not go together."""
    given = {name: value for name in _NAMES if (value := getattr(args, name)) is not None}
    if given and not args.tasks:
        parser.error(f"{', '.join('--' + name.replace('_', '-') for name in given)}: only with --tasks")
    if args.tasks and (args.transplant or args.rotate):
        parser.error("--tasks: models are scored as they are; leave out --transplant and --rotate")
    return given
