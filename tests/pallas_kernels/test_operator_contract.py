"""What every backend of both operators keeps: one message for a bad argument, JAX's stricter modes, reverse mode only,
and a true word from `explain`.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from pallas_kernels import OperatorSharding, depth_route, explain, implementations, merge_partials, null_attention
from pallas_kernels.dispatch import interpret_kernels

PLAIN_JAX = ("xla", "reference")
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def attention_arguments(**changes):
    ones = lambda *shape: np.ones(shape, np.float32)
    return dict(query=ones(2, 9, 6, 5), key=ones(2, 11, 3, 5), value=ones(2, 11, 3, 5)) | changes


BAD = {
    "null_logit": [np.zeros(3), np.zeros((2, 9)), np.zeros((2, 6, 9)), np.zeros(6, complex), "0"],
    "null_key": [np.zeros(5), np.zeros((6, 5)), np.zeros((0, 3, 5)), np.zeros((3, 5), int)],
    "null_value": [np.zeros((3, 4)), np.zeros((2, 3, 5)), np.zeros((1, 1, 3, 5))],
    "mask": [np.ones((2, 6, 9, 11)), np.ones((9, 11), bool), np.ones((2, 3, 9, 11), bool), np.ones((2, 6, 9, 9), bool)],
    "bias": [np.zeros((2, 6, 9, 11), int), np.zeros((9, 11)), np.zeros((1, 6, 11, 9)), object()],
    "query_offset": [1.5, np.zeros(3, int), np.zeros((2, 1), int)],
    "kv_lengths": [5, np.zeros(3, int), np.zeros(2), np.array([3, 12]), np.array([-1, 3])],
    "window": [0, -4, 2.0, True, "3", 2**31, 2**70],
    "logit_softcap": [0.0, -1.0, np.nan, "1", True],
    "scale": ["1", np.inf, np.ones((50, 50)), 1j],
    "is_causal": [None, 1],
    "segment_ids": [np.zeros((2, 8), int), (np.zeros((2, 9)), np.zeros((2, 11))), (np.zeros((2, 9), int),) * 2],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_argument_is_named_alike_by_every_backend(name, value):
    messages = set()
    for implementation in (*implementations("null_attention"), None):
        with pytest.raises(ValueError, match=f"^{name}: .*got") as error:
            null_attention(**attention_arguments(**{name: value}), implementation=implementation)
        messages.add(str(error.value))
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError) as error:
        null_attention(**attention_arguments(**{name: value}), sharding=OperatorSharding(mesh, batch="data"))
    assert messages == {str(error.value)} and "\n" not in str(error.value)


def route_arguments(**changes):
    return dict(sources=np.ones((3, 2, 5, 7), "f"), query=np.ones(7, "f")) | changes


_ones = lambda *shape: np.ones(shape, np.float32)
BAD_ROUTE = {
    "sources": [
        None, 5, "a", [], ["a"], _ones(3, 2, 5), _ones(0, 2, 5, 7), [_ones(2, 0, 7)], [_ones(2, 5, 7), _ones(2, 5, 6)],
        [_ones(2, 5, 7), None], np.ones((3, 2, 5, 7), int), object(),
    ],
    "query": [None, _ones(6), "x", _ones(2, 5, 6), np.ones(7, int)],
    "key_norm_scale": [_ones(1), 1.0, "x"],
    "score_scale": [None, _ones(50, 50), "a", np.inf, True],
    "bias": [_ones(2), 0.0, "x", np.ones(3, int)],
    "null_evidence": [_ones(3, 2, 4), [_ones(2, 5)] * 2, [_ones(2, 5), _ones(2, 5), None], 1.0, "x"],
    "coupling": [1.0, None, "x", _ones(1), True],
    "null_logit": [None, "x", _ones(1), True, 1j],
    "num_sources": [0, 4, 1.5, True, np.array([1]), "a", 2**70],
    "sharding": [3, "data"],
}  # fmt: skip


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD_ROUTE.items() for value in values])
def test_a_bad_argument_of_a_route_is_named_alike_by_every_backend(name, value):
    messages = set()
    for implementation in (*implementations("depth_route"), None):
        with pytest.raises(ValueError, match=f"^{name}: .*got") as error:
            depth_route(**route_arguments(**{name: value}), implementation=implementation)
        messages.add(str(error.value))
    assert len(messages) == 1 and "\n" not in messages.pop()


@pytest.mark.parametrize("name", [3, ["xla"], np.ones((50, 50)), "cudn", ""])
def test_an_implementation_that_there_is_not_is_one_line(name):
    for call, arguments in ((null_attention, attention_arguments()), (depth_route, route_arguments())):
        with pytest.raises(ValueError, match=r"^implementation: .* has no .*there are: ") as error:
            call(**arguments, implementation=name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [np.float32(0.7), np.float64(0.7), np.array(0.7), jnp.float32(0.7), 0.7])
def test_numbers_of_numpy_and_jax_are_numbers(number):
    arrays = attention_arguments(query=np.random.default_rng(0).normal(size=(2, 9, 6, 5)).astype("f"))
    found = null_attention(**arrays, scale=number, logit_softcap=number, window=np.int64(4), is_causal=np.True_)
    wanted = null_attention(**arrays, scale=0.7, logit_softcap=0.7, window=4)
    np.testing.assert_allclose(found.output, wanted.output, rtol=1e-6)
    sources, query = np.ones((3, 2, 5, 7), np.float32), np.ones(7, np.float32)
    found = depth_route(sources, query, score_scale=number)
    np.testing.assert_allclose(found.output, depth_route(sources, query, score_scale=0.7).output, rtol=1e-6)


@pytest.mark.parametrize("name, value", [("scale", 0.5), ("logit_softcap", 2.0), ("window", 3)])
def test_traced_static_arguments_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: must be known when the call is traced, got a traced"):
        jax.jit(lambda x: null_attention(**attention_arguments(), **{name: x}))(value)
    if name == "scale":
        with pytest.raises(ValueError, match=r"^score_scale: must be known when the call is traced"):
            jax.jit(lambda x: depth_route(np.ones((3, 2, 5, 7), "f"), np.ones(7, "f"), score_scale=x))(value)


@contextlib.contextmanager
def strict(mode):
    with contextlib.ExitStack() as stack:
        if mode == "rank_promotion":
            stack.enter_context(jax.numpy_rank_promotion("raise"))
        elif mode == "debug_nans":
            stack.enter_context(jax.debug_nans(True))
        else:
            stack.enter_context(jax.enable_x64(True))
        yield


def attend_with_everything(implementation):
    """A loss with gradients of the nulls, and of masks where the backend has them."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    q, k, v = normal(2, 9, 4, 5), normal(2, 11, 2, 5), normal(2, 11, 2, 5)
    ids = np.zeros((2, 9), np.int32), np.sort(random.integers(0, 2, (2, 11)), axis=1)  # some rows see nothing
    nulls = [dict(null_logit=normal(4)), dict(null_logit=-np.inf)]
    nulls.append(dict(null_logit=normal(2, 9, 4), null_key=normal(3, 2, 5), null_value=normal(3, 2, 5)))
    masks = [dict(segment_ids=ids, logit_softcap=2.0), dict(window=4)]
    if implementation in PLAIN_JAX:
        bias = np.where(np.arange(11) < 3, -np.inf, 0.0).astype("f")[None, None, None]
        masks.append(dict(bias=bias, kv_lengths=np.array([0, 7]), mask=np.ones((2, 1, 1, 11), bool)))

    def loss(q, k, v, nulls, options):
        result = null_attention(q, k, v, **nulls, **options, implementation=implementation)
        finite = jnp.where(jnp.isfinite(result.lse), result.lse, 0.0)
        return (result.output**2).sum() + (result.null_mass + finite).sum()

    for mask, null in zip(masks, nulls[-len(masks) :]):
        differentiate = jax.grad(lambda q, k, v, n, mask=mask: loss(q, k, v, n, mask), (0, 1, 2, 3))
        for x in jax.tree.leaves(jax.jit(differentiate)(q, k, v, null)):
            assert np.isfinite(x).all() and x.dtype in (np.float32, np.float64)
    merged = merge_partials([q, q], [normal(2, 4, 9)] * 2, null_logit=nulls[0]["null_logit"])
    assert merged.output.dtype == np.float32


def route_with_everything(implementation):
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    sources, evidence = normal(3, 2, 16, 8), abs(normal(3, 2, 16))

    def loss(sources, query, live):
        result = depth_route(
            sources, query, key_norm_scale=np.ones(8, "f"), bias=np.ones(3, "f"), null_evidence=evidence, coupling=0.7,
            num_sources=live, implementation=implementation,
        )  # fmt: skip
        return (result.output**2).sum() + (result.weights**2).sum() + result.null_mass.sum()

    for query, given in ((normal(8), sources), (normal(2, 16, 8), list(sources))):
        for x in jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(given, query, np.int32(2))):
            assert np.isfinite(x).all() and x.dtype == np.float32


@pytest.mark.parametrize(
    "implementation", ["xla", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mosaic_tpu", "reference"))]
)
@pytest.mark.parametrize("mode", ["rank_promotion", "debug_nans", "x64"])
@pytest.mark.parametrize("operator", [attend_with_everything, route_with_everything])
def test_jaxs_stricter_modes(operator, mode, implementation):
    interpreter = interpret_kernels() if implementation == "mosaic_tpu" else contextlib.nullcontext()
    with strict(mode), interpreter:
        operator(implementation)


FORWARD = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "linearize": lambda f, x: jax.linearize(f, x)[1](x),
    "linearize of jit": lambda f, x: jax.linearize(jax.jit(f), x)[1](x),
    "jvp of jit": lambda f, x: jax.jvp(jax.jit(f), (x,), (x,)),
    "jit of jvp": lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x),
    "jvp of vmap": lambda f, x: jax.jvp(jax.vmap(f), (x[None],), (x[None],)),
    "jvp of checkpoint": lambda f, x: jax.jvp(jax.checkpoint(f), (x,), (x,)),
    "jvp of scan": lambda f, x: jax.jvp(lambda x: lax.scan(lambda c, _: (c, f(c)), x, None, length=2)[1], (x,), (x,)),
    "grad of jvp": lambda f, x: jax.grad(lambda x: jax.jvp(f, (x,), (x,))[1])(x),
}


@pytest.mark.parametrize("operator", ["null_attention", "depth_route"])
def test_forward_mode_names_the_implementation_that_has_it(operator):
    x = jnp.linspace(-1.0, 1.0, 24).reshape(1, 4, 2, 3)
    calls = dict(
        null_attention=lambda x, **how: null_attention(x, x, x, **how).output.sum(),
        depth_route=lambda x, **how: depth_route(x, jnp.ones(3), **how).output.sum(),
    )
    call = calls[operator]
    message = f'implementation: {operator} has derivatives for reverse mode .* needs implementation="reference"'
    for form in FORWARD.values():
        with pytest.raises(TypeError, match=message):
            form(lambda x: call(x, implementation="xla"), x)
    with interpret_kernels(), pytest.raises(TypeError, match=message):
        FORWARD["jvp of jit"](lambda x: call(x, implementation="mosaic_tpu"), x)
    tangent = jax.jit(lambda x: jax.jvp(lambda x: call(x, implementation="reference"), (x,), (x,))[1])(x)
    gradient = jax.jit(jax.grad(lambda x: call(x, implementation="xla")))(x)
    np.testing.assert_allclose(tangent, jnp.vdot(gradient, x), rtol=1e-4)


def second_derivatives(operator):
    """A loss of x through every result, and ways to its second derivatives."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 3)).astype("f"))

    def loss(x, implementation):
        if operator == "null_attention":
            result = null_attention(x, 0.7 * x, x + 0.1, null_logit=0.2, implementation=implementation)
        else:
            gain = jnp.ones(3)
            result = depth_route(x, 0.3 * jnp.arange(3.0), key_norm_scale=gain, implementation=implementation)
        return sum((y**2).sum() for y in result)

    def ways(implementation):
        gradient = jax.grad(lambda x: loss(x, implementation))
        yield lambda: jax.jit(jax.hessian(lambda x: loss(x, implementation)))(x)
        yield lambda: jax.jit(lambda x: jax.jvp(gradient, (x,), (x,))[1])(x)
        yield lambda: jax.jit(jax.grad(lambda x: (gradient(x) ** 2).sum()))(x)

    return ways


@pytest.mark.parametrize("operator", ["null_attention", "depth_route"])
def test_second_derivatives_are_right_or_refused_by_name(operator):
    """jax.hessian, forward over reverse and reverse over reverse: plain JAX has them, kernels say who does."""
    ways = second_derivatives(operator)
    for found, wanted in zip(ways("xla"), ways("reference")):
        wanted = wanted()
        np.testing.assert_allclose(found(), wanted, atol=3e-6 * np.abs(wanted).max())
    with interpret_kernels():
        for found in ways("mosaic_tpu"):
            with pytest.raises(TypeError, match=f'implementation: {operator} by mosaic_tpu has .*"reference" or'):
                found()


# Of 13 keys of which the last is at the place of the last of 7 queries.
KEYS = np.arange(13)
UNSEEN = {
    "window": (dict(window=3), np.arange(13)[None] < 4),
    "pair_of_segments": (
        dict(segment_ids=(np.array([[0] * 7, [0, 0, 1, 1, 1, 5, 5]]), np.stack([KEYS % 3, KEYS // 3]))),
        np.stack([np.arange(13) % 3 != 0, ~np.isin(np.arange(13), [0, 1, 2, 3, 4, 5])]),
    ),
    "both": (
        dict(segment_ids=(np.full((2, 7), 2), np.stack([np.arange(13) % 3, np.full(13, 2)])), window=4),
        np.stack([(np.arange(13) % 3 != 2) | (np.arange(13) < 3), np.arange(13) < 3]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("implementation", [*PLAIN_JAX, "mosaic_tpu"])
@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_query_may_see_never_matters(name, implementation):
    options, unseen = UNSEEN[name]
    random, differentiate = np.random.default_rng(0), jax.value_and_grad
    q, k, v = (random.normal(size=(2, n, heads, 5)).astype("f") for n, heads in ((7, 4), (13, 2), (13, 2)))

    def loss(*arrays):
        result = null_attention(*arrays, **options, implementation=implementation)
        return sum((x**2).sum() for x in result), result

    with interpret_kernels() if implementation == "mosaic_tpu" else contextlib.nullcontext():
        run, found = jax.jit(differentiate(loss, (0, 1, 2), has_aux=True)), []
        for held in (0.0, np.nan, np.inf):
            spoiled = (np.where(unseen[..., None, None], np.float32(held), x) for x in (k, v))
            found.append(jax.tree.map(np.asarray, run(q, *spoiled)))
    for spoiled in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, spoiled, found[0])
    for gradient in found[0][1][1:]:
        assert not gradient[np.broadcast_to(unseen, (2, 13))].any()
        assert (np.abs(gradient).sum((2, 3)) > 0)[~np.broadcast_to(unseen, (2, 13))].all()


@pytest.mark.parametrize("as_list", [False, True], ids=["array", "list"])
@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_a_traced_number_of_sources_that_there_are_not_gives_nan(implementation, as_list):
    sources, query = np.ones((3, 2, 5, 7), np.float32), np.ones(7, np.float32)
    given = list(sources) if as_list else sources
    route = jax.jit(lambda live: depth_route(given, query, num_sources=live, implementation=implementation))
    for live in (0, 4, -1, 2**31 - 1):
        assert all(np.isnan(x).all() for x in route(live))
    assert all(np.isfinite(x).all() for x in route(2))


def test_explain_takes_shapes_everywhere():
    shape = lambda *sizes, dtype="float32": jax.ShapeDtypeStruct(sizes, dtype)
    explanation = explain(
        "null_attention", shape(2, 9, 6, 5), shape(2, 11, 3, 5), shape(2, 11, 3, 5), null_logit=shape(2, 9, 6),
        null_key=shape(4, 3, 5), null_value=shape(4, 3, 5), mask=shape(2, 1, 1, 11, dtype=bool),
        bias=shape(1, 6, 9, 11), query_offset=shape(2, dtype="int32"), kv_lengths=shape(2, dtype="int32"),
        segment_ids=(shape(2, 9, dtype="int32"), shape(2, 11, dtype="int32")), window=3,
    )  # fmt: skip
    assert explanation.implementation == "xla" and explanation.reasons["reference"] == ""
    sources = [shape(2, 5, 7)] * 3
    explanation = explain("depth_route", sources, shape(7), bias=shape(3), num_sources=shape(dtype="int32"))
    assert explanation.implementation == "xla"


MASKS = dict(
    mask=np.ones((1, 1, 1, 64), bool),
    bias=np.zeros((1, 1, 1, 64), "f"),
    query_offset=np.int32(3),
    kv_lengths=np.array([7, 64]),
)


@pytest.mark.parametrize("backend", ["cudnn", "mosaic_tpu"])
@pytest.mark.parametrize("name", MASKS)
def test_kernels_refuse_masks_by_name_and_auto_serves(monkeypatch, backend, name):
    x = jax.ShapeDtypeStruct((2, 64, 2, 64), jnp.bfloat16)
    device = H100 if backend == "cudnn" else AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        explanation = explain("null_attention", x, x, x, **{name: MASKS[name]})
    assert explanation.reasons[backend] == f"has no {name}" and explanation.implementation == "xla"


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_a_split_sequence_refuses_masks_by_name(implementation):
    sharding = OperatorSharding(AbstractMesh((2,), ("sequence",)), sequence="sequence")
    x = jnp.ones((2, 64, 2, 8))
    for name, value in MASKS.items():
        with pytest.raises(ValueError, match=f"has no {name} where sharding splits the sequence over sequence"):
            null_attention(x, x, x, sharding=sharding, implementation=implementation, **{name: value})


@pytest.mark.parametrize("operator, kernel", [("null_attention", "cudnn"), ("depth_route", "mosaic_gpu")])
def test_explain_on_a_mesh_without_a_sharding_names_what_serves(operator, kernel):
    """XLA cannot partition a kernel: where the arrays lie on several devices a plain JAX backend serves."""
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=H100)
    place = lambda *shape: jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data") if len(shape) > 1 else PartitionSpec())
    )
    arrays = dict(null_attention=(place(2, 64, 2, 64),) * 3, depth_route=([place(2, 128, 256)] * 3, place(256)))[
        operator
    ]
    alone, split = explain(operator, *arrays), explain(operator, *arrays, sharding=OperatorSharding(mesh, batch="data"))
    assert alone.device.platform == "gpu" and alone.implementation == "xla"
    assert "partition" in alone.reasons[kernel] or "jax 0.11.2" in alone.reasons[kernel]
    assert split.reasons[kernel] == "" or "jax 0.11.2" in split.reasons[kernel]


@pytest.mark.parametrize("operator", ["null_attention", "depth_route"])
def test_explicit_axes_are_refused_with_the_word_sharding_or_served_by_the_reference(operator):
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    place = lambda *shape: jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, PartitionSpec("data")))
    arrays = dict(null_attention=(place(2, 6, 2, 5),) * 3, depth_route=([place(2, 6, 8)] * 3, np.ones(8, "f")))[
        operator
    ]
    with jax.sharding.use_abstract_mesh(mesh):
        explanation = explain(operator, *arrays)
    assert explanation.implementation == "reference" and "sharding" in explanation.reasons["xla"]
