"""Rotary positions as config.json files say them: `rope_parameters` since transformers 5, `rope_scaling` before."""

from typing import Any

from oasis_jax.config import RopeScaling
from oasis_jax.errors import UserError, unknown_name
from oasis_jax.pretrained.keys import Keys


def _rope_values(keys: Keys) -> dict[str, Any]:
    """Both spellings as one dict with rope_type, rope_theta and partial_rotary_factor where they are given."""
    new, old = keys.take("rope_parameters", {}), keys.take("rope_scaling", {})
    if new and old and {k: v for k, v in old.items() if k != "type"} != {k: new.get(k) for k in old if k != "type"}:
        raise UserError(f"{keys.where}: rope_parameters and rope_scaling contradict each other")
    found = {**old, **new}
    for name in ("rope_theta", "partial_rotary_factor"):
        outer = keys.take(name, None)
        if outer is not None and found.setdefault(name, outer) != outer:
            raise UserError(
                f"{keys.where}: {name}={outer} and rope_parameters.{name}={found[name]} contradict each other"
            )
    kinds = {found.pop(name, None) for name in ("rope_type", "type")} - {None}
    if len(kinds) > 1:
        raise UserError(f"{keys.where}: rope_type and type contradict each other: {', '.join(sorted(kinds))}")
    return found | {"rope_type": kinds.pop() if kinds else "default"}


def rope_fields(keys: Keys, *, default_theta: float = 10_000.0, max_length: int) -> dict[str, Any]:
    """The ModelConfig fields rope_theta, rope_fraction and rope_scaling.

    Raises:
      UserError: a kind of scaling or a parameter of it that is not known, or contradictions.
    """
    values = _rope_values(keys)
    kind = values.pop("rope_type")
    fields = {
        "rope_theta": float(values.pop("rope_theta", default_theta)),
        "rope_fraction": float(values.pop("partial_rotary_factor", 1.0)),
    }
    kinds = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope, "su": _longrope}
    if kind == "default":
        scaling = None
    elif kind in kinds:
        outer = keys.take("original_max_position_embeddings", None)
        inner = values.pop("original_max_position_embeddings", None)
        # transformers lets the outer one win.
        scaling = kinds[kind](values, keys.where, int(outer or inner or max_length), max_length)
    else:
        raise unknown_name(f"{keys.where}: rope_type", kind, ["default", *kinds])
    if values:
        raise UserError(f"{keys.where}: rope parameters {', '.join(sorted(values))} are not understood for {kind}")
    return fields | {"rope_scaling": scaling}


def _linear(values: dict, where: str, original: int, max_length: int) -> RopeScaling:
    del where, original, max_length
    return RopeScaling(kind="linear", factor=float(values.pop("factor")))


def _llama3(values: dict, where: str, original: int, max_length: int) -> RopeScaling:
    del where, max_length
    return RopeScaling(
        kind="llama3",
        factor=float(values.pop("factor")),
        original_length=original,
        low_frequency_factor=float(values.pop("low_freq_factor")),
        high_frequency_factor=float(values.pop("high_freq_factor")),
    )


def _yarn(values: dict, where: str, original: int, max_length: int) -> RopeScaling:
    if not values.pop("truncate", True):
        raise UserError(f"{where}: rope parameter truncate=false is not supported")
    for name in ("mscale", "mscale_all_dim"):
        if values.pop(name, None):
            raise UserError(f"{where}: rope parameter {name} is not supported")
    return RopeScaling(
        kind="yarn",
        factor=float(values.pop("factor", max_length / original)),
        original_length=original,
        beta_fast=float(values.pop("beta_fast", 32.0) or 32.0),
        beta_slow=float(values.pop("beta_slow", 1.0) or 1.0),
        attention_factor=float(values.pop("attention_factor", None) or 0.0),
    )


def _longrope(values: dict, where: str, original: int, max_length: int) -> RopeScaling:
    del where
    return RopeScaling(
        kind="longrope",
        factor=float(values.pop("factor", None) or max(max_length / original, 1.0)),
        original_length=original,
        short_factors=tuple(values.pop("short_factor")),
        long_factors=tuple(values.pop("long_factor")),
        attention_factor=float(values.pop("attention_factor", None) or 0.0),
    )
