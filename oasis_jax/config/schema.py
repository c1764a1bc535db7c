"""How a section of a config is written down: fields with a help line, and the check that turns a wrong value into
words.
"""

import dataclasses
import sys
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from oasis_jax.errors import UserError, unknown_name

LARGEST = 2**31 - 1  # of whole numbers: sizes, steps and seeds; what indices on devices can count


def field(default, help: str, *, low=None, high=None, above=None, below=None):
    """A field of a section; `help` is its line in --help. Numbers from `low` to `high`, the ends allowed, or above
    `above` and below `below`, which are not.
    """
    ends = dict(low=low, high=high, above=above, below=below)
    ends = {name: end for name, end in ends.items() if end is not None}
    return dataclasses.field(default=default, metadata={"help": help, "range": ends})


_ENDS = {
    "low": (lambda value, end: value >= end, "at least {:g}"),
    "above": (lambda value, end: value > end, "above {:g}"),
    "high": (lambda value, end: value <= end, "at most {:g}"),
    "below": (lambda value, end: value < end, "below {:g}"),
}


def range_in_words(ends: Mapping[str, float]) -> str:
    """{"low": 0, "below": 1} -> "at least 0 and below 1"; "" for a field without a range."""
    return " and ".join(words.format(ends[name]) for name, (_, words) in _ENDS.items() if name in ends)


def field_type(cls: type, name: str) -> Any:
    """The resolved annotation of a config field."""
    return typing.get_type_hints(cls)[name]


def check_fields(config, section: str) -> None:
    """Types and names of every field; the one place where a wrong value is turned into words."""
    for item in dataclasses.fields(config):
        value, hint = getattr(config, item.name), field_type(type(config), item.name)
        where = f"{section}.{item.name}"
        if typing.get_origin(hint) is Literal:
            if value not in typing.get_args(hint):
                raise unknown_name(where, value, typing.get_args(hint))
        elif hint in (int, float, bool, str):
            accepted = (int, float) if hint is float else hint
            if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
                raise UserError(f"{where}: expected {hint.__name__}, got {value!r} of type {type(value).__name__}")
            if hint is int and abs(value) > LARGEST:
                raise UserError(f"{where}: must lie between -{LARGEST} and {LARGEST}, got a number of more digits")
            if hint is float and not -sys.float_info.max <= value <= sys.float_info.max:
                raise UserError(f"{where}: must be finite, got {float(value) if isinstance(value, float) else 'more'}")
            ends = item.metadata.get("range", {})
            if not all(_ENDS[name][0](value, end) for name, end in ends.items()):
                raise UserError(f"{where}: must be {range_in_words(ends)}, got {value}")


def check_minimum(config, section: str, **minimum: float) -> None:
    """Raises UserError for the first field below its minimum."""
    for name, low in minimum.items():
        if not getattr(config, name) >= low:
            raise UserError(f"{section}.{name}: must be at least {low}, got {getattr(config, name)}")


def check_known(names: Iterable[str], cls: type, section: str, suffix: str = "") -> None:
    """Raises UserError for the first name that is no field of a section."""
    known = [item.name for item in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            error = unknown_name(f"{section}.{name}", name, known)
            raise UserError(f"{error}{suffix}")


def build(cls: type, values: Mapping, section: str, suffix: str = ""):
    """cls(**values), with a UserError for a name that it does not have."""
    check_known(values, cls, section, suffix)
    return cls(**values)
