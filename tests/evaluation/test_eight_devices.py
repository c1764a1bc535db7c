"""Evaluation on a mesh of eight devices: every value is that of one device, and what is gathered is one layer at a
time.
"""

import collections
import json
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from evaluation.eight_devices import LENGTH, SIZES, config_of
from jax.sharding import AbstractMesh
from programs import UNOPTIMIZED, on_devices

from oasis_jax.model.decoder import parameter_shapes
from oasis_jax.placement import Placement
from oasis_jax.training.state import parameter_shardings

HERE = pathlib.Path(__file__).parent
MESHES = {"mixed": dict(data=2, fsdp=2, tensor=2), "sequence": dict(fsdp=2, sequence=2, tensor=2)}


def on_eight_devices(*cases: tuple[str, dict]) -> list:
    """What eight_devices.py prints."""
    environment = on_devices(8, UNOPTIMIZED)
    command = [sys.executable, "-W", "error", HERE / "eight_devices.py", json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def leaves(tree: object) -> dict[str, object]:
    """Path -> number, name or None."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    return {jax.tree_util.keystr(path): leaf for path, leaf in found}


def check_equal(alone: object, sharded: object, tolerance: float = 1e-5) -> int:
    """How many values there are, all of them equal."""
    one, other = leaves(alone), leaves(sharded)
    assert list(one) == list(other)
    for path, value in one.items():
        if isinstance(value, float):
            assert other[path] == pytest.approx(value, rel=tolerance, abs=tolerance), path
        else:
            assert other[path] == value, path
    return len(one)


def test_the_default_set_of_a_batch_that_the_mesh_does_not_divide():
    """Three and two rows on a mesh that splits batches four ways."""
    case = dict(model=dict(preset="oasis", num_layers=1), mesh=MESHES["mixed"], rows=[3, 2], measures="default")
    (found,) = on_eight_devices(("report", case))
    assert check_equal(found["alone"], found["sharded"]) > 60


@pytest.mark.slow
def test_modules_and_functions_on_parameters_that_are_sharded():
    """Nothing but the parameters says how the model lies: the compiler follows them."""
    case = dict(model=dict(preset="oasis", num_layers=2), mesh=MESHES["mixed"], rows=[4])
    (found,) = on_eight_devices(("modules", case))
    assert found["query_shard"] == [20, 6, 10]
    assert check_equal(found["alone"], found["sharded"]) > 100


@pytest.mark.slow
def test_everything_of_every_kind_of_model():
    models = [
        (dict(preset="oasis"), "mixed", [5, 3], False),
        (dict(preset="oasis"), "sequence", [3], True),  # in zigzag order, three and more documents a row
        (dict(preset="oasis_blocks", blocks=3, window=9), "sequence", [2], True),  # split in the order of the text
        (dict(preset="clipped", norm="gatednorm"), "sequence", [2], False),
        (dict(preset="null_key_value", qkv_bias=True, learned_positions=LENGTH), "mixed", [3], False),
    ]
    names = ("model", "mesh", "rows", "packed")
    cases = [dict(zip(names, (model, MESHES[mesh], rows, packed))) for model, mesh, rows, packed in models]
    for case, found in zip(cases, on_eight_devices(*(("report", case) for case in cases))):
        assert check_equal(found["alone"], found["sharded"]) > 1000, case


@pytest.mark.slow
def test_interventions_and_quantization():
    schemes = "w4a16_g128,w8a8_tensor+smooth,w4a8"
    changes = "sources,beta,evidence,softmax,depth_softmax,begin_token"
    case = dict(model=dict(preset="oasis"), mesh=MESHES["mixed"], rows=[5, 3], measures="perplexity")
    packed = case | dict(mesh=MESHES["sequence"], rows=[3], packed=True)
    both = on_eight_devices(
        ("report", case | dict(schemes=schemes, interventions=changes)),
        ("report", packed | dict(schemes="w4a16_g128,w8a8_tensor", interventions="sources,begin_token")),
    )
    for found in both:
        alone, sharded = found["alone"], found["sharded"]
        for name in ("values", "effects"):
            assert check_equal(alone[name], sharded[name]) > 4
        check_equal(alone["ranges"], sharded["ranges"], 1e-4)
        check_equal(alone["schemes"].pop("w4a16_g128"), sharded["schemes"].pop("w4a16_g128"))
        for scheme, value in alone["schemes"].items():
            # A sum in another order pushes an activation over the middle between two codes, and what follows over
            # others: parameters times 1 + 2e-7 change these perplexities by as much, on one device.
            assert sharded["schemes"][scheme]["value"] == pytest.approx(value["value"], rel=1e-2), scheme
            assert sharded["schemes"][scheme]["tensors"] == value["tensors"]


def gathered_parameters(mesh: dict) -> tuple[collections.Counter, set]:
    """How often a pass has to gather arrays of which shape over fsdp, dimensions sorted; and the shapes of whole
    stacks.
    """
    config, sizes = config_of(dict(preset="oasis"), mesh), {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | mesh
    placement = Placement(AbstractMesh(tuple(sizes.values()), tuple(sizes)), config.mesh.rules)
    expected, stacks = collections.Counter(), set()

    def add(path, shape, sharding):
        if "fsdp" not in sharding.spec:
            return
        # A device still has its own part of what tensor splits.
        whole = [size // (sizes["tensor"] if axis == "tensor" else 1) for size, axis in zip(shape.shape, sharding.spec)]
        stacked = path[0].key in ("layers", "routers")
        expected[tuple(sorted(whole[1:] if stacked else whole))] += whole[0] if stacked else 1
        stacks.update([tuple(sorted(whole)), tuple(sorted(shape.shape))] if stacked else [])

    shardings = parameter_shardings(config.model, placement)
    jax.tree_util.tree_map_with_path(add, parameter_shapes(config.model), shardings)
    return expected, stacks


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(fsdp=8), dict(fsdp=4, tensor=2)], ids=str)
def test_every_parameter_is_gathered_once_in_its_layer(mesh):
    """The pass of all measures gathers each layer's parameters as often as there are layers, never the stack of all."""
    (text,) = on_eight_devices(("compiled", dict(model=dict(preset="oasis"), mesh=mesh, rows=[8])))
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    found = collections.Counter(tuple(sorted(int(n) for n in shape.split(",") if n)) for shape in shapes)
    expected, stacks = gathered_parameters(mesh)
    assert sum(expected.values()) > 3 * SIZES["num_layers"]
    assert {shape: found[shape] for shape in expected} == expected
    assert not stacks & set(found)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_no_device_holds_a_matrix_of_all_probabilities(mesh):
    """Its own queries against all keys, with positions split or not."""
    case = dict(model=dict(preset="oasis", num_layers=1), mesh=MESHES[mesh], rows=[4], length=320)
    (text,) = on_eight_devices(("compiled", case))
    pairs = [(int(a), int(b)) for a, b in re.findall(r"f32\[(?:\d+,)*(\d+),(\d+)\]", text)]
    assert 320 < max(a * b for a, b in pairs if b == 320) < 320 * 320 // MESHES[mesh].get("sequence", 1)


@pytest.mark.slow
def test_log_likelihoods_of_rows_in_the_order_of_the_text():
    """Where the text is split too, its tokens lie in another order on the devices."""
    cases = [
        ("scored", dict(model=dict(preset="oasis"), mesh=mesh, lengths=[41, 3, 18, 30])) for mesh in MESHES.values()
    ]
    for found in on_eight_devices(*cases):
        assert check_equal(found["alone"], found["sharded"]) == 2 * (40 + 2 + 17 + 29)
