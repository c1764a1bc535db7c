"""depth_route's TPU kernels through the real compiler, for chips that are not there."""

import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import depth_route, explain

pytestmark = pytest.mark.aot

_spec = importlib.util.spec_from_file_location("tpu_compiler", pathlib.Path(__file__).with_name("tpu_compiler.py"))
tpu_compiler = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tpu_compiler)

KERNELS = ("depth_route_forward", "depth_route_backward")
every_topology = pytest.mark.parametrize("topology", tpu_compiler.TOPOLOGIES)
both_forms = pytest.mark.parametrize("as_list", [False, True], ids=["array", "list"])
both_queries = pytest.mark.parametrize("per_token", [False, True], ids=["static", "per_token"])


def arguments(mesh, shape, *, as_list=False, per_token=False, dtype="bfloat16", tokens=(), lead=()):
    """(sources, query, gain, evidence); `tokens` names the mesh axes of batch and length."""

    def place(shape, dtype, *axes):
        axes = [None] * len(lead) + list(axes)
        return jax.ShapeDtypeStruct((*lead, *shape), dtype, sharding=NamedSharding(mesh, P(*axes)))

    count, *each = shape
    sources = [place(each, dtype, *tokens) for _ in range(count)] if as_list else place(shape, dtype, None, *tokens)
    query = place(each, dtype, *tokens) if per_token else place(each[-1:], "float32")
    return sources, query, place(each[-1:], "float32"), place(shape[:3], "float32", None, *tokens)


def route(sources, query, gain, evidence, num_sources=None):
    options = dict(null_evidence=evidence, coupling=0.7, num_sources=num_sources, implementation="mosaic_tpu")
    return depth_route(sources, query, key_norm_scale=gain, **options)


def results_and_gradients(*arrays):
    """The cotangent of the output is the output: nothing but the two kernels touches an array of the sources' width."""
    results, pull = jax.vjp(route, *arrays)
    return results, pull(results)


def compiled(mesh, function, arrays):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*arrays).compile()


def kernel_calls(executable) -> list[int]:
    """How often a program calls the forward and the backward kernel."""
    calls = re.findall(r'^.*custom_call_target="tpu_custom_call"', executable.as_text(), re.MULTILINE)
    return [sum(kernel in call.split(" = ")[0] for call in calls) for kernel in KERNELS]


def size(tree) -> int:
    return sum(np.prod(x.shape, dtype=int) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@every_topology
@both_forms
@both_queries
@pytest.mark.parametrize("count, width", [(29, 2048), (65, 4096)], ids=["29x2048", "65x4096"])
def test_the_kernels_compile_and_copy_no_sources(topology, as_list, per_token, count, width):
    mesh = tpu_compiler.tpu_mesh(topology, data=1)
    arrays = arguments(mesh, (count, 2, 2048, width), as_list=as_list, per_token=per_token)
    executable = compiled(mesh, results_and_gradients, arrays)
    assert kernel_calls(executable) == [1, 1]
    one_source = size(arrays[0]) // count
    # at most a float32 query and its float32 gradient, and statistics of 128 lanes; a copied stack would be `count`
    # sources
    assert executable.memory_analysis().temp_size_in_bytes < 5 * one_source
    # The sources are read forward and backward and their gradients written. Some sources XLA reads ahead, into VMEM,
    # which it counts twice; a copied stack would be read and written besides, at least 5 stacks in all.
    assert 3 <= executable.cost_analysis()["bytes accessed"] / size(arrays[0]) < 4.5


@every_topology
@both_forms
@both_queries
def test_inside_shard_map_over_examples_and_sequence(topology, as_list, per_token):
    devices = 4 if topology != "tpu7x:2x2x1" else 8
    mesh = tpu_compiler.tpu_mesh(topology, data=2, sequence=devices // 2)
    arrays = arguments(mesh, (7, 4, 2048, 1024), as_list=as_list, per_token=per_token, tokens=("data", "sequence"))
    specs = jax.tree.map(lambda x: x.sharding.spec, arrays)
    tokens = P("data", "sequence")
    function = jax.shard_map(results_and_gradients, mesh=mesh, in_specs=specs, out_specs=(tokens, specs))
    executable = compiled(mesh, function, arrays)
    assert kernel_calls(executable) == [1, 1]
    assert "all-gather" not in executable.as_text()
    assert "all-reduce" in executable.as_text()  # the gradient of the gain, which all shards share
    assert executable.memory_analysis().temp_size_in_bytes < 6 * size(arrays[0]) // 7 // devices


def test_more_sources_than_lanes():
    mesh = tpu_compiler.tpu_mesh("v5e:2x2", data=1)
    arrays = arguments(mesh, (130, 1, 512, 512))
    executable = compiled(mesh, results_and_gradients, arrays)
    assert kernel_calls(executable) == [1, 1]
    # two rows of lanes for 130 statistics of a token in float32, forward and backward, and no copy of the sources
    assert executable.memory_analysis().temp_size_in_bytes < size(arrays[0]) // 4


@both_forms
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_odd_sizes_types_and_a_traced_number_of_sources(as_list, dtype):
    mesh = tpu_compiler.tpu_mesh("v5e:2x2", data=1)
    arrays = arguments(mesh, (5, 3, 1037, 1000), as_list=as_list, per_token=dtype == "float32", dtype=dtype)
    number = jax.ShapeDtypeStruct((), "int32", sharding=NamedSharding(mesh, P()))

    def function(number, *arrays):
        results, pull = jax.vjp(lambda *arrays: route(*arrays, num_sources=number), *arrays)
        return results, pull(results)

    assert kernel_calls(compiled(mesh, function, (number, *arrays))) == [1, 1]


def test_vmap_and_remat():
    mesh = tpu_compiler.tpu_mesh("v6e:2x2", data=1)
    arrays = arguments(mesh, (5, 2, 300, 256), as_list=True, lead=(3,))
    loss = jax.checkpoint(lambda *arrays: (route(*arrays).output.astype(jnp.float32) ** 2).sum())
    assert kernel_calls(compiled(mesh, jax.vmap(jax.grad(loss, (0, 1, 2, 3))), arrays)) == [
        1,
        1,
    ]  # the batch is a grid axis, not a loop of calls


def test_they_are_chosen_on_tpus_and_say_what_they_cannot_serve():
    def reason(topology="v5e:2x2", shape=(29, 1, 2048, 2048), dtype="bfloat16", axes=None, **options):
        mesh = tpu_compiler.tpu_mesh(topology, **(axes or {"data": 1}))
        sources, query, *_ = arguments(mesh, shape, dtype=dtype, **options)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            explanation = explain("depth_route", sources, query)
        reason = explanation.reasons["mosaic_tpu"]
        assert (explanation.implementation == "mosaic_tpu") == (not reason)
        return reason

    assert "float32 and bfloat16, got float16" in reason(dtype="float16")
    assert reason() == "" == reason(as_list=True) == reason("v4:2x2x1")
    assert "inside jax.shard_map" in reason(axes={"data": 2})
    assert re.fullmatch(
        r"129 sources of width 8192 float32 need \d+ MiB of VMEM, .* has 16; one array .*",
        reason("v4:2x2x1", (129, 1, 64, 8192), "float32", as_list=True),
    )
