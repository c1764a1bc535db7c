"""What a compiled step sends between devices, read from the compiler's own text, loops counted as often as they run."""

import math
import re
from typing import NamedTuple

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", re.MULTILINE)
_OPERATION = re.compile(r"= (\(?[^=]*?\)?) (" + "|".join(_KINDS) + r")(?:-start)?\(")
_COMMENT = re.compile(r"/\*.*?\*/")  # the compiler numbers the elements of long tuples
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|to_apply|calls|branch_computations|true_computation|false_computation)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?"
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
_CHAIN = re.compile(r"channel_id=(\d+).*\bchain_id=")  # TPUs': the start, the middle and the end of one transfer
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")


class Collective(NamedTuple):
    """One kind of collective in a step: how often it runs, and the bytes of its results on one device."""

    name: str
    count: int
    bytes: int


def collectives(text: str) -> list[Collective]:
    """Counts the collectives of a compiled program (`compiled.as_text()`), those with the most bytes first.

    A while loop counts as often as it runs: what the compiler says or, as TPUs' does not, the bound that its counter is
    compared with. One that tells neither counts once. A transfer that is spread over several operations counts once.
    """
    bodies, entry = _computations(text)
    found: dict[str, list[int]] = {}
    chains: set[str] = set()

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            line = _COMMENT.sub("", line)
            match, chain = _OPERATION.search(line), _CHAIN.search(line)
            counted = chain is not None and chain[1] in chains
            if chain:
                chains.add(chain[1])
            if match and not counted:
                totals = found.setdefault(match[2], [0, 0])
                totals[0] += times
                totals[1] += times * _size(
                    _result(match[1]) if f"{match[2]}-start(" in line and match[2] != "all-reduce" else match[1]
                )
            turns = _turns(line, bodies) if " while(" in line else 1
            for called in _CALLED.findall(line):
                for inner in called.replace("%", "").split(", "):
                    visit(inner, times * turns)

    visit(entry, 1)
    return sorted((Collective(name, *totals) for name, totals in found.items()), key=lambda kind: -kind.bytes)


def _turns(loop: str, bodies: dict[str, list[str]]) -> int:
    """How often a while loop runs; loops over an axis count from 0."""
    said, condition = _TRIPS.search(loop), _CONDITION.search(loop)
    if said or not condition:
        return int(said[1]) if said else 1
    test = "\n".join(bodies.get(condition[1], ()))
    bound = _BOUND.search(test)
    value = bound and re.search(rf"%?{re.escape(bound[1])} = s32\[\]\S* constant\((\d+)\)", test)
    return int(value[1]) if value else 1


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the name of the one that is run."""
    bodies: dict[str, list[str]] = {}
    name, entry = None, ""
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            name = start[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _result(shapes: str) -> str:
    """The second of (operands, results, ...), which the start of an asynchronous collective gives; that of an
    all-reduce gives results only.
    """
    depth, parts = 0, [""]
    for character in shapes.strip()[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts[1] if len(parts) > 1 else shapes


def _size(shapes: str) -> int:
    """Bytes of one shape or of all the shapes in a tuple."""
    return sum(math.prod(int(n) for n in dims.split(",") if n) * _BYTES[kind] for kind, dims in _SHAPE.findall(shapes))
