"""Compiles for a named NVIDIA GPU down to machine code, with no GPU present. Run as a script, one compile a
process, as a wrong architecture aborts it.

Needs jax's CUDA plugin and NVIDIA's compiler: pip install "jax[cuda12-local]" nvidia-cuda-nvcc-cu12.
"""

import importlib.util

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from oasis_jax.training.gpu_targets import GPUS, has_compiler


def missing() -> str:
    """Which packages a compile lacks; "" where all are installed."""
    if not has_compiler():
        return "jax's CUDA plugin is not installed"
    try:
        found = importlib.util.find_spec("nvidia.cuda_nvcc")
    except ModuleNotFoundError:
        found = None
    return "" if found else "nvidia-cuda-nvcc-cu12 is not installed"


def gpu_mesh(name: str) -> Mesh:
    """A mesh of one described GPU, as "H100" or "H200"."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=GPUS[name.lower()].description, topology="1x1x1"
    )
    return Mesh(np.array(topology.devices[:1]), ("x",))


def compile_for(name: str, function, *arrays) -> str:
    """The text of the program that XLA and ptxas make of function(*arrays), arrays a pytree of jax.ShapeDtypeStruct."""
    mesh = gpu_mesh(name)
    sharding = NamedSharding(mesh, PartitionSpec())
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*arrays).compile().as_text()
