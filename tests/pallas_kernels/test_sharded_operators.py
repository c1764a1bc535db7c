"""Both operators under jit with sharded inputs give what they give on one device; eight virtual CPU devices, in a process of their own."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels import depth_route, null_attention

assert jax.device_count() == 8
mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 3)
random = np.random.default_rng(0)
normal = lambda *shape: random.normal(size=shape).astype(np.float32)
put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))

def check(loss, arguments, specs):
    step = jax.jit(jax.value_and_grad(loss, tuple(range(len(arguments)))))
    sharded = [jax.tree.map(lambda x: put(x, *spec), argument) for argument, spec in zip(arguments, specs)]
    for one, many in zip(jax.tree.leaves(step(*arguments)), jax.tree.leaves(step(*sharded))):
        np.testing.assert_allclose(many, one, rtol=0, atol=3e-6 * np.abs(one).max())
    return jax.tree.leaves(step(*sharded))

def attend(query, key, value, b):
    output, null_mass, lse = null_attention(query, key, value, null_logit=b, window=50)
    return (output ** 2).sum() + (null_mass * lse).sum()

arguments = normal(4, 70, 6, 10), normal(4, 70, 2, 10), normal(4, 70, 2, 10), normal(6)
heads = ("data", None, "tensor")
gradients = check(attend, arguments, [heads, heads, heads, ("tensor",)])
assert gradients[1].sharding.is_equivalent_to(NamedSharding(mesh, P(*heads)), 4), gradients[1].sharding
check(attend, arguments, [("data", "sequence", "tensor")] + [heads] * 2 + [()])

def route(sources, query, evidence):
    output, weights, null_mass = depth_route(sources, query, key_norm_scale=jnp.ones(10), null_evidence=evidence, coupling=0.7)
    return (output ** 2).sum() + (weights ** 2).sum() + null_mass.sum()

tokens = ("data", "sequence")
for query, spec in ((normal(10), ()), (normal(4, 6, 10), tokens)):
    arguments = [normal(4, 6, 10) for _ in range(5)], query, [abs(normal(4, 6)) for _ in range(5)]
    check(route, arguments, [tokens, spec, tokens])
    check(route, arguments, [(*tokens, "tensor"), (*spec, "tensor"), tokens])

    def route_in_shards(*arguments):
        axes = [P(*tokens), P(*spec), P(*tokens)]
        each = lambda s, q, e: depth_route(s, q, key_norm_scale=jnp.ones(10), null_evidence=e, coupling=0.7)
        output, weights, null_mass = jax.shard_map(each, mesh=mesh, in_specs=tuple(axes), out_specs=P(*tokens))(*arguments)
        return (output ** 2).sum() + (weights ** 2).sum() + null_mass.sum()

    whole, shards = (jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*arguments) for loss in (route, route_in_shards))
    for one, many in zip(jax.tree.leaves(whole), jax.tree.leaves(shards)):
        np.testing.assert_allclose(many, one, rtol=0, atol=3e-6 * np.abs(one).max())
print("equal")
"""


def test_sharded_inputs_give_the_results_of_one_device():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0 and run.stdout.strip() == "equal", run.stderr
