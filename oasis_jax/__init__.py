"""Transformers whose attention can say "nothing here", in JAX and Flax: OASIS (arXiv 2605.17887) and its relatives.

Modules (Flax NNX; native Linen twins in `oasis_jax.linen`): Attention, Router, Norm, MLP, Decoder.
Configs: AttentionConfig, RouterConfig, NormConfig, ModelConfig, PRESETS.
The pure functions behind them: `oasis_jax.attention.attention`, `oasis_jax.routing.route`, `oasis_jax.norms.norm`;
the operators under those: `pallas_kernels.null_attention`, `pallas_kernels.depth_route`.
"""

from oasis_jax.attention import Attention
from oasis_jax.config import PRESETS, AttentionConfig, ModelConfig, NormConfig, RouterConfig
from oasis_jax.decoder import Decoder
from oasis_jax.errors import UserError
from oasis_jax.mlp import MLP
from oasis_jax.norms import Norm
from oasis_jax.routing import Router
from oasis_jax.statistics import AttentionStatistics, RouterStatistics, Statistics

__all__ = [
    "MLP",
    "PRESETS",
    "Attention",
    "AttentionConfig",
    "AttentionStatistics",
    "Decoder",
    "ModelConfig",
    "Norm",
    "NormConfig",
    "Router",
    "RouterConfig",
    "RouterStatistics",
    "Statistics",
    "UserError",
]
