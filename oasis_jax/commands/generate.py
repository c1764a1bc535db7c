"""`oasis_jax generate`: continues texts with a trained run or a pretrained model."""

import dataclasses
import sys
from collections.abc import Sequence

from oasis_jax.commands.options import add_set
from oasis_jax.commands.parser import Parser
from oasis_jax.commands.task_model import FIELDS, add_model, load_described, model_arguments
from oasis_jax.errors import printable


def make_parser(program: str) -> Parser:
    """The flags of the command."""
    parser = Parser(prog=program, description="Continues texts; a single one is written as it is made.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="a text to continue; several: all at once")
    add_model(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most so many; 128")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0, the default: the likeliest token"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="draw from the N likeliest tokens; 0: all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="draw from the likeliest with this probability together"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="X", help="draw from those with this share of the likeliest one's"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="divides logits of tokens that were there"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text before it; repeatable")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="PROMPT is a message, put into the model's chat template; its answer is written",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn; 0")
    parser.add_argument("--kv-cache", default="float", metavar="NAME", help="keys and values: float, or int8")
    parser.add_argument("--transplant", action="store_true", help="with its begin token as the null of its attention")
    add_set(parser, "how a model is split over devices, such as mesh.tensor=2", FIELDS)
    return parser


def main(argv: Sequence[str], program: str = "oasis_jax generate") -> None:
    """Writes the texts to standard output."""
    parser = make_parser(program)
    args = parser.parse_args(argv)
    described = model_arguments(parser, args)

    # Imported here, so that --help and mistakes in flags do not wait for JAX.
    from oasis_jax.decoding import Sampling, generate

    sampling = Sampling(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Sampling)})
    model = load_described(described, transplant=args.transplant)
    options = dict(max_new_tokens=args.max_new_tokens, sampling=sampling, stop=args.stop, seed=args.seed)
    options |= dict(kv_cache=args.kv_cache)
    prompts = [_chat(model, prompt) for prompt in args.prompts] if args.chat else args.prompts
    if len(prompts) == 1:
        _stream("" if args.chat else prompts[0], lambda say: generate(model, prompts, on_text=say, **options))
        return
    for prompt, found in zip(args.prompts, generate(model, prompts, **options)):
        between = "\n" if args.chat else ""
        print(_shown(f"{prompt}{between}{found.text}\n"))


def _chat(model, prompt: str) -> list[int]:
    from oasis_jax.decoding.chat import encode

    return encode(model, [{"role": "user", "content": prompt}])


def _stream(start: str, run) -> None:
    print(_shown(start), end="", flush=True)
    run(lambda _, text: (sys.stdout.write(_shown(text)), sys.stdout.flush()))
    print()


def _shown(text: str) -> str:
    """Texts as they are; on a terminal without what would steer it, which any model can be made to say."""
    return printable(text) if sys.stdout.isatty() else text
