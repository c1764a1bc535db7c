"""Generating text: `generate(model, prompts)`, with a cache through null attention and depth routing.

A token's depth sources are its own, so the cache holds keys and values of layers and nothing else; the null has no
entry.
"""

from oasis_jax.decoding.generate import Generated, generate
from oasis_jax.decoding.sampling import Sampling

__all__ = ["Generated", "Sampling", "generate"]
