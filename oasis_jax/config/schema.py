"""How a section of a config is written down: fields with a help line, and the check that turns a wrong value into
words.
"""

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Literal

from oasis_jax.errors import UserError, unknown_name


def field(default, help: str):
    """A field of a section; `help` is its line in --help."""
    return dataclasses.field(default=default, metadata={"help": help})


def field_type(cls: type, name: str):
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
            if hint is float and not math.isfinite(value):
                raise UserError(f"{where}: must be finite, got {value!r}")


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
