"""Which backend serves a call: one table per operator, from the fastest backend to the plainest."""

import difflib
from collections.abc import Callable, Mapping


class Unavailable(Exception):
    """A backend cannot serve this call; the message says why. Raised by a backend before it computes anything."""


def dispatch(operator: str, table: Mapping[str, Callable], implementation: str | None) -> Callable:
    """The function that serves `operator`: the named backend, or the first of the table that can.

    Args:
      operator: name of the operator, for messages.
      table: backend name -> function, fastest first.
      implementation: a name of the table, or None for the fastest backend that can serve the call.

    Returns:
      A function of the backends' arguments. With `implementation=None` it falls through to the next backend where one
      raises `Unavailable`; with a name it raises ValueError with the reason instead.

    Raises:
      ValueError: the name is not in the table.
    """
    if implementation is not None and implementation not in table:
        close = difflib.get_close_matches(str(implementation), table, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"implementation: {operator} has no {implementation!r}{hint}; there are: {', '.join(table)}")

    def serve(*args, **kwargs):
        reasons = []
        for name in table if implementation is None else (implementation,):
            try:
                return table[name](*args, **kwargs)
            except Unavailable as reason:
                reasons.append(f"{name}: {reason}")
        raise ValueError(f"implementation: {operator} cannot be served by {'; '.join(reasons)}; there are: {', '.join(table)}")

    return serve
