"""What a training step sends between devices, counted in the compiled program against formulas: a stray
gather of the source history fails here.
"""

import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh
from programs import UNOPTIMIZED, on_devices

from oasis_jax.config import DEFAULT_RULES, ModelConfig
from oasis_jax.model.decoder import parameter_shapes
from oasis_jax.model.head import padded_vocab
from oasis_jax.placement import Placement
from oasis_jax.training.state import parameter_shardings

HERE = pathlib.Path(__file__).parent
ON_TENSOR, ON_SEQUENCE = dict(data=4, tensor=2), dict(data=4, sequence=2)
MIXED = dict(fsdp=2, sequence=2, tensor=2)
# On all three meshes a device's part of the batch, gathered over tensor, has as many elements.
STREAM, EVIDENCE = 4 * 16 // 4 * 24 * 40, 4 * 16 // 4 * 24
TABLE = 4 * padded_vocab(83) * 40


def compiled(*cases: dict) -> list[dict]:
    """The reports of step_collectives.py."""
    environment = on_devices(8, UNOPTIMIZED)
    command = [sys.executable, "-W", "error", HERE / "step_collectives.py", json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def case(layers: int, mesh: dict, preset: str = "oasis", mutant: bool = False, **model) -> dict:
    return {"model": {"preset": preset, "num_layers": layers, **model}, "mesh": mesh, "mutant": mutant}


def gathers(layers: int) -> list[int]:
    """(count, bytes) of all-gathers over tensor: the stream before each of 2 L sublayers and before the head, its
    gradient after each sublayer, the gradient of each layer's evidence, and the embedding's table once. Nothing for the
    sources of a router.
    """
    return [4 * layers + 1 + layers + 1, (4 * layers + 1) * STREAM + layers * EVIDENCE + TABLE]


def bytes_of_layers(layers: int, axis: str, split: bool) -> int:
    """Bytes of the layers' and routers' parameters that a mesh axis splits, or does not split, on one of two tensor
    shards.
    """
    config = ModelConfig(
        preset="oasis",
        num_layers=layers,
        width=40,
        num_heads=12,
        num_kv_heads=4,
        head_dim=10,
        mlp_dim=56,
        vocab_size=83,
    )

    mesh = AbstractMesh((1, 2, 1, 2), ("data", "fsdp", "sequence", "tensor"))

    def size(shape, sharding):
        names = [name for entry in sharding.spec for name in (entry if isinstance(entry, tuple) else (entry,))]
        return 4 * math.prod(shape.shape) // (2 if "tensor" in names else 1) if (axis in names) == split else 0

    sizes = jax.tree.map(size, parameter_shapes(config), parameter_shardings(config, Placement(mesh, DEFAULT_RULES)))
    return sum(jax.tree.leaves((sizes["layers"], sizes["routers"])))


def shards(report: dict) -> set[tuple[int, ...]]:
    """What a device holds of the routers' sources."""
    return {tuple(shape) for shape in report["sources"]}


def test_a_step_sends_what_its_sublayers_need_and_no_history():
    (report,) = compiled(case(2, ON_TENSOR))
    assert set(report["sent"]) == {"all-gather", "all-reduce"}
    assert report["sent"]["all-gather"] == gathers(2)
    assert len(report["sources"]) == 2 + 3 + 3 + 4
    assert shards(report) == {(4, 12, 40)}  # half of the positions of a quarter of the batch


@pytest.mark.slow
def test_what_is_sent_grows_with_depth_not_with_its_square_and_a_gathered_history_shows():
    two, three, mixed, mutant = compiled(
        case(2, ON_TENSOR), case(3, ON_TENSOR), case(2, MIXED), case(2, ON_TENSOR, mutant=True)
    )
    assert three["sent"]["all-gather"] == gathers(3)
    assert shards(three) == {(4, 12, 40)}
    # A layer sums its two outputs and the gradients of their inputs, from query, key and value and from gate and up.
    # Gradients of parameters are summed over data, those of what tensor does not split over tensor too. The rest are
    # numbers.
    reduced = three["sent"]["all-reduce"][1] - two["sent"]["all-reduce"][1]
    grown = {
        split: bytes_of_layers(3, "tensor", split) - bytes_of_layers(2, "tensor", split) for split in (True, False)
    }
    assert 0 <= reduced - (7 * STREAM + EVIDENCE + grown[True] + 2 * grown[False]) < 1024

    # Parameters are gathered over fsdp once, the table of the vocabulary for the
    # lookup and for the loss, not for its chunks; keys and values go around a ring of two,
    # with their gradients once more.
    assert set(mixed["sent"]) == {"all-gather", "all-reduce", "collective-permute"}
    rest = mixed["sent"]["all-gather"][1] - gathers(2)[1] - bytes_of_layers(2, "fsdp", True)
    assert rest == 2 * (TABLE // 2)
    assert mixed["sent"]["collective-permute"] == [2 * 6, 2 * 6 * 4 * 8 * 12 * 2 * 10]
    assert shards(mixed) == {(8, 6, 40)}  # a quarter of the positions of half the batch

    # And the test above sees what it is for.
    assert mutant["sent"]["all-gather"][1] >= gathers(2)[1] + 5 * STREAM
    assert (4, 24, 40) in shards(mutant)


@pytest.mark.slow
def test_blocks_loops_and_a_sequence_alone():
    sequence, blocks, loops, full, cumulative = compiled(
        case(2, ON_SEQUENCE),
        case(2, ON_TENSOR, "oasis_blocks", blocks=2),
        case(4, ON_TENSOR, "oasis_blocks", blocks=2, stack="scan"),
        case(3, ON_TENSOR, "attnres", stack="scan"),
        case(3, ON_TENSOR, "oasis", stack="scan"),
    )
    assert set(sequence["sent"]) == {"all-reduce", "collective-permute"}
    assert blocks["sent"]["all-gather"] == gathers(2)
    assert shards(blocks) == {(4, 12, 40)}
    # Loops recompute every sublayer in the backward pass; without coupling there may be no gradient of evidence.
    again = lambda layers: [gathers(layers)[0] + 2 * layers, gathers(layers)[1] + 2 * layers * STREAM]
    count, size = again(3)
    assert loops["sent"]["all-gather"] == again(4)
    assert cumulative["sent"]["all-gather"] == [count, size]
    for report in (loops, full, cumulative):
        assert shards(report) == {(4, 12, 40)}
    assert full["sent"]["all-gather"] in ([count, size], [count - 3, size - 3 * EVIDENCE])
