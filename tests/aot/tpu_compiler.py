"""The TPU compiler without a TPU."""

import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from oasis_jax.training.plan import tpu_devices

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def tpu_mesh(topology: str, **axes: int) -> Mesh:
    """A mesh of a TPU topology that is not there, with these axes; skips the test where the compiler is not
    installed.
    """
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed; make test-aot installs it")
    sizes = tuple(axes.values())
    devices = np.array(tpu_devices(topology)[: np.prod(sizes)])
    return Mesh(devices.reshape(sizes), tuple(axes), axis_types=(AxisType.Auto,) * len(sizes))
