"""Checkpoints of OASIS' published code (arXiv 2605.17887): a Llama, Qwen3 or Phi-4 with two depth routers a layer.

Beside the backbone's tensors every layer has `attn_res_sa`, the router after its attention, and `attn_res_mlp`, the one
after its MLP: `q_proj.weight` and `k_proj.weight` [max(D // 4, 64), D] without biases, and `recency_bias` [1]. Those of
OASIS have `oasis_beta_raw` [1] too and are coupled; those of its attention-residual baseline lack it and are not. Which
functions turned scores into probabilities no file says: who loads it does.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from oasis_jax.config import METHOD_FIELDS, PRESETS, ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.pretrained.mapping import LINEAR, VECTOR, Tensor
from oasis_jax.pretrained.source import Source

BACKBONES = ("llama", "qwen3", "phi3")  # by config.json's model_type
# What the caller says, by the names of a ModelConfig's fields; the first two have to be said.
NORMALIZERS = {
    "normalizer": ("softmax", "softmax1", "clipped", "entmax15", "sparsemax"),
    "depth_normalizer": ("softmax", "softmax1"),
}
CLIPPING = ("clip_gamma", "clip_zeta", "clip_alpha")
_ROUTERS = ("attn_res_sa", "attn_res_mlp")  # in the order of use
_COUPLING = "oasis_beta_raw"


def has_routers(files: Source) -> bool:
    """Whether these are files of the reference."""
    return any(f".{router}." in name for name in files.shapes for router in _ROUTERS)


def with_routers(backbone: ModelConfig, files: Source, normalizers: Mapping[str, Any] | None) -> ModelConfig:
    """The ModelConfig of a reference's checkpoint.

    Args:
      backbone: what its config.json says, which does not know of routers.
      normalizers: `normalizer` and `depth_normalizer`; of clipped softmax `clip_gamma`, `clip_zeta` and `clip_alpha`.

    Raises:
      UserError: another backbone; normalizers that were not given or are not known.
    """
    kind = files.config["model_type"]
    if kind not in BACKBONES:
        raise UserError(f"{files.where}: depth routers in a {kind}; known backbones: {', '.join(BACKBONES)}")
    given = dict(normalizers or {})
    for name, allowed in NORMALIZERS.items():
        if given.get(name) not in allowed:
            got = f"got {given[name]!r}" if name in given else "not given"
            raise UserError(
                f"{files.where}: has depth routers, and no file says with which normalizers they were trained; "
                f"normalizers: {name!r} must be one of {', '.join(allowed)}, {got}; on the command line: oasis_jax "
                "export SOURCE --out FOLDER --set model.normalizer=... --set model.depth_normalizer=..., then FOLDER"
            )
    if unknown := sorted(set(given) - {*NORMALIZERS, *CLIPPING}):
        raise UserError(f"normalizers: unknown name {unknown[0]!r}; allowed: {', '.join((*NORMALIZERS, *CLIPPING))}")
    coupling = any(name.endswith(f".{_COUPLING}") for name in files.shapes)
    method = {name: PRESETS["oasis"][name] for name in METHOD_FIELDS} | {"coupling": coupling} | given
    alike = [name for name, fields in PRESETS.items() if all(fields[field] == method[field] for field in METHOD_FIELDS)]
    preset = alike[0] if alike else "oasis" if coupling else "attnres_cumulative"
    # A head of its own is read as one: what config.json says of ties, the published classes need not do.
    tied = backbone.tied_head and "lm_head.weight" not in files.shapes
    return dataclasses.replace(backbone, preset=preset, tied_head=tied, **method)


def router_tensors(config: ModelConfig) -> list[Tensor]:
    """Where the routers' parameters lie; none for a model without."""
    if config.wiring != "cumulative":
        return []
    parts = {
        "q_proj.weight": ("query", LINEAR),
        "k_proj.weight": ("key", LINEAR),
        "recency_bias": ("recency_bias", VECTOR),
    }
    if config.coupling:
        parts[_COUPLING] = ("beta_raw", VECTOR)
    return [
        Tensor(f"model.layers.{{layer}}.{router}.{part}", layout, (f"routers/{ours}",), place, len(_ROUTERS))
        for place, router in enumerate(_ROUTERS)
        for part, (ours, layout) in parts.items()
    ]
