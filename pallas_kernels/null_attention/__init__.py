"""Attention with a null: `null_attention`, its reference and backends; `allowed_keys` and `attention_scores`
define it.
"""

from pallas_kernels.null_attention.api import IMPLEMENTATIONS, null_attention
from pallas_kernels.null_attention.base import NullAttention, allowed_keys, attention_scores
from pallas_kernels.null_attention.merge import merge_partials

__all__ = [
    "IMPLEMENTATIONS",
    "NullAttention",
    "allowed_keys",
    "attention_scores",
    "merge_partials",
    "null_attention",
]
