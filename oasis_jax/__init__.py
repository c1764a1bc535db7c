"""Transformers whose attention can say "nothing here", in JAX and Flax: OASIS (arXiv 2605.17887) and its relatives.

Modules (Flax NNX; native Linen twins in `oasis_jax.linen`): Attention, Router, Norm, MLP, Decoder.
Configs: AttentionConfig, RouterConfig, NormConfig, MLPConfig, ModelConfig, PRESETS.
In the places of other libraries: attention_fn for Flax' multi-head attention, dot_product_attention for `jax.nn`'s.
What a forward pass needs beside activations: Context, with a Placement where arrays are sharded.
Models that were trained elsewhere: load_pretrained, and more in `oasis_jax.pretrained`; their text: generate, Sampling.
The pure functions behind the modules: `oasis_jax.model`; the operators under those: `pallas_kernels`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oasis_jax import linen
    from oasis_jax.config import (
        PRESETS,
        AttentionConfig,
        LayerPattern,
        MLPConfig,
        ModelConfig,
        NormConfig,
        RopeScaling,
        RouterConfig,
    )
    from oasis_jax.decoding import Sampling, generate
    from oasis_jax.errors import UserError
    from oasis_jax.model.attention import Attention
    from oasis_jax.model.context import Context
    from oasis_jax.model.decoder import Decoder
    from oasis_jax.model.drop_in import attention_fn, dot_product_attention
    from oasis_jax.model.mlp import MLP
    from oasis_jax.model.norms import Norm
    from oasis_jax.model.router import Router
    from oasis_jax.model.statistics import AttentionStatistics, RouterStatistics, Statistics
    from oasis_jax.placement import UNSHARDED, Placement
    from oasis_jax.pretrained import Pretrained, load_pretrained

# Loaded when asked for: a command's --help, or a script that wants the configs, does not wait for JAX.
_HOMES = {
    "oasis_jax.config": (
        "PRESETS", "AttentionConfig", "LayerPattern", "MLPConfig", "ModelConfig", "NormConfig", "RopeScaling",
        "RouterConfig",
    ),
    "oasis_jax.decoding": ("Sampling", "generate"),
    "oasis_jax.errors": ("UserError",),
    "oasis_jax.model.attention": ("Attention",),
    "oasis_jax.model.context": ("Context",),
    "oasis_jax.model.decoder": ("Decoder",),
    "oasis_jax.model.drop_in": ("attention_fn", "dot_product_attention"),
    "oasis_jax.model.mlp": ("MLP",),
    "oasis_jax.model.norms": ("Norm",),
    "oasis_jax.model.router": ("Router",),
    "oasis_jax.model.statistics": ("AttentionStatistics", "RouterStatistics", "Statistics"),
    "oasis_jax.placement": ("UNSHARDED", "Placement"),
    "oasis_jax.pretrained": ("Pretrained", "load_pretrained"),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

_PARTS = (
    "config", "data", "decoding", "errors", "evaluation", "linen", "model", "placement", "pretrained", "training",
)  # fmt: skip

__all__ = [
    "MLP",
    "PRESETS",
    "UNSHARDED",
    "Attention",
    "AttentionConfig",
    "AttentionStatistics",
    "Context",
    "Decoder",
    "LayerPattern",
    "MLPConfig",
    "ModelConfig",
    "Norm",
    "NormConfig",
    "Placement",
    "Pretrained",
    "RopeScaling",
    "Router",
    "RouterConfig",
    "RouterStatistics",
    "Sampling",
    "Statistics",
    "UserError",
    "attention_fn",
    "dot_product_attention",
    "generate",
    "linen",
    "load_pretrained",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        found = importlib.import_module("importlib.metadata").version("oasis_jax")
    elif name in _HOME_OF:
        found = getattr(importlib.import_module(_HOME_OF[name]), name)
    elif name in _PARTS:
        return importlib.import_module(f"oasis_jax.{name}")
    else:
        raise AttributeError(f"module 'oasis_jax' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
