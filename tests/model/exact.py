"""Models for comparisons to the last digits: float64, small, every parameter away from its start, documents
in a row.
"""

import jax
import jax.numpy as jnp
import numpy as np

from oasis_jax import ModelConfig
from oasis_jax.model.decoder import parameter_shapes

B, T, V = 2, 6, 83
SMALL = dict(width=12, num_heads=3, mlp_dim=20, vocab_size=V)
# Documents of a row one after the other, each with positions that start over: two in the first row, three in the
# second.
SEGMENTS = np.array([[0, 0, 1, 1, 1, 1], [3, 4, 4, 4, 7, 7]])
POSITIONS = np.array([[0, 1, 0, 1, 2, 3], [0, 0, 1, 2, 0, 1]])


def in_float64(config: ModelConfig) -> ModelConfig:
    """The config, computing in float64: no user's choice, but what a comparison needs."""
    object.__setattr__(config, "dtype", "float64")
    return config


def moved_parameters(config: ModelConfig, seed: int = 0) -> dict:
    """Stacked parameters in float64, away from their start, where static queries, biases and nulls are zero."""
    random = np.random.default_rng(seed)

    def draw(path, x):
        name = jax.tree_util.keystr(path)
        if "beta_raw" in name:  # the coupling starts near 0
            return random.normal(0.5, 0.3, x.shape)
        start = 1.0 if name.endswith(("scale']", "norm']")) else 0.0
        return start + 0.3 * random.normal(size=x.shape)

    return jax.tree_util.tree_map_with_path(lambda *x: jnp.asarray(draw(*x)), parameter_shapes(config))


def documents(seed: int = 0) -> dict[str, jnp.ndarray]:
    """A batch of packed documents; weights differ."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, V, (B, T + 1))
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": random.random((B, T)),
        "segment_ids": SEGMENTS,
        "positions": POSITIONS,
    }
    return jax.tree.map(jnp.asarray, batch)
