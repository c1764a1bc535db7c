"""Fields of a config that are set otherwise, written as "section.field=value": what --set means, for every command."""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterable, Iterator
from typing import Literal

from oasis_jax.config import METHOD_FIELDS, Config, field_type, sections
from oasis_jax.errors import UserError

_CLOSE = 0.6  # share of letters that two names have in common, above which one may be meant for the other


def apply_overrides(config: Config, assignments: Iterable[str]) -> Config:
    """`config` with every "section.field=value" of `assignments` applied; of two for one field the later counts.

    All are applied at once, so that only the result has to fit together and the order does not matter:
    `model.preset=NAME` first gives the fields of the method their preset's values, then every other assignment is made.

    Raises:
      UserError: an unknown section or field, a value of another type, or a result that does not fit together.
    """
    given = parse_overrides(assignments)
    if "preset" in given.get("model", {}):
        given["model"] = dict.fromkeys(METHOD_FIELDS) | given["model"]
    changed = {section: dataclasses.replace(getattr(config, section), **values) for section, values in given.items()}
    return dataclasses.replace(config, **changed)


def parse_overrides(assignments: Iterable[str]) -> dict[str, dict[str, object]]:
    """["model.width=64"] -> {"model": {"width": 64}}; raises UserError for an unknown field or a value of
    another type.
    """
    given: dict[str, dict] = {}
    for assignment in assignments:
        section, name, value = _parse(assignment)
        given.setdefault(section, {})[name] = value
    return given


def all_fields() -> Iterator[tuple[str, type, dataclasses.Field]]:
    """(section, its class, field) of every field of a config, as written in the schema: a model's preset
    comes first.
    """
    for section, cls in sections().items():
        # A class's own fields, before those that it takes over.
        order = {name: place for place, name in enumerate(cls.__annotations__)}
        for field in sorted(dataclasses.fields(cls), key=lambda f: order.get(f.name, len(order))):
            yield section, cls, field


def is_table(hint: object) -> bool:
    """Whether a field of this type is a table and not a single value, so that only a config file can give it."""
    return hint not in (int, float, bool, str) and typing.get_origin(hint) is not Literal


@functools.cache
def _types() -> dict[str, object]:
    """'section.field' -> its type, in the order of `all_fields`."""
    return {f"{section}.{field.name}": field_type(cls, field.name) for section, cls, field in all_fields()}


@functools.cache
def _settable() -> tuple[str, ...]:
    return tuple(name for name, hint in _types().items() if not is_table(hint))


def _parse(assignment: str) -> tuple[str, str, object]:
    """'model.width=64' -> ('model', 'width', 64)."""
    where, equals, text = assignment.partition("=")
    section, dot, name = where.partition(".")
    if not equals or not dot:
        raise UserError(
            f"--set: expected section.field=value, got {assignment!r}{_nearest(where)}; --help lists every field"
        )
    if where not in _types():
        fields = [full for full in _settable() if full.startswith(f"{section}.")] or list(sections())
        raise UserError(f"--set: unknown name {where!r}{_nearest(where)}; allowed: {', '.join(fields)}")
    if is_table(_types()[where]):
        raise UserError(f"--set: {where} is a table and cannot be set on the command line; write it in a config file")
    return section, name, _parse_value(where, text, _types()[where])


def _nearest(where: str) -> str:
    """' (did you mean 'section.field'?)' for the field whose own name is closest, in whatever section; the section
    decides between fields that are equally close. '' where none is close.
    """
    section, _, name = where.rpartition(".")

    def likeness(full: str) -> float:
        its_section, _, its_name = full.partition(".")
        ratio = difflib.SequenceMatcher(None, name, its_name).ratio()
        return ratio + 0.1 * difflib.SequenceMatcher(None, section, its_section).ratio() if ratio > _CLOSE else 0.0

    best = max(_types(), key=likeness)
    return f" (did you mean {best!r}?)" if likeness(best) else ""


def _parse_value(where: str, text: str, hint: object) -> object:
    """The text of a value as the type of its field; names are left for the config to check."""
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{where}: expected true or false, got {text!r}")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return int(text) if hint is int else float(text)
        except ValueError:
            pass
        if hint is int and _is_whole(text):
            return int(float(text))
        text = text if len(text) <= 40 else f"{text[:37]}..."
        raise UserError(f"{where}: expected {'a whole number' if hint is int else 'a number'}, got {text!r}")
    return text


def _is_whole(text: str) -> bool:
    """Whether a number such as '1e3' is a whole one."""
    try:
        return float(text).is_integer()
    except ValueError:
        return False
