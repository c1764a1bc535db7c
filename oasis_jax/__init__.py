"""Transformers whose attention can say "nothing here", in JAX and Flax: OASIS (arXiv 2605.17887) and its relatives.

Modules (Flax NNX; native Linen twins in `oasis_jax.linen`): Attention, Router, Norm, MLP, Decoder.
Configs: AttentionConfig, RouterConfig, NormConfig, ModelConfig, PRESETS.
The pure functions behind them: `oasis_jax.model.attention.attention`, `oasis_jax.model.router.route`, `oasis_jax.model.norms.norm`;
the operators under those: `pallas_kernels.null_attention`, `pallas_kernels.depth_route`.
"""

from oasis_jax.config import PRESETS, AttentionConfig, ModelConfig, NormConfig, RouterConfig
from oasis_jax.errors import UserError
from oasis_jax.model.attention import Attention
from oasis_jax.model.decoder import Decoder
from oasis_jax.model.mlp import MLP
from oasis_jax.model.norms import Norm
from oasis_jax.model.router import Router
from oasis_jax.model.statistics import AttentionStatistics, RouterStatistics, Statistics

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
