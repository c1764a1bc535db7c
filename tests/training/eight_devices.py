"""Trains a preset on one device and on meshes of eight, in one process, and prints what came out: see test_training_sharding.py."""

import json
import sys

import jax
import numpy as np

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.training.sharding import batch_sharding, make_mesh, put_batch
from oasis_jax.training.state import TrainState, new_state
from oasis_jax.training.step import make_step

STEPS, BATCH, LENGTH, VOCAB = 20, 16, 20, 83


def config(preset: str, stack: str, **mesh: int) -> Config:
    blocks = dict(blocks=3) if preset == "oasis_blocks" else {}
    model = ModelConfig(
        preset=preset, num_layers=2, width=40, num_heads=6, num_kv_heads=2, head_dim=10, mlp_dim=56, vocab_size=VOCAB, stack=stack, **blocks
    )
    return Config(
        model=model,
        data=DataConfig(batch_size=BATCH, sequence_length=LENGTH),
        optimizer=OptimizerConfig(warmup_steps=3),
        mesh=MeshConfig(**mesh),
        run=RunConfig(steps=STEPS),
    )


def batches() -> list[dict[str, np.ndarray]]:
    """Text of a sort: every token is its predecessor plus one of three steps. Weights differ."""
    random = np.random.default_rng(0)
    stream = (random.integers(0, VOCAB, (STEPS, BATCH, 1)) + random.integers(1, 4, (STEPS, BATCH, LENGTH + 1)).cumsum(-1)) % VOCAB
    weights = random.random((STEPS, BATCH, LENGTH)).astype(np.float32)
    return [{"inputs": x[:, :-1].astype(np.int32), "targets": x[:, 1:].astype(np.int32), "weights": w} for x, w in zip(stream, weights)]


def train(config: Config, devices: list) -> tuple[TrainState, TrainState, list[float]]:
    """(first state on the host, last state, losses)."""
    mesh = make_mesh(config.mesh, devices)
    state, step = new_state(config, mesh), make_step(config, mesh)
    first, losses = jax.device_get(state.params), []
    for batch in batches():
        state, metrics = step(state, put_batch(batch, batch_sharding(config, mesh)))
        losses.append(float(metrics["loss"]))
    return first, state, losses


def shard(x: jax.Array) -> tuple[int, ...]:
    return x.addressable_shards[0].data.shape


def main(preset: str, stack: str, meshes: dict[str, dict]) -> None:
    """One device runs the layers one by one, the meshes as `stack` says."""
    alone, _, losses = train(config(preset, "unroll"), jax.devices()[:1])
    report = {"alone": {"losses": losses}}
    for name, sizes in meshes.items():
        first, last, losses = train(config(preset, stack, **sizes), jax.devices())
        moments = [
            x for path, x in jax.tree_util.tree_leaves_with_path(last.opt_state) if "attention']['query" in jax.tree_util.keystr(path)
        ]
        report[name] = {
            "losses": losses,
            "initial_difference": max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), first, alone))),
            "query_shard": shard(last.params["layers"]["attention"]["query"]),
            "moment_shard": shard(moments[0]),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:3], json.loads(sys.argv[3]))
