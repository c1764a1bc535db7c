"""What every command line has: flags whose mistakes are one line, and exit codes that say how it ended."""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from oasis_jax.errors import Preempted, UserError, nearest, printable


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and name the nearest flag. Flags are written out in full."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for arg in args:
            if arg == "--":
                break
            flag = arg.partition("=")[0]
            # Checked before argparse, which would complain first of the flag that is missing because of the
            # misspelling.
            if flag.startswith("--") and flag not in self._option_string_actions:
                flags = [name for name in self._option_string_actions if name.startswith("--")]
                self.error(f"unknown flag {flag}{nearest(flag, flags)}; allowed: {', '.join(flags)}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{_line(f'{self.prog}: error: {message}')}\n")


def run_main(
    main: Callable[[Sequence[str], str], object], argv: Sequence[str] | None = None, program: str | None = None
) -> NoReturn:
    """Runs main(argv, program) and exits: 0, 2 with one line on stderr after a user's mistake, 130 after Ctrl-C, 143
    after SIGTERM.

    A SystemExit of main's own passes: a plan that does not fit ends with 1. Any other exception is a bug and keeps its
    traceback.

    Args:
      argv: without the program's name; None: sys.argv's.
      program: how messages call it; None: the script that was started.
    """
    program = program or pathlib.Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack an arrow, or the letters of a name or a text
        stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:] if argv is None else argv, program)
    except UserError as error:
        _say(f"{program}: error: {error}")
        raise SystemExit(2) from None
    except ValueError as error:
        # A backend that a config names and that cannot serve here; the operators know nothing of this library's errors.
        dispatch = sys.modules.get("pallas_kernels.dispatch")
        if dispatch is None or not isinstance(error, dispatch.CannotServe):
            raise
        field = "model.depth_implementation" if "depth_route" in str(error) else "model.attention_implementation"
        _say(f"{program}: error: {field}: {error}")
        raise SystemExit(2) from None
    except Preempted as notice:
        _say(f"{program}: {notice}")
        if notice.compiling:  # the interpreter's end would wait for that thread, or break under it
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(143)
        raise SystemExit(143) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0)


def _line(text: str) -> str:
    return printable(" ".join(text.split()))


def _say(text: str) -> None:
    print(_line(text), file=sys.stderr)
