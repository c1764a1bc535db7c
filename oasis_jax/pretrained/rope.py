"""Rotary positions as config.json files say them: `rope_parameters` since transformers 5, `rope_scaling` before."""

from collections.abc import Mapping
from typing import Any

from oasis_jax.config import RopeScaling
from oasis_jax.errors import UserError, unknown_name
from oasis_jax.pretrained.keys import Keys, shortened


def _rope_values(keys: Keys) -> Keys:
    """Both spellings as one, with rope_theta and partial_rotary_factor where they are given."""
    new, old = keys.group("rope_parameters"), keys.group("rope_scaling")
    found = {name: old.take(name) for name in old.names}
    _merge(found, {name: new.take(name) for name in new.names}, f"{new.where} and rope_scaling")
    for group in (old, new):  # older files say type
        if "type" in group.names:
            _merge(found, {"rope_type": group.take("type")}, f"{group.where}: rope_type and type")
    found.pop("type", None)
    for name in ("rope_theta", "partial_rotary_factor"):
        if (outer := keys.take(name, None)) is not None:
            _merge(found, {name: outer}, f"{new.where} and the top level")
    return Keys(found, f"{keys.where}: rope parameters")


def _merge(found: dict[str, Any], more: Mapping[str, Any], names: str) -> None:
    for name, value in more.items():
        if found.setdefault(name, value) != value:
            raise UserError(f"{names} contradict each other: {name}={shortened(found[name])} and {shortened(value)}")


def rope_fields(
    keys: Keys,
    *,
    max_length: int,
    default_theta: float = 10_000.0,
    original: int = 0,
    partial: bool = False,
    aliases: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The ModelConfig fields rope_theta, rope_fraction and rope_scaling.

    Args:
      keys: of config.json.
      max_length: its max_position_embeddings, which is the original length where none is given.
      default_theta: where none is given.
      original: the family's default of original_max_position_embeddings outside the rope parameters; 0: none.
      partial: whether the family can turn a part of a head.
      aliases: names of kinds that mean another kind in this family.

    Raises:
      UserError: a kind of scaling or a parameter of it that is not known, or contradictions.
    """
    values = _rope_values(keys)
    kind = values.text("rope_type", "default")
    kind = (aliases or {}).get(kind, kind)
    fields = {
        "rope_theta": values.number("rope_theta", default_theta),
        "rope_fraction": values.number("partial_rotary_factor", 1.0),
        "rope_scaling": None,
    }
    if fields["rope_theta"] <= 1:  # 0 would mean no positions here
        raise UserError(f"{values.where}: rope_theta={fields['rope_theta']} must be above 1")
    if fields["rope_fraction"] != 1 and not partial:
        raise UserError(f"{values.where}: partial_rotary_factor={fields['rope_fraction']} is not supported here")
    outer = keys.whole("original_max_position_embeddings", original)
    if kind in _KINDS:
        # transformers lets the outer one win.
        inner = values.whole("original_max_position_embeddings", 0)
        fields["rope_scaling"] = _KINDS[kind](values, outer or inner or max_length, max_length)
    elif kind != "default":
        raise unknown_name(f"{values.where}: rope_type", kind, ["default", *_KINDS])
    values.finish(frozenset())
    return fields


def _linear(values: Keys, original: int, max_length: int) -> RopeScaling:
    del original, max_length
    return RopeScaling(kind="linear", factor=values.number("factor"))


def _llama3(values: Keys, original: int, max_length: int) -> RopeScaling:
    del max_length
    return RopeScaling(
        kind="llama3",
        factor=values.number("factor"),
        original_length=original,
        low_frequency_factor=values.number("low_freq_factor"),
        high_frequency_factor=values.number("high_freq_factor"),
    )


def _yarn(values: Keys, original: int, max_length: int) -> RopeScaling:
    for name in ("mscale", "mscale_all_dim"):
        values.expect(name, 0, None)
    return RopeScaling(
        kind="yarn",
        factor=values.number("factor", max_length / max(original, 1)),
        original_length=original,
        beta_fast=values.number("beta_fast", 32.0) or 32.0,
        beta_slow=values.number("beta_slow", 1.0) or 1.0,
        truncate=values.flag("truncate", True),
        attention_factor=values.number("attention_factor", 0.0),
    )


def _longrope(values: Keys, original: int, max_length: int) -> RopeScaling:
    if original < 2:
        raise UserError(f"{values.where}: the original length must be at least 2 for longrope, got {original}")
    return RopeScaling(
        kind="longrope",
        factor=values.number("factor", 0.0) or max(max_length / original, 1.0),
        original_length=original,
        short_factors=tuple(values.numbers("short_factor")),
        long_factors=tuple(values.numbers("long_factor")),
        attention_factor=values.number("attention_factor", 0.0),
    )


_KINDS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope, "su": _longrope}
