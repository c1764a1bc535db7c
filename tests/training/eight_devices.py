"""Trains models on one device and on meshes of eight, in one process, and prints what came out: see
test_placement.py.
"""

import json
import sys

import jax
import numpy as np

from oasis_jax.config import Config, DataConfig, LayerPattern, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.placement import make_mesh, place
from oasis_jax.training.state import TrainState, new_state
from oasis_jax.training.step import make_step, make_telemetry

BATCH, LENGTH, VOCAB = 16, 24, 83


def config(steps: int, fields: dict, mesh: dict) -> Config:
    fields = dict(fields)
    if "layer_pattern" in fields:
        fields["layer_pattern"] = tuple(LayerPattern(**entry) for entry in fields["layer_pattern"])
    model = ModelConfig(width=40, num_heads=12, num_kv_heads=4, head_dim=10, mlp_dim=56, vocab_size=VOCAB, **fields)
    return Config(
        model=model,
        data=DataConfig(batch_size=BATCH, sequence_length=LENGTH),
        # Small steps: at the default rate training itself would make much of a last bit.
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=3),
        mesh=MeshConfig(**mesh),
        run=RunConfig(steps=steps),
    )


def batches(steps: int, packed: bool) -> list[dict[str, np.ndarray]]:
    """Text of a sort: every token is its predecessor plus one of three steps. Weights differ.

    packed: rows hold documents of unequal lengths, whose positions start over.
    """
    random = np.random.default_rng(0)
    stream = (
        random.integers(0, VOCAB, (steps, BATCH, 1)) + random.integers(1, 4, (steps, BATCH, LENGTH + 1)).cumsum(-1)
    ) % VOCAB
    weights = random.random((steps, BATCH, LENGTH)).astype(np.float32)
    found = [
        {"inputs": x[:, :-1].astype(np.int32), "targets": x[:, 1:].astype(np.int32), "weights": w}
        for x, w in zip(stream, weights)
    ]
    return [batch | documents(random) for batch in found] if packed else found


def documents(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Segment ids and positions of rows of which about every sixth token starts a document."""
    starts = random.random((BATCH, LENGTH)) < 1 / 6
    starts[:, 0] = True
    places = np.arange(LENGTH)
    first = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    return {"segment_ids": starts.cumsum(axis=1).astype(np.int32), "positions": (places - first).astype(np.int32)}


def train(config: Config, devices: list, packed: bool) -> tuple[TrainState, TrainState, dict[str, list[float]]]:
    """(first state on the host, last state, losses, norms of gradients and telemetry)."""
    mesh = make_mesh(config.mesh, devices)
    placement = place(config, mesh)
    state, step, telemetry = new_state(config, mesh), make_step(config, mesh), make_telemetry(config, mesh)
    examples = batches(config.run.steps, packed)
    first, found = jax.device_get(state.params), {"loss": [], "grad_norm": []}
    seen = {name: float(value) for name, value in telemetry(state, placement.put(examples[0])).items()}
    for batch in examples:
        state, metrics = step(state, placement.put(batch))
        # Read at once: steps that overlap could leave the devices' threads waiting for each other.
        for name, values in found.items():
            values.append(float(metrics[name]))
    return first, state, found | {"telemetry": seen}


def shard(x: jax.Array) -> tuple[int, ...]:
    return x.addressable_shards[0].data.shape


def leaf(tree, name: str) -> jax.Array:
    """The first array whose path holds the name."""
    return next(x for path, x in jax.tree_util.tree_leaves_with_path(tree) if name in jax.tree_util.keystr(path))


def main(steps: int, models: dict[str, dict], meshes: dict[str, dict]) -> None:
    report = {}
    for model, fields in models.items():
        packed = fields.pop("packed", False)
        alone, _, losses = train(config(steps, fields, {}), jax.devices()[:1], packed)
        report[model] = {"alone": losses}
        for name, sizes in meshes.items():
            first, last, losses = train(config(steps, fields, sizes), jax.devices(), packed)
            difference = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), first, alone)
            report[model][name] = losses | {
                "initial_difference": max(jax.tree.leaves(difference)),
                "query_shard": shard(leaf(last.params, "attention']['query")),
                "moment_shard": shard(leaf(last.opt_state, "attention']['query")),
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*map(json.loads, sys.argv[1:]))
