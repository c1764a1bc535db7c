"""Checkpoints of a run that never took place, for the fixtures of tests/training/conftest.py; resumed and compared."""

import jax
import jax.numpy as jnp
import numpy as np

from oasis_jax.config import MeshConfig
from oasis_jax.placement import make_mesh
from oasis_jax.training.checkpoints import Checkpoints, Keep

MESH = make_mesh(MeshConfig(), jax.devices()[:1])
STEPS = (3, 6, 9)


def resume(config, workdir, said):
    with Checkpoints(workdir, keep=Keep(2), say=said.append) as checkpoints:
        return checkpoints.resume(config, MESH)


def equal(first, second) -> bool:
    bits = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return jax.tree.all(
        jax.tree.map(lambda x, y: np.array_equal(bits(x), bits(y)) and x.dtype == y.dtype, first, second)
    )
