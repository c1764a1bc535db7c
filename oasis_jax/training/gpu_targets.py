"""What XLA's GPU compiler has to know of a GPU that is not there.

The numbers are those of XLA's own descriptions (xla/backends/gpu/specs), which not every release of jax's CUDA plugin
carries.
"""

import importlib.util
from typing import NamedTuple

from oasis_jax.errors import UserError

_PLUGINS = ("xla_cuda12", "xla_cuda13")
# GpuTargetConfigProto; what is alike in Hopper and Blackwell is written out.
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
device_description_str: "{name}"
"""


class Gpu(NamedTuple):
    """A GPU that can be compiled for; memory and cache in bytes, bandwidth in bytes a second, clock in GHz."""

    name: str
    major: int
    cores: int
    memory: int
    bandwidth: int
    cache: int
    clock: float

    @property
    def description(self) -> str:
        """The text that `jax.experimental.topologies.get_topology_desc` takes as target_config."""
        return _DESCRIPTION.format(**self._asdict())


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 84_942_979_072, 3_352_320_000_000, 52_428_800, 1.98),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", 9, 132, 151_397_597_184, 4_800_000_000_000, 52_428_800, 1.98),
    "b200": Gpu("NVIDIA B200", 10, 148, 191_514_411_008, 7_672_320_000_000, 132_644_864, 1.965),
}


def has_compiler() -> bool:
    """Whether jax's CUDA plugin is installed."""
    try:
        return any(importlib.util.find_spec(f"jax_plugins.{plugin}") for plugin in _PLUGINS)
    except ModuleNotFoundError:
        return False


def check_compiler() -> None:
    """Raises UserError, naming the packages, where jax's CUDA plugin is not installed."""
    if not has_compiler():
        raise UserError(
            "no CUDA compiler: python -m pip install 'jax[cuda12-local]' nvidia-cuda-nvcc-cu12 (no GPU is needed)"
        )
