"""Measures a training state on one device and on a mesh of eight, and prints both: see test_eight_devices.py."""

import json
import sys

import jax
import numpy as np

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from oasis_jax.evaluation import EVALUATORS, choose, evaluate, evaluate_model, measure
from oasis_jax.evaluation.interventions import intervene
from oasis_jax.evaluation.passes import DecoderPass, lower, placed_batches
from oasis_jax.evaluation.quantization import calibrate, parse_schemes, quantization
from oasis_jax.evaluation.tasks.scoring import Row, score
from oasis_jax.model.decoder import forward
from oasis_jax.placement import make_mesh, place
from oasis_jax.pretrained import Pretrained
from oasis_jax.training.state import build_model, new_state

LENGTH, VOCAB = 40, 331
SIZES = dict(num_layers=3, width=40, num_heads=12, num_kv_heads=4, head_dim=10, mlp_dim=56, vocab_size=VOCAB)


def make_batches(rows: list[int], packed: bool, length: int = LENGTH) -> list[dict[str, np.ndarray]]:
    """Batches of so many rows; packed: of documents of 7 to 23 tokens."""
    random, found = np.random.default_rng(0), []
    for count in rows:
        shape = (count, length)
        tokens = random.integers(VOCAB, size=(2, *shape), dtype=np.int32)
        batch = {"inputs": tokens[0], "targets": tokens[1], "weights": random.random(shape).astype(np.float32)}
        if packed:
            ends = random.integers(7, 24, size=(count, 6)).cumsum(1)
            ids = [np.searchsorted(row, np.arange(length), side="right") for row in ends]
            batch["segment_ids"] = np.stack(ids).astype(np.int32)
        found.append(batch)
    return found


def perturbed(params: dict) -> dict:
    """Parameters moved away from their start, so that no router and no null is trivial."""
    leaves, tree = jax.tree.flatten(jax.device_get(params))
    random = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [x + (0.05 * random.standard_normal(x.shape)).astype(np.float32) for x in leaves])


def config_of(model: dict, mesh: dict, length: int = LENGTH) -> Config:
    data = DataConfig(sequence_length=length)
    return Config(model=ModelConfig(**SIZES | model), data=data, mesh=MeshConfig(**mesh))


def report(
    model: dict,
    mesh: dict,
    rows: list[int],
    packed: bool = False,
    measures: str = "all",
    schemes: str = "",
    interventions: str = "",
) -> dict:
    """Everything that is measured, alone and sharded."""
    batches, params, found = make_batches(rows, packed), None, {}
    for name, sizes, devices in (("alone", {}, jax.devices()[:1]), ("sharded", mesh, jax.devices())):
        config = config_of(model, sizes)
        placement = place(config, make_mesh(config.mesh, devices))
        state = new_state(config, placement.mesh).params
        params = perturbed(state) if params is None else params
        state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, state)
        decoder = (state, config.model, placement)
        found[name] = {"values": evaluate(*decoder, batches, choose([measures])).values}
        if schemes:
            found[name]["schemes"] = quantization(*decoder, batches, batches[:1], parse_schemes(schemes.split(",")))
            ranges = calibrate(*decoder, batches[:1]).ranges
            found[name]["ranges"] = {tensor: [float(x) for x in pair] for tensor, pair in ranges.items()}
        if interventions:
            effects = intervene(*decoder, batches, interventions=interventions.split(","), begin_token=True)
            found[name]["effects"] = [effect._asdict() for effect in effects]
    return found


def scored(model: dict, mesh: dict, lengths: list[int]) -> dict:
    """Log-likelihoods of all but the first token of rows of so many tokens."""
    params, found, random = None, {}, np.random.default_rng(3)
    rows = [Row(random.integers(VOCAB, size=length).tolist(), length - 1) for length in lengths]
    for name, sizes, devices in (("alone", {}, jax.devices()[:1]), ("sharded", mesh, jax.devices())):
        config = config_of(model, sizes, length=64)
        placement = place(config, make_mesh(config.mesh, devices))
        state = new_state(config, placement.mesh).params
        params = perturbed(state) if params is None else params
        state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, state)
        scores = score(Pretrained(config.model, state, placement), rows, batch_size=3)
        found[name] = [[float(x) for x in row.logprobs] + [bool(x) for x in row.greedy] for row in scores]
    return found


def modules(model: dict, mesh: dict, rows: list[int]) -> dict:
    """An NNX Decoder whose parameters are laid out as in training, and the same as somebody's function, beside one
    device.
    """
    batches, found = make_batches(rows, packed=False), {}
    for name, sizes, devices in (("alone", {}, jax.devices()[:1]), ("sharded", mesh, jax.devices())):
        config = config_of(model, sizes)
        params = new_state(config, make_mesh(config.mesh, devices)).params
        decoder = build_model(config.model, params)
        outside = measure(lambda params, inputs, c=config: forward(params, c.model, inputs), params, batches)
        found[name] = {"module": evaluate_model(decoder, batches), "function": outside.values}
        shard = decoder.layers[0].attention.query[...].addressable_shards[0].data.shape
    return found | {"query_shard": shard}


def compiled(model: dict, mesh: dict, rows: list[int], length: int = LENGTH) -> str:
    """The compiled pass of all measures."""
    config = config_of(model, mesh, length)
    placement = place(config, make_mesh(config.mesh))
    params, decoder = new_state(config, placement.mesh).params, DecoderPass(config.model, placement)
    ((batch, _),) = placed_batches(decoder, make_batches(rows, packed=False, length=length))
    return lower(decoder, params, batch, EVALUATORS).compile().as_text()


if __name__ == "__main__":
    run = {"report": report, "scored": scored, "modules": modules, "compiled": compiled}
    print(json.dumps([run[name](**case) for name, case in json.loads(sys.argv[1])]))
