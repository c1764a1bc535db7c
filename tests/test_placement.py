"""The mesh, the table of axes, and the same losses on 1 and on 8 devices."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal
from programs import UNOPTIMIZED, on_devices

from oasis_jax.config import (
    DEFAULT_RULES,
    PRESETS,
    Config,
    DataConfig,
    LayerPattern,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
)
from oasis_jax.errors import UserError
from oasis_jax.placement import UNSHARDED, Placement, check_batch_size, make_mesh, place
from oasis_jax.training.state import parameter_shardings
from pallas_kernels import zigzag

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
    placement = Placement(abstract(data=2, tensor=4), DEFAULT_RULES)
    assert placement.spec(("batch", "length", "heads", None)) == PartitionSpec(
        ("data", "fsdp"), "sequence", "tensor", None
    )
    assert placement.spec(()) == PartitionSpec()
    assert (placement.ways("batch"), placement.ways("heads"), placement.ways("embed")) == (2, 4, 1)
    with pytest.raises(
        UserError, match="mesh axis 'tensor' is claimed more than once by an array with the logical axes"
    ):
        placement.spec(("heads", "mlp"))


def test_a_parameter_that_its_axes_do_not_divide():
    model = ModelConfig(vocab_size=11, width=36, num_heads=6, num_kv_heads=3, num_layers=1)
    rules = tuple(rule for rule in DEFAULT_RULES if rule[0] in ("embed", "heads"))
    shardings = parameter_shardings(model, Placement(abstract(fsdp=4, tensor=3), rules))
    assert shardings["layers"]["attention"]["query"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    with pytest.raises(UserError) as error:
        parameter_shardings(model, Placement(abstract(tensor=2), DEFAULT_RULES))
    assert str(error.value).startswith(
        "mesh: dimension 2 (kv_heads) of parameter layers.attention.key has size 3, not divisible by tensor=2; "
    )


def test_small_parameters_follow_the_heads():
    model = ModelConfig(
        preset="null_key_value", qkv_bias=True, output_bias=True, mlp_bias=True, norm="layernorm", qk_norm=True,
        learned_positions=12, vocab_size=16, width=48, num_heads=6, num_layers=1,
    )  # fmt: skip
    shardings = parameter_shardings(model, Placement(abstract(fsdp=2, tensor=2), DEFAULT_RULES))
    specs = jax.tree.map(lambda x: x.spec, shardings["layers"])
    for name in ("query_bias", "key_bias", "value_bias"):
        assert specs["attention"][name] == PartitionSpec(None, "tensor", None), name
    for name in ("null_key", "null_value"):
        assert specs["attention"][name] == PartitionSpec(None, None, "tensor", None), name
    for name in ("output_bias", "query_norm"):
        assert specs["attention"][name] == PartitionSpec(None, None), name
    assert specs["mlp"]["up_bias"] == PartitionSpec(None, "tensor")
    assert specs["mlp"]["down_bias"] == specs["mlp_norm"]["bias"] == PartitionSpec(None, None)
    assert shardings["embedding"]["positions"].spec == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
    "accumulation, message", [(1, "12 is not divisible by the 8"), (3, "12 / optimizer.accumulation_steps=3 = 4 is")]
)
def test_a_batch_that_the_devices_do_not_divide(accumulation, message):
    config = Config(data=DataConfig(batch_size=12), optimizer=OptimizerConfig(accumulation_steps=accumulation))
    fits = Placement(abstract(data=2, fsdp=2, tensor=8), DEFAULT_RULES)
    check_batch_size(config, fits)
    assert fits.sharding(("batch",)).spec == PartitionSpec(("data", "fsdp"))
    with pytest.raises(UserError, match=r"data\.batch_size") as error:
        check_batch_size(config, Placement(abstract(data=4, fsdp=2), DEFAULT_RULES))
    assert message in str(error.value)
    assert "data=4 x fsdp=2" in str(error.value)


def test_examples_that_the_sequence_axis_does_not_divide():
    config = Config(data=DataConfig(sequence_length=20, batch_size=8))
    with pytest.raises(
        UserError,
        match=r"^data.sequence_length: 20 is not divisible by mesh.sequence=4 in two parts each; take a multiple of 8$",
    ):
        place(config, abstract(sequence=4))
    with pytest.raises(
        UserError,
        match=r"^data.sequence_length: 20 is not divisible by sequence=2 x tensor=3, over which .*; take a "
        r"multiple of 12, another mesh",
    ):
        place(config, abstract(sequence=2, tensor=3))
    rules = tuple((name, ("sequence",) if name == "stream" else axes) for name, axes in DEFAULT_RULES)
    unsplit = dataclasses.replace(config, mesh=MeshConfig(rules=rules))
    assert place(unsplit, abstract(sequence=2, tensor=3)).routing.spec("sequence") == PartitionSpec(("sequence",))


@pytest.mark.parametrize(
    "model, layout",
    [
        (ModelConfig(), "zigzag"),
        (ModelConfig(window=5), "contiguous"),
        (ModelConfig(layer_pattern=(LayerPattern(), LayerPattern(window=5))), "contiguous"),
        (ModelConfig(window=5, layer_pattern=(LayerPattern(), LayerPattern(rope_theta=0.0))), "zigzag"),
    ],
)
def test_the_order_in_which_a_split_sequence_lies(model, layout):
    """Balanced for causal attention; windows, of any layer, are balanced in the order of the text."""
    placement = place(Config(model=model, data=DataConfig(sequence_length=24, batch_size=8)), abstract(sequence=4))
    assert placement.attention.layout == layout
    order = placement.order(24)
    assert_array_equal(order, zigzag(np.arange(24)[None], 4) if layout == "zigzag" else np.arange(24)[None])
    assert order.shape == (1, 24)


def test_where_nothing_is_split_nothing_is_moved():
    x = np.arange(6.0).reshape(1, 6)
    for placement in (UNSHARDED, place(Config(), abstract())):
        assert placement.attention is placement.routing is None
        assert_array_equal(placement.order(6)[0], np.arange(6))
        assert placement.ordered({"x": x})["x"] is x
        assert placement.ways("batch") == 1
    assert UNSHARDED.sharding(("batch",)) is None and UNSHARDED.constrain(x, ("batch", None)) is x
    assert_array_equal(UNSHARDED.put({"x": x})["x"], x)
    assert Placement() == UNSHARDED and hash(UNSHARDED) == hash(Placement())


def test_placements_are_equal_where_they_say_the_same():
    config = Config(data=DataConfig(sequence_length=24, batch_size=8))
    first, second = (place(config, abstract(sequence=2, tensor=2)) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert first != place(config, abstract(sequence=2))


# Eight virtual devices need a process of their own.

MESHES = {
    "data=8": dict(data=8),
    "fsdp=8": dict(fsdp=8),
    "fsdp=2 tensor=4": dict(fsdp=2, tensor=4),
    "data=4 sequence=2": dict(data=4, sequence=2),
    "fsdp=2 sequence=4": dict(fsdp=2, sequence=4),
    "data=2 sequence=4": dict(data=2, sequence=4),
    "sequence=2 tensor=4": dict(sequence=2, tensor=4),
    "data=2 fsdp=2 tensor=2": dict(data=2, fsdp=2, tensor=2),
    "fsdp=2 sequence=2 tensor=2": dict(fsdp=2, sequence=2, tensor=2),
}
MIXED, ZIGZAG = "fsdp=2 sequence=2 tensor=2", "data=2 sequence=4"
MODELS = {
    preset: dict(preset=preset, num_layers=1, packed=True, **(dict(blocks=2) if PRESETS[preset]["blocks"] else {}))
    for preset in PRESETS
}
MODELS |= {
    "oasis": dict(preset="oasis", num_layers=2),
    "oasis packed": dict(preset="oasis", num_layers=2, packed=True),
    "oasis_blocks": dict(preset="oasis_blocks", num_layers=2, blocks=3, packed=True),
}
MODELS |= {
    f"{name} as loops": MODELS[name] | dict(num_layers=2, stack="scan")
    for name in ("residual", "attnres", "oasis_blocks", "oasis", "oasis packed", "null_key_value")
}
# Windows lie in the order of the text, patterns with one of them too.
MODELS |= {
    "windows": dict(preset="oasis", num_layers=1, window=5, packed=True),
    "affine": dict(preset="residual", gate="affine", num_layers=2, stack="scan", packed=True),
    "pattern as loops": dict(
        preset="oasis",
        num_layers=2,
        stack="scan",
        packed=True,
        layer_pattern=[dict(window=5), dict(rope_theta=0.0)],
        learned_positions=24,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm="layernorm",
    ),
}


REST = sorted(MODELS.keys() - {"oasis"})


def train_on_8_devices(steps: int, models: list[str], meshes: list[str]) -> dict:
    """The report of eight_devices.py."""
    environment = on_devices(8, UNOPTIMIZED)
    tables = {name: MODELS[name] for name in models}, {name: MESHES[name] for name in meshes}
    command = [
        sys.executable,
        "-W",
        "error",
        HERE / "training" / "eight_devices.py",
        *map(json.dumps, (steps, *tables)),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "steps, models, meshes",
    [
        (5, ["oasis"], ["data=2 fsdp=2 tensor=2", MIXED]),
        pytest.param(2, ["oasis packed as loops", "sparsemax", "affine"], [ZIGZAG], marks=pytest.mark.slow),
        pytest.param(50, ["oasis"], list(MESHES), marks=pytest.mark.slow),
        *(pytest.param(5, REST[part::4], [MIXED], marks=pytest.mark.slow) for part in range(4)),
    ],
    ids=["oasis", "packed", "oasis-all-meshes", *(f"models-{part}-of-4" for part in range(4))],
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
            assert run["telemetry"].keys() == alone["telemetry"].keys()
            for what, value in run["telemetry"].items():
                # Of normalizers without a null the mass is what rounding leaves.
                assert_allclose(
                    value, alone["telemetry"][what], rtol=1e-5, atol=1e-8, err_msg=f"{model} on {name}: {what}"
                )
            # A draw of order 1 may differ in its last bit: a shard's remainder is not vectorized like the whole
            # array's.
            assert run["initial_difference"] <= 2**-23
            sizes = MESHES[name]
            assert run["query_shard"][-3:] == [40 // sizes.get("fsdp", 1), 12 // sizes.get("tensor", 1), 10]
            assert run["moment_shard"] == run["query_shard"]
