"""Every implementation of depth_route against float64 autodiff of a plain definition, and named regressions."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import depth_route, explain, implementations
from pallas_kernels.dispatch import interpret_kernels

# The kernels of accelerators run in their interpreters here: implementation -> (a width its tiles take, the oldest jax
# that has it).
INTERPRETED = {"mosaic_gpu": (128, (0, 11, 2)), "mosaic_tpu": (13, (0, 10, 2))}

every_implementation = pytest.mark.parametrize("implementation", implementations("depth_route"), indirect=True)


@pytest.fixture
def implementation(request):
    if request.param not in INTERPRETED:
        yield request.param
        return
    _, oldest_jax = INTERPRETED[request.param]
    if jax.__version_info__ < oldest_jax:
        pytest.skip(f"{request.param} needs jax {'.'.join(map(str, oldest_jax))} or newer, this is {jax.__version__}")
    with interpret_kernels():
        yield request.param
    assert request.param != "mosaic_tpu" or not races_found()


def races_found() -> bool:
    """Whether the TPU interpreter saw a kernel read what another part of it was writing."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races is not None and interpret_pallas_call.races.races_found


def case(name, implementation):
    """The arguments of `make`; for an interpreter, which is slow, fewer tokens, and a width that the kernels take."""
    settings = dict(CASES[name])
    if implementation in INTERPRETED:
        count, batch, length, _ = settings["shape"]
        settings["shape"] = (count, batch, min(length, 3), INTERPRETED[implementation][0])
    return settings


# `per_token`: query [B, T, D]; `live`: (number, whether it is traced). Sizes are odd and all different: L, B, T, D.
CASES = {
    "plain": dict(shape=(5, 2, 7, 11)),
    "one_source": dict(shape=(1, 2, 7, 11), norm=True),
    "projected": dict(shape=(7, 3, 5, 13), per_token=True, score_scale=0.3, bias="source", evidence=True),
    "projected_softmax": dict(shape=(3, 2, 5, 9), per_token=True, bias="token", evidence=True, null_logit=-np.inf),
    "many": dict(shape=(8, 4, 5, 13), norm=True, evidence=True),
    "static": dict(shape=(5, 2, 9, 13), norm=True, evidence=True),
    "static_softmax": dict(shape=(4, 3, 7, 11), norm=True, null_logit=-np.inf),
    "normed_token_query": dict(
        shape=(5, 2, 3, 7), norm=True, per_token=True, bias="token", evidence=True, null_logit=0.7
    ),
    "live": dict(shape=(7, 2, 5, 9), norm=True, bias="source", evidence=True, live=(4, False)),
    "live_traced": dict(shape=(7, 2, 5, 9), norm=True, bias="token", evidence=True, live=(4, True)),
    "live_traced_token_query": dict(
        shape=(5, 3, 7, 9), per_token=True, evidence=True, live=(3, True), null_logit=-np.inf
    ),
    "clamped": dict(shape=(5, 2, 7, 11), per_token=True, score_scale=25.0, evidence=True),
}


def plain(sources, arguments, *, score_scale=1.0, live=None):
    """The definition, source by source; dead sources are not looked at."""
    sources = sources[:live]
    count, psi = len(sources), arguments.get("null_evidence")
    query, scores = arguments["query"], []
    for i, source in enumerate(sources):
        key = source
        if "key_norm_scale" in arguments:
            key = source / jnp.sqrt((source**2).mean(-1, keepdims=True) + 1e-6) * arguments["key_norm_scale"]
        score = (key * query).sum(-1) * score_scale
        if "bias" in arguments:
            score = score + arguments["bias"][..., i]
        if psi is not None:
            score = score - arguments["coupling"] * (psi[i] - sum(psi[:count]) / count)
        scores.append(jnp.clip(score, -50.0, 50.0))
    b = arguments["null_logit"]
    total = jnp.exp(b) + sum(jnp.exp(score) for score in scores)
    weights = [jnp.exp(score) / total for score in scores]
    output = sum(weight[..., None] * source for weight, source in zip(weights, sources))
    return output, jnp.stack(weights, axis=-1), jnp.exp(b) / total


def make(shape, *, per_token=False, norm=False, bias=None, evidence=False, null_logit=0.0, live=None, score_scale=1.0):
    """(sources, other arguments) as float32 numpy arrays, static options, and one random cotangent for each result."""
    count, batch, length, width = shape
    random = np.random.default_rng(sum(shape))
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    sources = normal(count, batch, length, width)
    query = normal(batch, length, width) if per_token else normal(width)
    arguments = {
        "query": query * np.float32(3 / width**0.5),
        "null_logit": np.float32(null_logit),
    }  # scores as large at any width
    if norm:
        arguments["key_norm_scale"] = 1 + normal(width) / 3
    if bias:
        arguments["bias"] = normal(count) if bias == "source" else normal(batch, length, count)
    if evidence:
        arguments |= {
            "null_evidence": random.uniform(size=(count, batch, length)).astype(np.float32),
            "coupling": np.float32(1.3),
        }
    cotangents = normal(batch, length, width), normal(batch, length, count), normal(batch, length)
    return (sources, arguments), dict(score_scale=score_scale), live, cotangents


def results_and_gradients(function, arrays, cotangents):
    def loss(arrays):
        results = function(*arrays)
        return sum(jnp.vdot(c, r) for c, r in zip(cotangents, results)), tuple(results)

    (_, results), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return results, gradients


def as_float64(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


@functools.cache
def expected(name, implementation):
    arrays, options, live, cotangents = make(**case(name, implementation))
    live = live[0] if live else len(arrays[0])
    cotangents = cotangents[0], cotangents[1][..., :live], cotangents[2]
    with jax.enable_x64(True):
        function = functools.partial(plain, live=live, **options)
        (output, weights, null_mass), gradients = jax.tree.map(
            np.asarray, results_and_gradients(function, as_float64(arrays), as_float64(cotangents))
        )
    return (output, np.pad(weights, [(0, 0), (0, 0), (0, len(arrays[0]) - live)]), null_mass), gradients


def assert_close(actual, wanted, tolerance):
    """The largest error, relative to the largest value."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def call(sources, arguments, *, as_list, live, **options):
    """depth_route with sources and evidence as arrays or as lists, and a live number that is Python's or traced."""
    arguments = dict(arguments)
    if as_list:
        sources = [sources[i] for i in range(len(sources))]
        if "null_evidence" in arguments:
            arguments["null_evidence"] = list(arguments["null_evidence"])
    if live:
        options["num_sources"] = jnp.int32(live[0]) if live[1] else live[0]
    return depth_route(sources, arguments.pop("query"), **arguments, **options)


def calls():
    """Every case for every implementation, with sources as an array and as a list; in an interpreter, which
    is slow, as one of the two.
    """
    for implementation in implementations("depth_route"):
        for i, name in enumerate(CASES):
            for as_list in [i % 2 == 0] if implementation in INTERPRETED else [False, True]:
                yield pytest.param(
                    implementation, as_list, name, id=f"{name}-{'list' if as_list else 'array'}-{implementation}"
                )


@pytest.mark.parametrize("implementation, as_list, name", list(calls()), indirect=["implementation"])
def test_equals_the_plain_definition(implementation, as_list, name):
    arrays, options, live, cotangents = make(**case(name, implementation))
    function = functools.partial(call, as_list=as_list, live=live, implementation=implementation, **options)
    values, gradients = expected(name, implementation)
    precisions = [("float32", 1e-6, 1e-5), ("float64", 1e-12, 1e-12)]
    for dtype, value_tolerance, gradient_tolerance in (
        precisions if as_list and implementation not in INTERPRETED else precisions[:1]
    ):
        with jax.enable_x64(dtype == "float64"):
            convert = as_float64 if dtype == "float64" else lambda x: x
            actual_values, actual_gradients = results_and_gradients(function, convert(arrays), convert(cotangents))
        assert {x.dtype for x in jax.tree.leaves((actual_values, actual_gradients))} == {jnp.dtype(dtype)}
        # a score of 50 that is off by one float32 spacing moves a weight by 50 spacings
        largest = 50.0 if name == "clamped" and dtype == "float32" else 1.0
        jax.tree.map(lambda a, w, t=value_tolerance * largest: assert_close(a, w, t), tuple(actual_values), values)
        jax.tree.map(lambda a, w, t=gradient_tolerance * largest: assert_close(a, w, t), actual_gradients, gradients)


@every_implementation
def test_vmap_and_remat(implementation):
    (sources, arguments), options, live, _ = make(**case("normed_token_query", implementation))

    def loss(sources, coupling):
        given = arguments | {"coupling": coupling}
        output, weights, null_mass = call(
            sources, given, as_list=True, live=live, implementation=implementation, **options
        )
        return (output**2).sum() + (weights[..., 0] * null_mass).sum()

    many = np.stack([sources, -sources, 2 * sources]), np.float32([0.1, 1.0, 3.0])
    batched = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1))))(*many)
    # the interpreters' side effects cannot be rematerialized
    remat = jax.jit(jax.value_and_grad(loss if implementation in INTERPRETED else jax.checkpoint(loss), (0, 1)))
    for i in range(3):
        one = remat(many[0][i], many[1][i])
        jax.tree.map(lambda a, w: assert_close(a, w, 2e-6), jax.tree.map(lambda x, i=i: x[i], batched), one)


@every_implementation
@pytest.mark.parametrize("traced", [False, True], ids=["python", "traced"])
@pytest.mark.parametrize("as_list", [False, True], ids=["array", "list"])
def test_whatever_lies_in_dead_sources_stays_there(implementation, traced, as_list):
    (sources, arguments), options, _, cotangents = make(**case("live", implementation))
    sources[4:], arguments["null_evidence"][4:], arguments["bias"][4:] = np.nan, np.nan, np.inf
    function = functools.partial(call, as_list=as_list, live=(4, traced), implementation=implementation, **options)
    values, gradients = results_and_gradients(function, (sources, arguments), cotangents)
    jax.tree.map(lambda a, w: assert_close(a, w, 1e-6), tuple(values), expected("live", implementation)[0])
    jax.tree.map(lambda a, w: assert_close(a, w, 1e-5), gradients, expected("live", implementation)[1])
    assert np.all(np.asarray(values[1][..., 4:]) == 0) and np.all(np.asarray(gradients[0][4:]) == 0)


@every_implementation
def test_half_precision_sources_have_float32_weights(implementation):
    (sources, arguments), options, _, cotangents = make(**case("projected", implementation))
    low = sources.astype(jnp.bfloat16)
    function = functools.partial(call, as_list=True, live=None, implementation=implementation, **options)
    values, (gradient, _) = results_and_gradients(
        function, (low, arguments), (cotangents[0].astype(jnp.bfloat16), *cotangents[1:])
    )
    assert values[0].dtype == gradient.dtype == jnp.bfloat16 and values[1].dtype == values[2].dtype == jnp.float32
    with jax.enable_x64(True):
        wanted = plain(*as_float64((low.astype(np.float32), arguments)), **options)
    assert_close(values[0], wanted[0], 2**-8)
    assert_close(values[1], wanted[1], 1e-6)
    assert_close(values[2], wanted[2], 1e-6)


@every_implementation
def test_the_one_in_the_denominator_becomes_exp_of_minus_max(implementation):
    width, _ = INTERPRETED.get(implementation, (1, None))
    output, weights, null_mass = depth_route(
        [jnp.ones((1, 1, width))], jnp.full(width, 4.0 / width), implementation=implementation
    )
    np.testing.assert_allclose(weights.item(), np.exp(4) / (1 + np.exp(4)), rtol=1e-6)
    np.testing.assert_allclose(null_mass.item(), 1 / (1 + np.exp(4)), rtol=1e-6)
    np.testing.assert_allclose(output, np.full((1, 1, width), weights.item()), rtol=2e-7)


@every_implementation
def test_evidence_is_centred_and_a_clamped_score_has_no_gradient(implementation):
    (sources, arguments), options, _, _ = make(**case("static", implementation))
    shifted = arguments | {"null_evidence": arguments["null_evidence"] + 3.0}
    function = functools.partial(call, as_list=False, live=None, implementation=implementation, **options)
    jax.tree.map(lambda a, w: assert_close(a, w, 2e-6), function(sources, shifted), function(sources, arguments))
    width, _ = INTERPRETED.get(implementation, (1, None))
    ones = jnp.ones((2, 1, 1, width))

    def route(bias):
        result = depth_route(ones, jnp.full(width, 1 / width), bias=bias, implementation=implementation)
        return result._replace(output=result.output[..., :1])

    jacobian = jax.jacobian(route)(jnp.array([200.0, 48.0]))
    assert all(np.all(np.asarray(x)[..., 0] == 0) for x in jax.tree.leaves(jacobian))
    assert np.all(np.asarray(jacobian.weights)[..., 1] != 0)


@every_implementation
def test_inside_shard_map_shared_arguments_have_shared_gradients(implementation):
    (sources, arguments), options, live, _ = make(**case("static", implementation))
    shared = arguments["query"], arguments["key_norm_scale"], arguments["coupling"]

    def loss(route, sources, evidence, shared):
        output, weights, null_mass = route(sources, evidence, shared)
        return (output**2).sum() + (weights[..., 0] * null_mass).sum()

    def route(sources, evidence, shared):
        given = dict(zip(("query", "key_norm_scale", "coupling"), shared), null_evidence=evidence)
        return tuple(call(sources, given, as_list=True, live=live, implementation=implementation, **options))

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    tokens = P(None, "data")
    in_shards = jax.shard_map(route, mesh=mesh, in_specs=(tokens, tokens, P()), out_specs=P("data"))
    given = sources, arguments["null_evidence"], shared
    wanted, actual = (jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2)))(*given) for f in (route, in_shards))
    jax.tree.map(lambda a, w: assert_close(a, w, 2e-6), actual, wanted)


def test_the_gpu_kernels_say_what_they_cannot_serve():
    def reason(
        shape=(3, 2, 5, 256),
        dtype=jnp.bfloat16,
        device=("NVIDIA H100 80GB HBM3", "gpu"),
        axes=(1,),
        types=(AxisType.Auto,),
    ):
        sources, query = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
        device = AbstractDevice(device_kind=device[0], num_cores=132, platform=device[1])
        with jax.sharding.use_abstract_mesh(AbstractMesh(axes, ("data",), axis_types=types, abstract_device=device)):
            return explain("depth_route", sources, query).reasons["mosaic_gpu"]

    if jax.__version_info__ < (0, 11, 2):
        assert reason() == f"needs jax 0.11.2 or newer, this is {jax.__version__}"
        return
    assert (
        reason()
        == ""
        == reason(device=("NVIDIA H200", "gpu"))
        == reason(dtype=jnp.float16)
        == reason((1, 1, 1, 640), jnp.float32)
    )
    assert "GPUs only, the call is compiled for tpu" in reason(device=("TPU v6e", "tpu"))
    assert "Hopper GPUs only (H100, H200, H800, H20, GH200), the call is compiled for NVIDIA A100" in reason(
        device=("NVIDIA A100-SXM4-80GB", "gpu")
    )
    for width in (32, 96, 2080, 2880, 4064, 4160, 8192):
        assert reason((3, 2, 5, width)) == reason((3, 1, 1, width)) == ""
    allowed = "takes widths that are multiples of 32 up to 4096, of 64 up to 8192, got "
    for width in (72, 4128, 8256):
        assert reason((3, 2, 5, width)) == f"{allowed}{width}"
    assert "inside jax.shard_map" in reason(axes=(4,)) and reason(axes=(4,), types=(AxisType.Manual,)) == ""
    with jax.enable_x64(True):
        assert "bfloat16, float16, float32, got float64" in reason(dtype=jnp.float64)
    with pytest.raises(ValueError, match="mosaic_gpu: runs on GPUs only, the call is compiled for cpu"):
        depth_route(jnp.ones((3, 2, 5, 128)), jnp.ones(128), implementation="mosaic_gpu")


def test_a_list_is_never_stacked():
    count, batch, length, width = 7, 3, 11, 65
    sources = [jax.ShapeDtypeStruct((batch, length, width), jnp.float32)] * count
    gain = jax.ShapeDtypeStruct((width,), jnp.float32)

    def loss(sources, query, gain):
        output, weights, null_mass = depth_route(sources, query, key_norm_scale=gain, implementation="xla")
        return (output**2).sum() + (weights**2).sum() + null_mass.sum()

    lowered = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(sources, gain, gain)
    for text in (lowered.as_text("hlo"), lowered.compile().as_text()):
        sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", text)]
        assert batch * length * width <= max(sizes) < count * batch * length * width


@pytest.mark.parametrize("live", [None, 37], ids=["all_live", "some_live"])
def test_an_array_is_read_and_its_gradient_written_in_place(live):
    count, batch, length, width = 53, 3, 41, 65
    array = jax.ShapeDtypeStruct((count, batch, length, width), jnp.float32)
    gain = jax.ShapeDtypeStruct((width,), jnp.float32)

    def loss(sources, query, gain):
        output, weights, null_mass = depth_route(
            sources, query, key_norm_scale=gain, num_sources=live, implementation="xla"
        )
        return (output**2).sum() + (weights**2).sum() + null_mass.sum()

    def used(sources):  # by the program beside its arguments, in units of one source
        memory = jax.jit(jax.grad(loss)).lower(sources, gain, gain).compile().memory_analysis()
        return (memory.temp_size_in_bytes + memory.output_size_in_bytes) / (4 * batch * length * width)

    as_list = [jax.ShapeDtypeStruct(array.shape[1:], jnp.float32)] * count
    assert used(array) <= 1.2 * used(as_list)


GOOD = dict(sources=np.ones((3, 2, 5, 7), np.float32), query=np.ones((7,), np.float32))


@pytest.mark.parametrize(
    "argument, change",
    [
        ("sources", dict(sources=np.ones((3, 2, 5), np.float32))),
        ("sources", dict(sources=[])),
        ("sources", dict(sources=[np.ones((2, 5, 7), np.float32), np.ones((2, 5, 6), np.float32)])),
        ("sources", dict(sources=[np.ones((2, 5, 7), np.float32), np.ones((2, 5, 7), np.float16)])),
        ("sources", dict(sources=np.ones((3, 2, 5, 7), np.int32))),
        ("query", dict(query=np.ones((2, 7), np.float32))),
        ("query", dict(query=np.ones((7,), np.int32))),
        ("query", dict(query=None)),
        ("key_norm_scale", dict(key_norm_scale=np.ones((5,), np.float32))),
        ("score_scale", dict(score_scale=None)),
        ("bias", dict(bias=np.ones((5,), np.float32))),
        ("null_evidence", dict(null_evidence=np.ones((3, 5, 2), np.float32))),
        ("null_evidence", dict(null_evidence=[np.ones((2, 5), np.float32)] * 2)),
        ("coupling", dict(coupling=0.5)),
        ("coupling", dict(coupling=np.ones(3), null_evidence=np.ones((3, 2, 5), np.float32))),
        ("null_logit", dict(null_logit=np.zeros(3))),
        ("num_sources", dict(num_sources=4)),
        ("num_sources", dict(num_sources=0)),
        ("num_sources", dict(num_sources=1.5)),
        ("implementation", dict(implementation="refrence")),
    ],
)
def test_bad_arguments_are_named(argument, change):
    arguments = GOOD | change
    with pytest.raises(ValueError, match=f"^{argument}: .*(got|there are)"):
        depth_route(arguments.pop("sources"), arguments.pop("query"), **arguments)
