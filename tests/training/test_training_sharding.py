"""The mesh, the table of axes, and the same losses on 1 and on 8 devices."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from numpy.testing import assert_allclose

from oasis_jax.config import DEFAULT_RULES, PRESETS, Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig
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
        (
            MeshConfig(rules=(("heads", ("tensr",)),)),
            1,
            "mesh.rules, heads: unknown name 'tensr' (did you mean 'tensor'?)",
        ),
        (
            MeshConfig(rules=(("heads", "tensor"),)),
            1,
            "mesh.rules: expected (logical axis, (mesh axes ...)), got ('heads', 'tensor')",
        ),
    ],
)
def test_a_mesh_that_cannot_be(config, devices, message):
    with pytest.raises(UserError) as error:
        make_mesh(config, jax.devices()[:1] * devices)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_logical_axes():
    assert logical_to_spec(DEFAULT_RULES, ("batch", "length", "heads", None)) == PartitionSpec(
        ("data", "fsdp"), "sequence", "tensor", None
    )
    assert logical_to_spec(DEFAULT_RULES, ()) == PartitionSpec()
    with pytest.raises(
        UserError, match="mesh axis 'tensor' is claimed more than once by an array with the logical axes"
    ):
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


@pytest.mark.parametrize(
    "accumulation, message", [(1, "12 is not divisible by the 8"), (3, "12 / optimizer.accumulation_steps=3 = 4 is")]
)
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
        UserError,
        match=r"^data.sequence_length: 20 is not divisible by mesh.sequence=4 in two parts each; take a multiple of 8$",
    ):
        placement(config, abstract(sequence=4))
    with pytest.raises(
        UserError,
        match=r"^data.sequence_length: 20 is not divisible by sequence=2 x tensor=3, over which .*; take a "
        r"multiple of 12, another mesh",
    ):
        placement(config, abstract(sequence=2, tensor=3))
    rules = tuple((name, ("sequence",) if name == "stream" else axes) for name, axes in DEFAULT_RULES)
    unsplit = dataclasses.replace(config, mesh=MeshConfig(rules=rules))
    assert placement(unsplit, abstract(sequence=2, tensor=3)).routing.spec("sequence") == PartitionSpec(("sequence",))
    windowed = Config(data=config.data, model=ModelConfig(window=5))
    assert placement(windowed, abstract(sequence=4)).operators.layout == "contiguous"


# Eight virtual devices need a process of their own.

MESHES = {
    "data=8": dict(data=8),
    "fsdp=8": dict(fsdp=8),
    "fsdp=2 tensor=4": dict(fsdp=2, tensor=4),
    "data=4 sequence=2": dict(data=4, sequence=2),
    "fsdp=2 sequence=4": dict(fsdp=2, sequence=4),
    "sequence=2 tensor=4": dict(sequence=2, tensor=4),
    "data=2 fsdp=2 tensor=2": dict(data=2, fsdp=2, tensor=2),
    "fsdp=2 sequence=2 tensor=2": dict(fsdp=2, sequence=2, tensor=2),
}
MIXED = "fsdp=2 sequence=2 tensor=2"
MODELS = {preset: dict(preset=preset, num_layers=1) for preset in PRESETS}
MODELS |= {
    "oasis": dict(preset="oasis", num_layers=2),
    "oasis_blocks": dict(preset="oasis_blocks", num_layers=2, blocks=3),
}
MODELS |= {
    f"{name} as loops": MODELS[name] | dict(num_layers=2, stack="scan")
    for name in ("residual", "attnres", "oasis_blocks", "oasis")
}


def train_on_8_devices(steps: int, models: list[str], meshes: list[str]) -> dict:
    """The report of eight_devices.py."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Half of the time is LLVM's; what is split over devices, and how, is decided before it.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    tables = {name: MODELS[name] for name in models}, {name: MESHES[name] for name in meshes}
    command = [sys.executable, "-W", "error", HERE / "eight_devices.py", *map(json.dumps, (steps, *tables))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "steps, models, meshes",
    [
        (5, ["oasis"], ["data=2 fsdp=2 tensor=2", MIXED]),
        pytest.param(50, ["oasis"], list(MESHES), marks=pytest.mark.slow),
        pytest.param(5, sorted({*MODELS} - {"oasis"})[::2], [MIXED], marks=pytest.mark.slow),
        pytest.param(5, sorted({*MODELS} - {"oasis"})[1::2], [MIXED], marks=pytest.mark.slow),
    ],
    ids=["oasis", "oasis-all-meshes", "half-the-models", "the-other-half"],
)
def test_equal_losses_on_1_and_8_devices(steps, models, meshes):
    report = train_on_8_devices(steps, models, meshes)
    assert list(report) == models
    for model, runs in report.items():
        alone = runs.pop("alone")
        assert len(alone["loss"]) == steps
        assert steps < 50 or alone["loss"][-1] < alone["loss"][0] - 0.1
        assert list(runs) == meshes
        for name, run in runs.items():
            assert_allclose(run["loss"], alone["loss"], rtol=1e-5, err_msg=f"{model} on {name}")
            assert_allclose(run["grad_norm"], alone["grad_norm"], rtol=1e-5, err_msg=f"{model} on {name}")
            # A draw of order 1 may differ in its last bit: a shard's remainder is not vectorized like the whole
            # array's.
            assert run["initial_difference"] <= 2**-23
            sizes = MESHES[name]
            assert run["query_shard"][-3:] == [40 // sizes.get("fsdp", 1), 12 // sizes.get("tensor", 1), 10]
            assert run["moment_shard"] == run["query_shard"]
