"""Measures a Decoder on one device and sharded over eight as in training, and prints both: see test_library.py."""

import json
import re

import jax
import numpy as np
from flax import nnx

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from oasis_jax.evaluation import EVALUATORS, measure_model
from oasis_jax.evaluation.evaluator import _read, of_model
from oasis_jax.model.decoder import Decoder
from oasis_jax.model.layout import stack_layers
from oasis_jax.training.sharding import batch_sharding, make_mesh, parameter_shardings, put_batch
from oasis_jax.training.state import build_model

BATCH, LENGTH, VOCAB = 4, 300, 24


def scalars(values: dict) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, float)}


def main() -> None:
    model_config = ModelConfig(
        preset="oasis", num_layers=2, width=40, num_heads=2, head_dim=10, mlp_dim=56, vocab_size=VOCAB
    )
    config = Config(model=model_config, data=DataConfig(batch_size=BATCH), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    model = Decoder(model_config, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    batch = {name: random.integers(VOCAB, size=(BATCH, LENGTH), dtype=np.int32) for name in ("inputs", "targets")}
    batch["weights"] = np.ones((BATCH, LENGTH), np.float32)
    alone = measure_model(model, [batch], EVALUATORS)

    mesh = make_mesh(config.mesh)
    placed = jax.device_put(
        stack_layers(nnx.to_pure_dict(nnx.state(model))), parameter_shardings(model_config, mesh, config.mesh.rules)
    )
    sharded = build_model(model_config, placed)
    batch = put_batch(batch, batch_sharding(config, mesh))
    found = measure_model(sharded, [batch], EVALUATORS)
    read_model, state, _ = of_model(sharded)
    text = _read.lower(read_model, state, batch, tuple(EVALUATORS.values()), None).compile().as_text()
    pairs = [(int(a), int(b)) for a, b in re.findall(r"f32\[(?:\d+,)*(\d+),(\d+)\]", text)]
    query = sharded.layers[0].attention.query[...]
    report = {
        "devices": jax.device_count(),
        "query": query.shape,
        "query_shard": query.addressable_shards[0].data.shape,
        "largest_score_array": max(a * b for a, b in pairs if b >= LENGTH // 8 and a >= 16),
        "alone": scalars(alone.values),
        "sharded": scalars(found.values),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
