"""What a part says: each result is a line of JSON in the file of results as soon as it is known, and a printed line."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping


def plain(x):
    """x as JSON can hold it: numbers that are not finite become text, and what JSON has no form for too."""
    if isinstance(x, Mapping):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else str(x)
    return x if isinstance(x, (str, int, bool, type(None))) else str(x)


def append(path: str | os.PathLike, line: Mapping) -> None:
    """Adds one line to the file and waits until the disk has it: whatever happens next does not lose it."""
    with open(path, "a") as file:
        file.write(json.dumps(plain(line), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def show(line: Mapping) -> None:
    """Prints a line of results for people."""
    facts = "  ".join(f"{key}={_text(value)}" for key, value in plain(line).items() if key not in ("part", "name"))
    print(f"{line['part']:22s} {line.get('name', ''):44s} {facts}", flush=True)


def _text(value) -> str:
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return text.replace('"', "").replace("\n", " | ")


class Report:
    """Where a part writes its results, and how much time it has left.

    path: the file of results.
    part: the part's name, on every line.
    seconds: how long the part may take.
    """

    def __init__(self, path: str | os.PathLike, part: str, seconds: float):
        self.path, self.part, self.seconds, self.start = path, part, seconds, time.monotonic()

    def say(self, name: str, **facts) -> None:
        """One result."""
        line = {"part": self.part, "name": name, **facts, "at_s": round(time.monotonic() - self.start, 1)}
        append(self.path, line)
        show(line)

    def late(self, share: float = 0.85) -> bool:
        """Whether this share of the part's time is over: what comes next is then left out, and said to be."""
        return time.monotonic() - self.start > share * self.seconds

    def left(self) -> float:
        """Seconds that the part still has."""
        return self.seconds - (time.monotonic() - self.start)

    def attempt(self, name: str, measure: Callable[[], Mapping]) -> Mapping | None:
        """Says what measure() gives; whatever it raises is a line too, and no end of the part."""
        try:
            facts = measure()
        except Exception as error:
            kind = "refused" if type(error).__name__ == "CannotServe" else "failed"
            self.say(name, **{kind: f"{type(error).__name__}: {str(error).strip()[:400]}"})
            return None
        self.say(name, **facts)
        return facts
