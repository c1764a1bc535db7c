"""Transformers whose attention can say "nothing here", in JAX and Flax: OASIS (arXiv 2605.17887) and its relatives.

Modules (Flax NNX; native Linen twins in `oasis_jax.linen`): Attention, Router, Norm, MLP, Decoder.
Configs: AttentionConfig, RouterConfig, NormConfig, MLPConfig, ModelConfig, PRESETS.
What a forward pass needs beside activations: Context, with a Placement where arrays are sharded.
The pure functions behind the modules: `oasis_jax.model`; the operators under those: `pallas_kernels`.
"""

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
from oasis_jax.errors import UserError
from oasis_jax.model.attention import Attention
from oasis_jax.model.context import Context
from oasis_jax.model.decoder import Decoder
from oasis_jax.model.mlp import MLP
from oasis_jax.model.norms import Norm
from oasis_jax.model.router import Router
from oasis_jax.model.statistics import AttentionStatistics, RouterStatistics, Statistics
from oasis_jax.placement import UNSHARDED, Placement

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
    "RopeScaling",
    "Router",
    "RouterConfig",
    "RouterStatistics",
    "Statistics",
    "UserError",
]
