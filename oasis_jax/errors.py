"""The one kind of error a user can cause, and how it is worded."""

import difflib
import unicodedata
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: the message is one line that says what is wrong, where, and what is allowed.

    `train.py` and `eval.py` print the message and exit with code 2; a library caller sees a ValueError.
    """


class Preempted(Exception):
    """The run was told to end (SIGTERM) and has saved; the message says where it stands.

    `train.py` prints the message and exits with code 143, as a process ended by that signal does, so that schedulers
    start it again.

    Args:
      message: one line.
      compiling: a thread is still compiling what nobody waits for; it cannot be stopped.
    """

    def __init__(self, message: str, *, compiling: bool = False):
        super().__init__(message)
        self.compiling = compiling


_TURNS = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))  # of the direction of writing


def printable(text: str) -> str:
    """A text for a terminal: what would steer it is written out as in `repr`. Line ends and tabs stay."""
    steers = lambda c: unicodedata.category(c) in ("Cc", "Cs") or c in _TURNS
    return "".join(repr(c)[1:-1] if c not in "\n\t" and steers(c) else c for c in text)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """' (did you mean 'x'?)' for the allowed name closest to `name`, or '' when none is close."""
    close = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown_name(what: str, name: object, allowed: Iterable[str]) -> UserError:
    """The error for a name that is not in a table.

    Args:
      what: what the name stands for, such as "model.normalizer".
      name: what was given.
      allowed: the names there are.
    """
    allowed = list(allowed)
    return UserError(f"{what}: unknown name {name!r}{nearest(str(name), allowed)}; allowed: {', '.join(allowed)}")
