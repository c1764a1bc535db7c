"""Compiles training steps for meshes of eight virtual devices and prints what they send and hold: see
test_step_collectives.py.
"""

import json
import sys

import jax
from jax.sharding import NamedSharding, PartitionSpec

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from oasis_jax.model import depth_weights
from oasis_jax.model.depth_weights import DepthOperator
from oasis_jax.placement import make_mesh
from oasis_jax.training.collectives import collectives
from oasis_jax.training.plan import abstract_batch
from oasis_jax.training.state import abstract_state
from oasis_jax.training.step import make_step
from pallas_kernels import add_route_gradients

BATCH, LENGTH = 16, 24


def careless(depth_route, mesh: jax.sharding.Mesh):
    """What one line too many could do: every router asks for its sources whole."""
    whole = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def route(sources, *arguments, **options):
        return depth_route(
            [jax.lax.with_sharding_constraint(source, whole) for source in sources], *arguments, **options
        )

    return route


def watched(depth_route, shards: list):
    """The router, noting what a device holds of each of its sources."""

    def route(sources, *arguments, **options):
        for source in sources:
            found = jax.lax.stop_gradient(source)
            jax.debug.inspect_array_sharding(
                found, callback=lambda sharding, shape=found.shape: shards.append(sharding.shard_shape(shape))
            )
        return depth_route(sources, *arguments, **options)

    return route


def report(model: dict, mesh: dict, mutant: bool = False) -> dict:
    config = Config(
        model=ModelConfig(width=40, num_heads=12, num_kv_heads=4, head_dim=10, mlp_dim=56, vocab_size=83, **model),
        data=DataConfig(batch_size=BATCH, sequence_length=LENGTH),
        mesh=MeshConfig(**mesh),
    )
    devices, shards, own = make_mesh(config.mesh), [], depth_weights.depth_route
    route = watched(careless(own, devices) if mutant else own, shards)
    depth_weights._KERNELS = DepthOperator(route, add_route_gradients)
    step, batch = make_step(config, devices), abstract_batch(config, devices)
    compiled = step.lower(abstract_state(config, devices), batch).compile()
    depth_weights._KERNELS = DepthOperator(own, add_route_gradients)
    return {
        "sent": {kind.name: [kind.count, kind.bytes] for kind in collectives(compiled.as_text())},
        "sources": shards,
    }


if __name__ == "__main__":
    print(json.dumps([report(**case) for case in json.loads(sys.argv[1])]))
