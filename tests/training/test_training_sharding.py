"""The mesh, the table of axes, and the same losses on 1 and on 8 devices."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from numpy.testing import assert_allclose

from oasis_jax.config import DEFAULT_RULES, Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig
from oasis_jax.errors import UserError
from oasis_jax.training.sharding import batch_sharding, logical_to_spec, make_mesh, parameter_shardings, placement

HERE = pathlib.Path(__file__).parent


def abstract(data=1, fsdp=1, sequence=1, tensor=1):
    return AbstractMesh((data, fsdp, sequence, tensor), ("data", "fsdp", "sequence", "tensor"))


# One device is enough to see what is refused.


def test_the_mesh_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    "config, devices, message",
    [
        (MeshConfig(data=3, fsdp=2, tensor=2), 8, "mesh: data=3 x fsdp=2 x tensor=2 needs 12 devices, there are 8"),
        (MeshConfig(fsdp=16), 8, "mesh: data=1 x fsdp=16 x tensor=1 needs 16 devices, there are 8"),
        (MeshConfig(fsdp=3), 8, "mesh.data: 8 devices are not divisible by fsdp=3 x tensor=1 = 3"),
        (MeshConfig(rules=(("heds", ("tensor",)),)), 1, "mesh.rules: unknown name 'heds' (did you mean 'heads'?)"),
        (MeshConfig(rules=(("heads", ("tensr",)),)), 1, "mesh.rules, heads: unknown name 'tensr' (did you mean 'tensor'?)"),
        (MeshConfig(rules=(("heads", "tensor"),)), 1, "mesh.rules: expected (logical axis, (mesh axes ...)), got ('heads', 'tensor')"),
    ],
)
def test_a_mesh_that_cannot_be(config, devices, message):
    with pytest.raises(UserError) as error:
        make_mesh(config, jax.devices()[:1] * devices)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_logical_axes():
    assert logical_to_spec(DEFAULT_RULES, ("batch", "length", "heads", None)) == PartitionSpec(("data", "fsdp"), "sequence", "tensor", None)
    assert logical_to_spec(DEFAULT_RULES, ()) == PartitionSpec()
    with pytest.raises(UserError, match="mesh axis 'tensor' is claimed more than once by an array with the logical axes"):
        logical_to_spec(DEFAULT_RULES, ("heads", "mlp"))


def test_a_parameter_that_its_axes_do_not_divide():
    model = ModelConfig(vocab_size=11, width=36, num_heads=6, num_kv_heads=3, num_layers=1)
    shardings = parameter_shardings(
        model, abstract(fsdp=4, tensor=3), tuple(rule for rule in DEFAULT_RULES if rule[0] in ("embed", "heads"))
    )
    assert shardings["layers"]["attention"]["query"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    with pytest.raises(UserError) as error:
        parameter_shardings(model, abstract(tensor=2), DEFAULT_RULES)
    assert str(error.value).startswith(
        "mesh: dimension 2 (kv_heads) of parameter layers.attention.key has size 3, not divisible by tensor=2; "
    )


@pytest.mark.parametrize("accumulation, message", [(1, "12 is not divisible by the 8"), (3, "12 / optimizer.accumulation_steps=3 = 4 is")])
def test_a_batch_that_the_devices_do_not_divide(accumulation, message):
    config = Config(data=DataConfig(batch_size=12), optimizer=OptimizerConfig(accumulation_steps=accumulation))
    assert batch_sharding(config, abstract(data=2, fsdp=2, tensor=8)).spec == PartitionSpec(("data", "fsdp"))
    with pytest.raises(UserError, match=r"data\.batch_size") as error:
        batch_sharding(config, abstract(data=4, fsdp=2))
    assert message in str(error.value)
    assert "data=4 x fsdp=2" in str(error.value)


def test_examples_that_the_sequence_axis_does_not_divide():
    config = Config(data=DataConfig(sequence_length=20, batch_size=8))
    with pytest.raises(
        UserError, match=r"^data.sequence_length: 20 is not divisible by mesh.sequence=4 in two parts each; take a multiple of 8$"
    ):
        placement(config, abstract(sequence=4))
    windowed = Config(data=config.data, model=ModelConfig(window=5))
    assert placement(windowed, abstract(sequence=4)).operators.layout == "contiguous"


# Eight virtual devices need a process of their own.

MESHES = {
    "data=8": dict(data=8),
    "fsdp=8": dict(fsdp=8),
    "data=2 fsdp=2 tensor=2": dict(data=2, fsdp=2, tensor=2),
    "fsdp=4 tensor=2": dict(fsdp=4, tensor=2),
    "data=2 tensor=2 sequence=2": dict(data=2, tensor=2, sequence=2),
}
QUICK = [
    ("oasis", "unroll", ["data=8", "data=2 tensor=2 sequence=2"]),
    ("oasis", "scan", ["fsdp=8", "data=2 fsdp=2 tensor=2", "data=2 tensor=2 sequence=2"]),
    ("residual", "scan", ["data=2 fsdp=2 tensor=2"]),
    ("oasis_blocks", "scan", ["data=2 fsdp=2 tensor=2"]),
]
SLOW = [("attnres", "scan"), *((preset, stack) for preset in ("oasis", "residual", "oasis_blocks") for stack in ("unroll", "scan"))]


def losses_on_8_devices(preset: str, stack: str, meshes: list[str], flags: str) -> dict:
    """The report of eight_devices.py, run under these XLA_FLAGS."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {flags}",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    command = [sys.executable, "-W", "error", HERE / "eight_devices.py", preset, stack, json.dumps({name: MESHES[name] for name in meshes})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "preset, stack, meshes, flags",
    [
        # Half of the time is LLVM's; what is split over devices, and how, is decided before it.
        *((*case, "--xla_backend_optimization_level=0") for case in QUICK),
        *(pytest.param(*case, list(MESHES), "", marks=pytest.mark.slow) for case in SLOW),
    ],
    ids=[*(f"{preset}-{stack}" for preset, stack, _ in QUICK), *(f"{preset}-{stack}-all" for preset, stack in SLOW)],
)
def test_equal_losses_on_1_and_8_devices(preset, stack, meshes, flags):
    report = losses_on_8_devices(preset, stack, meshes, flags)
    alone = np.array(report.pop("alone")["losses"])
    assert len(alone) == 20
    assert alone[-1] < alone[0]
    assert list(report) == meshes
    for name, run in report.items():
        assert_allclose(run["losses"], alone, rtol=1e-5, err_msg=name)
        # A draw of order 1 may differ in its last bit: a shard's remainder is not vectorized like the whole array's.
        assert run["initial_difference"] <= 2**-23
        sizes = MESHES[name]
        assert run["query_shard"] == [2, 40 // sizes.get("fsdp", 1), 6 // sizes.get("tensor", 1), 10]
        assert run["moment_shard"] == run["query_shard"]
