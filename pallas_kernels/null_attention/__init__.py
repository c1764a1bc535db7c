"""Attention with a null: `null_attention`, its reference and backends; `allowed_keys`, `attention_scores`,
`null_scores` and `add_null_value` define it.
"""

from pallas_kernels.null_attention.api import IMPLEMENTATIONS, null_attention
from pallas_kernels.null_attention.base import NullAttention, allowed_keys, attention_scores
from pallas_kernels.null_attention.merge import merge_partials
from pallas_kernels.null_attention.outside import add_null_value, null_scores

__all__ = [
    "IMPLEMENTATIONS",
    "NullAttention",
    "add_null_value",
    "allowed_keys",
    "attention_scores",
    "merge_partials",
    "null_attention",
    "null_scores",
]
