"""Attention with a null: `null_attention`, its reference and backends, and the merging of partial results."""

from pallas_kernels.null_attention.api import IMPLEMENTATIONS, null_attention
from pallas_kernels.null_attention.base import NullAttention
from pallas_kernels.null_attention.merge import merge_partials

__all__ = ["IMPLEMENTATIONS", "NullAttention", "merge_partials", "null_attention"]
