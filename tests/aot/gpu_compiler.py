"""Compiles for a named NVIDIA GPU down to machine code, with no GPU present. Run as a script, one compile a process, as a wrong architecture aborts it.

Needs jax's CUDA plugin and NVIDIA's compiler: pip install "jax[cuda12-local]" nvidia-cuda-nvcc-cu12.
"""

import functools
import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


def missing() -> str:
    """Which packages a compile lacks; "" where all are installed."""
    if _plugin() is None:
        return "jax's CUDA plugin is not installed"
    try:
        found = importlib.util.find_spec("nvidia.cuda_nvcc")
    except ModuleNotFoundError:
        found = None
    return "" if found else "nvidia-cuda-nvcc-cu12 is not installed"


def _plugin() -> Path | None:
    for name in PLUGINS:
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        if spec is not None:
            return Path(next(iter(spec.submodule_search_locations))) / "xla_cuda_plugin.so"
    return None


@functools.cache
def descriptions() -> dict[str, str]:
    """{device name: XLA's description of it}, the text messages that the installed plugin carries."""
    blob, found = _plugin().read_bytes(), {}
    outside = re.compile(rb"[^\t\n\r -~]")  # a description ends where its printable text does
    for match in re.finditer(rb"gpu_device_info \{", blob):
        before = blob[max(0, match.start() - 4096) : match.start()]
        start = match.start() - len(outside.split(before)[-1])
        text = blob[start : outside.search(blob, match.end()).start()].decode()
        name = re.search(r'device_description_str:\s*"([^"]+)"', text)
        if name and "MIG" not in name.group(1):
            found[name.group(1)] = text
    return found


def gpu_mesh(name: str) -> Mesh:
    """A mesh of one described GPU whose name contains `name`, as "H100" or "H200"."""
    description = next(text for full, text in descriptions().items() if name in full)
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=description, topology="1x1x1")
    return Mesh(np.array(topology.devices[:1]), ("x",))


def compile_for(name: str, function, *arrays) -> str:
    """The text of the program that XLA and ptxas make of function(*arrays), arrays a pytree of jax.ShapeDtypeStruct."""
    mesh = gpu_mesh(name)
    sharding = NamedSharding(mesh, PartitionSpec())
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*arrays).compile().as_text()
