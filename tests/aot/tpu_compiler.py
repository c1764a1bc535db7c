"""The TPU compiler without a TPU."""

import os

import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
# Without these the compiler looks for a TPU's metadata on the network; several processes may compile at once.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_mesh(topology: str, **axes: int) -> Mesh:
    """A mesh of a TPU topology that is not there, with these axes; skips the test where the compiler is not installed."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed; make test-aot installs it")
    os.environ.update(_ENVIRONMENT)
    devices = np.array(topologies.get_topology_desc(topology, platform="tpu").devices)
    sizes = tuple(axes.values())
    return Mesh(devices[: np.prod(sizes)].reshape(sizes), tuple(axes), axis_types=(AxisType.Auto,) * len(sizes))
