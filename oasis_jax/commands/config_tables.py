"""Configs as text: the fields that are set otherwise than by default, and those in which two differ."""

from oasis_jax.commands.table import aligned
from oasis_jax.config import Config, ModelConfig, sections
from oasis_jax.overrides import all_fields


def fields(config: Config) -> dict[str, object]:
    """'section.field' -> its value, every field, in the order of the schema."""
    return {f"{section}.{f.name}": getattr(getattr(config, section), f.name) for section, _, f in all_fields()}


def set_otherwise(config: Config, width: int) -> str:
    """The fields that neither a default nor, in a model, its preset gives, as rows of name and value."""
    usual = {section: cls() for section, cls in sections().items()} | {"model": ModelConfig(preset=config.model.preset)}
    rows = [
        (name, value_text(value))
        for name, value in fields(config).items()
        if name == "model.preset" or value != getattr(usual[name.partition(".")[0]], name.partition(".")[2])
    ]
    return f"config, other than by default\n{aligned(rows, width)}"


def differences(first: Config, second: Config, names: tuple[str, str], width: int) -> str:
    """The fields in which two configs differ, as rows of name and both values; in words where there are none."""
    one, other = fields(first), fields(second)
    rows = [(name, value_text(one[name]), value_text(other[name])) for name in one if one[name] != other[name]]
    if not rows:
        return f"{names[0]} and {names[1]} are the same config, field by field"
    return f"A: {names[0]}\nB: {names[1]}\n{aligned([('field', 'A', 'B'), *rows], width)}"


def value_text(value: object) -> str:
    """A value as one would type it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value in (None, ()) else str(value) or "''"
