"""What a null can be and what can hide keys: every backend against float64 autodiff of the plain definition."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import null_attention
from pallas_kernels.dispatch import interpret_kernels
from pallas_kernels.null_attention import xla_masked

_spec = importlib.util.spec_from_file_location(
    "plain_attention", pathlib.Path(__file__).with_name("plain_attention.py")
)
suite = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(suite)

INTERPRETED = ("mosaic_tpu",)
PLAIN_JAX = ("xla", "reference")


@pytest.fixture
def implementation(request):
    """A backend, in its interpreter where it is an accelerator's."""
    if request.param not in INTERPRETED:
        yield request.param
        return
    with interpret_kernels():
        yield request.param


# The interpreter takes seconds a call: one case of each test in the fast suite.
interpreted = pytest.mark.parametrize("implementation", INTERPRETED, indirect=True)
plain_jax = pytest.mark.parametrize("implementation", PLAIN_JAX, indirect=True)
slow = lambda name: pytest.param(name, marks=pytest.mark.slow)
every_implementation = pytest.mark.parametrize("implementation", [*map(slow, INTERPRETED), *PLAIN_JAX], indirect=True)
mostly_xla = pytest.mark.parametrize("implementation", ["xla", slow("reference")], indirect=True)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles on both sides, ragged ones among them."""
    monkeypatch.setattr(xla_masked, "_ROWS", 8)
    monkeypatch.setattr(xla_masked, "_COLUMNS", 11)


# batch, queries, keys, query heads, key heads, head size
NULLS = {
    "per_query": dict(shape=(2, 13, 13, 6, 3, 5), null="per_query"),
    "value_per_head": dict(shape=(2, 11, 17, 6, 2, 5), null_values=0),
    "key": dict(shape=(3, 13, 13, 4, 2, 7), null_keys=0, logit_softcap=1.5),
    "key_and_value_per_query": dict(
        shape=(2, 19, 19, 6, 3, 5), null="per_query", null_keys=1, null_values=1, window=4, scale=0.7
    ),
    "several_keys_and_values": dict(shape=(2, 17, 23, 6, 2, 5), null_keys=3, null_values=3, segments=True),
    "several_keys_without_values": dict(shape=(2, 7, 9, 3, 1, 5), null=-0.7, null_keys=2, is_causal=False),
}

MASKS = {
    "mask_of_every_pair": dict(shape=(2, 13, 19, 6, 3, 5), mask=(1, 1, 1, 1), is_causal=False),
    "padding_mask": dict(shape=(3, 13, 13, 6, 2, 5), mask=(1, 0, 0, 1)),
    "mask_by_head_and_query": dict(shape=(2, 9, 31, 4, 2, 5), mask=(0, 1, 1, 0), null="per_query", null_values=0),
    "bias_of_every_pair": dict(shape=(2, 21, 21, 6, 3, 5), bias=(1, 1, 1, 1), logit_softcap=1.5),
    "bias_of_keys": dict(shape=(2, 13, 29, 6, 3, 5), bias=(1, 0, 0, 1), is_causal=False),
    "bias_by_head_beside_everything": dict(
        shape=(2, 19, 23, 6, 2, 5), bias=(0, 1, 1, 1), mask=(1, 0, 1, 1), segments=True, window=7, null_keys=2
    ),
    "bias_of_queries": dict(shape=(2, 9, 13, 3, 1, 5), bias=(1, 1, 1, 0)),
    "offset": dict(shape=(2, 11, 37, 6, 3, 5), query_offset=3),
    "offset_by_row_and_window": dict(shape=(3, 11, 37, 4, 2, 5), query_offset=np.array([5, -4, 40]), window=6),
    "lengths": dict(shape=(3, 5, 37, 6, 3, 5), kv_lengths=np.array([9, 0, 37]), bias=(0, 1, 0, 1)),
    "lengths_and_offset": dict(
        shape=(2, 13, 41, 6, 2, 5), kv_lengths=np.array([23, 17]), query_offset=np.array([7, 2])
    ),
    "lengths_in_both_directions": dict(shape=(2, 9, 31, 4, 4, 5), kv_lengths=np.array([13, 1]), is_causal=False),
    "one_query_against_a_cache": dict(
        shape=(3, 1, 45, 6, 2, 5), kv_lengths=np.array([1, 30, 45]), null_keys=2, null_values=2
    ),
}
# What other cases have too.
SELDOM = ("bias_of_queries", "lengths_in_both_directions", "padding_mask", "offset", "bias_of_keys")


def call(implementation, options):
    return lambda arrays: null_attention(
        *(arrays[name] for name in suite.NAMES[:3]),
        **{name: arrays[name] for name in suite.NAMES[3:] if name in arrays},
        implementation=implementation,
        **options,
    )


@functools.cache
def wanted(table, name):
    return suite.expected(*suite.make(**{"nulls": NULLS, "masks": MASKS}[table][name]))


def compare(implementation, table, name, dtype):
    arrays, options, cotangents = suite.make(**{"nulls": NULLS, "masks": MASKS}[table][name])
    convert = suite.as_float64 if dtype == "float64" else lambda x: x
    with jax.enable_x64(dtype == "float64"):
        values, gradients = suite.results_and_gradients(
            call(implementation, options), convert(arrays), convert(cotangents)
        )
    right, right_gradients = wanted(table, name)
    for what, actual, want in zip(("output", "null_mass", "lse"), values, right):
        assert actual.dtype == dtype
        suite.assert_close(actual, want, 1e-6 if dtype == "float32" else 1e-12, what)
    assert set(gradients) == set(right_gradients)
    for what in gradients:
        assert gradients[what].dtype == dtype
        suite.assert_close(gradients[what], right_gradients[what], 1e-5 if dtype == "float32" else 1e-12, what)


@every_implementation
@pytest.mark.parametrize("name", NULLS)
def test_every_null_equals_the_plain_definition(implementation, name):
    compare(implementation, "nulls", name, "float32" if implementation in INTERPRETED else "float64")


@interpreted
def test_nulls_outside_of_an_interpreted_kernel(implementation):
    compare(implementation, "nulls", "key_and_value_per_query", "float32")


@mostly_xla
@pytest.mark.parametrize("name", [slow(name) if name in SELDOM else name for name in MASKS])
def test_every_mask_equals_the_plain_definition(small_tiles, implementation, name):
    compare(implementation, "masks", name, "float64")


@plain_jax
@pytest.mark.slow
@pytest.mark.parametrize("table, name", [*(("nulls", name) for name in NULLS), *(("masks", name) for name in MASKS)])
def test_everything_in_float32(small_tiles, implementation, table, name):
    compare(implementation, table, name, "float32")


@pytest.mark.parametrize("table, name", [("masks", "bias_by_head_beside_everything"), ("nulls", "per_query")])
def test_float32_in_tiles_of_the_usual_size(table, name):
    compare("xla", table, name, "float32")


@pytest.mark.parametrize(
    "dtype, tolerance", [("bfloat16", 2**-7), pytest.param("float16", 2**-10, marks=pytest.mark.slow)]
)
@mostly_xla
def test_half_precision(implementation, dtype, tolerance):
    arrays, options, cotangents = suite.make(**NULLS["several_keys_and_values"])
    halves = {name: x if name == "null_logit" else jnp.asarray(x, dtype) for name, x in arrays.items()}
    cotangents = (cotangents[0].astype(dtype), *cotangents[1:])
    values, gradients = suite.results_and_gradients(call(implementation, options), halves, cotangents)
    right, right_gradients = suite.expected(
        jax.tree.map(lambda x: np.asarray(x, np.float32), halves), options, cotangents
    )
    assert [x.dtype for x in values] == [dtype, np.float32, np.float32]
    suite.assert_close(values[0], right[0], 2 * tolerance)
    for actual, want in zip(values[1:], right[1:]):
        suite.assert_close(actual, want, 2e-6)
    for name in gradients:
        assert gradients[name].dtype == halves[name].dtype
        suite.assert_close(gradients[name], right_gradients[name], 4 * tolerance, name)


@plain_jax
def test_traced_lengths_beyond_the_cache_count_as_its_ends(implementation):
    arrays, _, _ = suite.make(shape=(2, 3, 13, 2, 1, 5))
    attend = lambda lengths: call(implementation, dict(kv_lengths=lengths))(arrays)
    for actual, want in zip(jax.jit(attend)(np.array([-3, 99])), attend(np.array([0, 13]))):
        suite.assert_close(actual, want, 1e-6)


@mostly_xla
def test_vmap_over_offsets_lengths_and_biases(implementation):
    arrays, _, _ = suite.make(shape=(2, 5, 13, 4, 2, 5), bias=(0, 1, 1, 1))
    offsets, lengths = np.array([3, -1]), np.array([[9, 13], [2, 5]])
    biases = np.stack([arrays["bias"], -arrays["bias"]])

    def loss(bias, offset, lengths):
        options = dict(query_offset=offset, kv_lengths=lengths)
        output, null_mass, lse = call(implementation, options)(arrays | {"bias": bias})
        return (output**2).sum() + (null_mass * lse).sum()

    one = jax.jit(jax.value_and_grad(loss))
    many = jax.jit(jax.vmap(jax.value_and_grad(loss)))(biases, offsets, lengths)
    for i in range(2):
        for actual, want in zip(many, one(biases[i], offsets[i], lengths[i])):
            suite.assert_close(actual[i], want, 2e-6)


# Keys that no query of their head sees: which, and how the call says so.
def _ids(batch, length, value):
    return np.full((batch, length), value)


UNSEEN = {
    "segments": (dict(segment_ids=(_ids(2, 5, 0), np.arange(13)[None].repeat(2, 0) % 3)), np.arange(13) % 3 != 0),
    "window": (dict(window=3), np.arange(13) < 6),
    "lengths": (dict(kv_lengths=np.array([7, 7])), np.arange(13) >= 7),
    "mask": (dict(mask=(np.arange(13) % 2 == 0)[None, None, None], is_causal=False), np.arange(13) % 2 == 1),
    "offset": (dict(query_offset=2), np.arange(13) > 6),
}


@mostly_xla
@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_query_may_see_never_matters(small_tiles, implementation, name):
    options, unseen = UNSEEN[name]
    arrays, _, cotangents = suite.make(shape=(2, 5, 13, 4, 2, 5), null_keys=1, null_values=1)
    function, found = suite.differentiated(call(implementation, options)), {}
    for held in (0.0, np.nan, np.inf):
        spoiled = {x: np.where(unseen[None, :, None, None], held, arrays[x]).astype("f") for x in ("key", "value")}
        found[held] = function(arrays | spoiled, cotangents)
    for held in (np.nan, np.inf):
        for actual, want in zip(jax.tree.leaves(found[held]), jax.tree.leaves(found[0.0])):
            np.testing.assert_array_equal(actual, want)
    gradients = found[0.0][1]
    assert not gradients["key"][:, unseen].any() and not gradients["value"][:, unseen].any()


@plain_jax
def test_a_key_that_only_another_head_may_see_never_matters(implementation):
    arrays, _, cotangents = suite.make(shape=(2, 5, 13, 4, 2, 5))
    mask = np.ones((1, 4, 1, 13), bool)
    mask[:, 2:, :, 7] = False  # both query heads of the second key head
    function, found = suite.differentiated(call(implementation, dict(mask=mask))), []
    for held in (0.0, np.nan):
        spoiled = {x: arrays[x].copy() for x in ("key", "value")}
        for x in spoiled.values():
            x[:, 7, 1] = held
        found.append(function(arrays | spoiled, cotangents))
    for actual, want in zip(*map(jax.tree.leaves, found)):
        np.testing.assert_array_equal(actual, want)


FORMS = ("scalar", "per_head", "per_query", "null_key")


def extreme_null(form, b) -> dict:
    shapes = dict(scalar=(), per_head=(4,), per_query=(2, 5, 4), null_key=())
    null = dict(null_logit=np.full(shapes[form], b, np.float32))
    if form == "null_key":
        null["null_key"] = np.zeros((1, 2, 7), np.float32)
    if form != "scalar":
        null["null_value"] = np.arange(14.0, dtype=np.float32).reshape(1, 2, 7)
    return null


def check_extremes(implementation, form):
    """Five queries of which the first two see no key."""
    arrays, _, cotangents = suite.make(shape=(2, 5, 3, 4, 2, 7))
    arrays["query"], arrays["key"] = 0.3 * arrays["query"], 0.3 * arrays["key"]
    function = suite.differentiated(call(implementation, {}))
    v0 = 0.0 if form == "scalar" else np.repeat(np.arange(14.0).reshape(2, 7), 2, axis=0)
    for b in (np.inf, 100.0, -np.inf):
        (output, null_mass, lse), gradients = function(arrays | extreme_null(form, b), cotangents)
        assert all(np.isfinite(x).all() for x in (output, null_mass, *gradients.values()))
        rows = slice(None) if b > 0 else slice(0, 2)  # a null of 100 takes everything from scores of about 0
        np.testing.assert_allclose(output[:, rows], np.broadcast_to((b > 0) * v0, output[:, rows].shape), rtol=1e-6)
        np.testing.assert_allclose(null_mass[:, :, rows], float(b > 0), rtol=1e-6)
        np.testing.assert_allclose(lse[:, :, rows], b, rtol=1e-6)
        if b == 100.0 and form != "null_key":  # every lse is b: its derivative passes through whole
            through = cotangents[2].swapaxes(1, 2)
            wanted = {"scalar": through.sum(), "per_head": through.sum((0, 1)), "per_query": through}[form]
            suite.assert_close(gradients["null_logit"], wanted, 1e-5)
        if b == -np.inf:
            assert not null_mass.any() and not any(gradients[name].any() for name in gradients if "null" in name)
            assert not gradients["query"][:, :2].any()
            softmax = call("reference", {})(arrays | {"null_logit": b})
            suite.assert_close(output, softmax.output, 1e-6)


@mostly_xla
@pytest.mark.parametrize("form", FORMS)
def test_extremes_of_the_null_logit(implementation, form):
    check_extremes(implementation, form)


@interpreted
@pytest.mark.parametrize("form", [*map(slow, FORMS[:3]), "null_key"])
def test_extremes_of_the_null_logit_around_a_kernel(implementation, form):
    check_extremes(implementation, form)


@pytest.mark.parametrize("score", [-20.0, pytest.param(-80.0, marks=pytest.mark.slow)])
@every_implementation
def test_attention_mass_survives_a_null_per_query_of_nearly_one(implementation, score):
    column = lambda *x: jnp.asarray(x, jnp.float32).reshape(1, -1, 1, 1)

    def attend(b):
        return null_attention(
            column(1.0), column(score, score), column(1.0, 1.0), null_logit=b, scale=1.0, implementation=implementation
        )

    output, null_mass, lse = attend(jnp.zeros((1, 1, 1)))
    mass = 2.0 * np.exp(score)
    assert null_mass.item() == 1.0
    np.testing.assert_allclose([output.item(), lse.item()], mass, rtol=5e-6)
    slope = jax.jit(jax.grad(lambda b: attend(b).null_mass.sum()))(jnp.zeros((1, 1, 1)))
    np.testing.assert_allclose(slope, mass, rtol=5e-6)


@plain_jax
@pytest.mark.parametrize("shape", [(0, 5, 7, 4, 2, 3), (2, 0, 7, 4, 2, 3), (2, 5, 0, 4, 2, 3)], ids=["B", "T", "S"])
@pytest.mark.parametrize("extras", [{}, dict(null="per_query", null_keys=2, null_values=2, bias=(1, 1, 1, 1))])
def test_nothing_to_do(implementation, shape, extras):
    arrays, options, cotangents = suite.make(shape=shape, **extras)
    values, gradients = suite.results_and_gradients(call(implementation, options), arrays, cotangents)
    assert [x.shape for x in values] == [x.shape for x in cotangents]
    assert {name: x.shape for name, x in gradients.items()} == {name: np.shape(x) for name, x in arrays.items()}
    assert np.all(values[1] == 1.0) and all(np.isfinite(x).all() for x in gradients.values())


@pytest.mark.parametrize("options", [{}, dict(kv_lengths=np.array([700, 9001])), dict(query_offset=8000)])
def test_a_cache_is_read_in_place(options):
    """32769 keys: no multiple of any tile, and nothing as large as the keys beside them."""
    shapes = [jax.ShapeDtypeStruct((2, n, heads, 8), jnp.float32) for n, heads in ((1, 4), (32769, 2), (32769, 2))]
    attend = jax.jit(functools.partial(null_attention, implementation="xla", **options))
    memory = attend.lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 32769 * 2 * 8 * 4 / 8
