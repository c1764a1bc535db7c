"""Every implementation of null_attention against float64 autodiff of a plain definition, and named regressions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import merge_partials, null_attention
from pallas_kernels.dispatch import interpret_kernels

# Backends of accelerators run in their interpreter here; test_null_attention_gpu.py runs those for GPUs, which want
# other shapes and types.
INTERPRETED = ("mosaic_tpu",)
IMPLEMENTATIONS = (*INTERPRETED, "xla", "reference")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)


@pytest.fixture
def implementation(request):
    if request.param not in INTERPRETED:
        yield request.param
        return
    with interpret_kernels():
        yield request.param
    assert not races_found()


def races_found() -> bool:
    """Whether the TPU interpreter saw a kernel read what another part of it was writing."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races is not None and interpret_pallas_call.races.races_found


# batch, queries, keys, query heads, key heads, head size: odd and all different; 301 queries make several tiles and a
# ragged one
CASES = {
    "causal": dict(shape=(2, 13, 13, 3, 3, 5)),
    "grouped": dict(shape=(3, 37, 37, 6, 2, 7), null_logit=0.7),
    "one_key_head": dict(shape=(2, 11, 11, 3, 1, 5), null_logit=-np.inf),
    "decoding": dict(shape=(2, 7, 29, 6, 3, 5), per_head=True),
    "more_queries_than_keys": dict(shape=(2, 23, 11, 3, 1, 5)),
    "both_directions": dict(shape=(2, 17, 19, 6, 3, 7), is_causal=False, per_head=True),
    "window": dict(shape=(1, 23, 23, 3, 3, 5), window=4, null_logit=-1.5),
    "window_both_directions": dict(shape=(1, 19, 23, 3, 1, 5), window=5, is_causal=False),
    "segments": dict(shape=(2, 31, 31, 6, 2, 5), segments="one"),
    "segment_pair": dict(shape=(2, 19, 33, 3, 1, 7), segments="pair", is_causal=False, logit_softcap=3.0),
    "softcap_and_scale": dict(shape=(2, 21, 21, 6, 3, 5), logit_softcap=2.0, scale=1.3, per_head=True),
    "tiles": dict(shape=(1, 301, 301, 3, 1, 5), null_logit=2.5),
    "tiles_decoding_window_segments": dict(
        shape=(1, 301, 333, 6, 3, 5), window=77, segments="pair", logit_softcap=4.0, per_head=True
    ),
    "tiles_both_directions": dict(shape=(1, 165, 203, 3, 1, 7), is_causal=False),
}


def plain(query, key, value, b, *, is_causal=True, window=None, segment_ids=None, logit_softcap=None, scale=None):
    """The definition as it is written down: no maximum is subtracted, keys are repeated, the mask is counted out."""
    (_, length, heads, size), keys = query.shape, key.shape[1]
    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * (size**-0.5 if scale is None else scale)
    if logit_softcap is not None:
        scores = logit_softcap * jnp.tanh(scores / logit_softcap)
    allowed = np.ones((query.shape[0], 1, length, keys), bool)
    for i in range(length):
        for j in range(keys):
            distance = i + keys - length - j
            if ((is_causal or window) and distance < 0) or (window and distance >= window):
                allowed[:, :, i, j] = False
    if segment_ids is not None:
        allowed &= segment_ids[0][:, None, :, None] == segment_ids[1][:, None, None, :]
    e = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores, 0.0)), 0.0)
    total = e.sum(-1) + jnp.exp(b)[:, None]
    return jnp.einsum("bnts,bsnh->btnh", e / total[..., None], value), jnp.exp(b)[:, None] / total, jnp.log(total)


def make(shape, *, segments=None, per_head=False, null_logit=0.0, **options):
    """Arguments as float32 numpy arrays, the options, and one random cotangent for each result."""
    batch, length, keys, heads, key_heads, size = shape
    random = np.random.default_rng(sum(shape))
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    b = normal(heads) if per_head else np.float32(null_logit)
    arrays = (normal(batch, length, heads, size), *(normal(batch, keys, key_heads, size) for _ in range(2)), b)
    ids = [np.sort(random.integers(0, 3, (batch, n)), axis=1) for n in (length, keys)]
    if segments:
        options["segment_ids"] = (ids[0], ids[0]) if segments == "one" else tuple(ids)
    cotangents = (normal(batch, length, heads, size), normal(batch, heads, length), normal(batch, heads, length))
    return arrays, options, cotangents


def results_and_gradients(function, arrays, cotangents):
    """The three results and the gradients of query, key, value and null logit, through all three results at once."""

    def loss(arrays):
        results = function(*arrays)
        return sum(jnp.vdot(c, r) for c, r in zip(cotangents, results)), tuple(results)

    (_, results), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return results, gradients


def as_float64(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


@functools.cache
def expected(name):
    arrays, options, cotangents = make(**CASES[name])
    with jax.enable_x64(True):
        b = lambda b: jnp.broadcast_to(b, (arrays[0].shape[2],))
        results = results_and_gradients(
            lambda q, k, v, null: plain(q, k, v, b(null), **options), as_float64(arrays), as_float64(cotangents)
        )
        return jax.tree.map(np.asarray, results)


def assert_close(actual, wanted, tolerance):
    """The largest error, relative to the largest value."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@every_implementation
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equals_the_plain_definition(implementation, name, dtype):
    if implementation in INTERPRETED and dtype == "float64":
        with pytest.raises(ValueError, match="no float64"), jax.enable_x64(True):
            null_attention(*as_float64(make(**CASES[name])[0][:3]), implementation=implementation)
        return
    arrays, options, cotangents = make(**CASES[name])
    values, gradients = expected(name)
    one_array = CASES[name].get("segments") == "one"
    if one_array:
        options["segment_ids"] = options["segment_ids"][0]
    with jax.enable_x64(dtype == "float64"):
        convert = as_float64 if dtype == "float64" else lambda x: x
        function = lambda q, k, v, b: null_attention(q, k, v, null_logit=b, implementation=implementation, **options)
        actual_values, actual_gradients = results_and_gradients(function, convert(arrays), convert(cotangents))
    assert {x.dtype for x in (*actual_values, *actual_gradients)} == {jnp.dtype(dtype)}
    for actual, wanted in zip(actual_values, values):
        assert_close(actual, wanted, 1e-6 if dtype == "float32" else 1e-12)
    for actual, wanted in zip(actual_gradients, gradients):
        if np.isneginf(arrays[3]).all() and actual.shape == arrays[3].shape:
            assert np.all(np.asarray(actual) == 0)  # nothing moves a null that is left out
        else:
            assert_close(actual, wanted, 1e-5 if dtype == "float32" else 1e-12)


@every_implementation
def test_vmap_and_remat(implementation):
    arrays, options, _ = make(**CASES["tiles_decoding_window_segments"])
    query, key, value, b = arrays
    function = functools.partial(null_attention, implementation=implementation, **options)

    def loss(q, b):
        output, null_mass, lse = function(q, key, value, null_logit=b)
        return (output**2).sum() + (null_mass * lse).sum()

    queries, nulls = np.stack([query, 2 * query, -query]), np.stack([b, b + 1, b - 2])
    batched = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1))))(queries, nulls)
    # The interpreter cannot run under remat; the compilers' tests do that.
    remat = jax.jit(jax.value_and_grad(loss if implementation in INTERPRETED else jax.checkpoint(loss), (0, 1)))
    for i in range(3):
        for one, many in zip(jax.tree.leaves(remat(queries[i], nulls[i])), jax.tree.leaves(batched)):
            assert_close(many[i], one, 2e-6)


@every_implementation
@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2**-7), ("float16", 2**-10)])
def test_half_precision_keeps_its_statistics_in_float32(implementation, dtype, tolerance):
    arrays, options, cotangents = make(**CASES["grouped"])
    halves = [jnp.asarray(x, dtype) for x in arrays[:3]]
    exact = [np.asarray(x, np.float32) for x in halves]
    values, gradients = results_and_gradients(
        lambda *x: null_attention(*x, null_logit=0.7, implementation=implementation, **options),
        halves,
        (cotangents[0].astype(dtype), *cotangents[1:]),
    )
    assert values[0].dtype == dtype and values[1].dtype == values[2].dtype == jnp.float32
    with jax.enable_x64(True):
        wanted, wanted_gradients = results_and_gradients(
            lambda *x: plain(*x, jnp.full((6,), np.float32(0.7), jnp.float64), **options),
            as_float64(exact),
            as_float64(cotangents),
        )
    for actual, want in zip(values[1:], wanted[1:]):
        assert_close(actual, want, 1e-6)
    for actual, want in zip((values[0], *gradients), (wanted[0], *wanted_gradients)):
        assert actual.dtype == dtype
        assert_close(actual, want, 2 * tolerance)


def simple(scores, values, **options):
    """One query whose scores against the keys are exactly `scores`, over one head of size 1."""
    column = lambda x: jnp.asarray(x, jnp.float32).reshape(1, -1, 1, 1)
    return null_attention(column([1.0]), column(scores), column(values), scale=1.0, **options)


@every_implementation
@pytest.mark.parametrize("scores", [[3.0], [-2.0, 4.0], [-5.0, -7.0], [30.0, 2.0]])
def test_the_one_in_the_denominator_becomes_exp_of_minus_max(implementation, scores):
    values = np.arange(1.0, 1.0 + len(scores))
    output, null_mass, lse = simple(scores, values, implementation=implementation)
    total = 1.0 + np.exp(scores).sum()
    np.testing.assert_allclose(output[0, 0, 0, 0], np.exp(scores) @ values / total, rtol=1e-6)
    np.testing.assert_allclose(null_mass[0, 0, 0], 1.0 / total, rtol=1e-5)
    np.testing.assert_allclose(lse[0, 0, 0], np.log(total), rtol=1e-6)


@every_implementation
def test_scores_of_plus_and_minus_ten_thousand(implementation):
    def both(key, b):
        return null_attention(
            jnp.full((1, 1, 1, 1), 100.0), key, value, null_logit=b, scale=1.0, implementation=implementation
        )

    value = jnp.arange(1.0, 4.0).reshape(1, 3, 1, 1)
    for sign, output, null_mass, lse in ((1, 2.0, 0.0, 1e4 + np.log(3.0)), (-1, 0.0, 1.0, 0.0)):
        key = jnp.full((1, 3, 1, 1), sign * 100.0)
        result = both(key, 0.0)
        np.testing.assert_allclose([x.item() for x in result], [output, null_mass, lse], rtol=1e-6)
        for gradient in jax.tree.leaves(jax.jacobian(both, (0, 1))(key, 0.0)):
            assert np.isfinite(gradient).all()
    mixed = both(jnp.array([100.0, -100.0, 100.0]).reshape(1, 3, 1, 1), 0.0)
    np.testing.assert_allclose([x.item() for x in mixed[:2]], [2.0, 0.0], rtol=1e-6)


@every_implementation
@pytest.mark.parametrize("score", [-20.0, -40.0, -80.0])
def test_attention_mass_survives_a_null_mass_of_nearly_one(implementation, score):
    output, null_mass, lse = simple([score, score], [1.0, 1.0], implementation=implementation)
    mass = 2.0 * np.exp(score)  # far below the spacing of float32 numbers at 1
    assert null_mass.item() == 1.0
    np.testing.assert_allclose(output.item(), mass, rtol=2e-6)
    np.testing.assert_allclose(lse.item(), mass, rtol=2e-6)
    if implementation != "reference":  # autodiff of the plain form takes omega - omega**2 and loses the difference
        slope = jax.grad(
            lambda b: simple([score] * 2, [1.0] * 2, null_logit=b, implementation=implementation).null_mass.sum()
        )(0.0)
        np.testing.assert_allclose(slope, mass, rtol=2e-6)


@every_implementation
@pytest.mark.parametrize("null_logit", [0.0, 1.7, -np.inf])
def test_rows_without_a_key(implementation, null_logit):
    (query, key, value, _), _, cotangents = make(shape=(2, 45, 45, 6, 2, 7))
    # The first nine queries see nothing.
    ids = (np.zeros((2, 45), np.int32), np.where(np.arange(45) < 9, 1, 0)[None].repeat(2, 0))

    def function(q, k, v, b):
        result = null_attention(q, k, v, null_logit=b, segment_ids=ids, implementation=implementation)
        return result._replace(lse=jnp.where(jnp.isneginf(result.lse), 0.0, result.lse))

    arrays = (query, key, value, np.float32(null_logit))
    (output, null_mass, lse), gradients = results_and_gradients(function, arrays, cotangents)
    finite = np.isfinite(null_logit)
    assert np.all(np.asarray(output[:, :9]) == 0)
    assert np.all(np.asarray(null_mass[:, :, :9]) == (1.0 if finite else 0.0))
    np.testing.assert_allclose(lse[:, :, :9], null_logit if finite else 0.0)
    raw = null_attention(query, key, value, null_logit=null_logit, segment_ids=ids, implementation=implementation)
    assert np.all(np.asarray(raw.lse[:, :, :9]) == np.float32(null_logit))
    assert all(np.isfinite(x).all() for x in gradients)
    assert np.all(np.asarray(gradients[0][:, :9]) == 0) and np.all(np.asarray(gradients[1][:, :9]) == 0)
    kept = null_attention(query[:, 9:], key[:, 9:], value[:, 9:], null_logit=null_logit, implementation=implementation)
    assert_close(output[:, 9:], kept.output, 1e-6)


@every_implementation
def test_loss_on_the_null_mass_alone_and_rows_with_zero_output_gradient(implementation):
    (query, key, value, b), _, cotangents = make(**CASES["grouped"])
    only_null = (np.zeros_like(cotangents[0]), cotangents[1], np.zeros_like(cotangents[2]))
    third = (np.arange(37) % 3 == 0)[None, :, None, None]
    some_rows = (cotangents[0] * third, np.zeros_like(cotangents[1]), only_null[2])
    for chosen in (only_null, some_rows):
        _, gradients = results_and_gradients(
            lambda q, k, v, b: null_attention(q, k, v, null_logit=b, implementation=implementation),
            (query, key, value, b),
            chosen,
        )
        with jax.enable_x64(True):
            _, wanted = results_and_gradients(
                lambda q, k, v, b: plain(q, k, v, jnp.broadcast_to(b, (6,))),
                as_float64((query, key, value, b)),
                as_float64(chosen),
            )
        for gradient, want in zip(gradients, wanted):
            assert_close(gradient, want, 1e-5)


@every_implementation
def test_minus_infinity_is_jax_softmax(implementation):
    (query, key, value, _), _, _ = make(shape=(2, 35, 35, 6, 2, 7))
    result = jax.jit(functools.partial(null_attention, implementation=implementation))(
        query, key, value, null_logit=-jnp.inf
    )
    assert_close(result.output, jax.nn.dot_product_attention(query, key, value, is_causal=True), 1e-6)
    assert np.all(np.asarray(result.null_mass) == 0)


@every_implementation
def test_no_keys_at_all(implementation):
    query, empty = jnp.ones((2, 3, 6, 5)), jnp.ones((2, 0, 2, 5))
    result = null_attention(query, empty, empty, implementation=implementation)
    assert np.all(np.asarray(result.output) == 0) and np.all(np.asarray(result.null_mass) == 1)


@every_implementation
@pytest.mark.parametrize("rows", [1, 3])
def test_decoding_against_a_preallocated_cache_with_a_live_length(implementation, rows):
    """Old keys by a mask of segment ids, the new rows' own keys causally; both without a null, which is added once."""
    (query, key, value, b), _, _ = make(shape=(2, rows, 29, 6, 3, 5), per_head=True)
    live = 17
    wanted = null_attention(query, key[:, :live], value[:, :live], null_logit=b, implementation="reference")

    @jax.jit
    def step(key, value, live):
        call = functools.partial(null_attention, null_logit=-jnp.inf, implementation=implementation)
        ids = (
            jnp.zeros((2, rows), jnp.int32),
            jnp.broadcast_to(jnp.arange(29) >= live - rows, (2, 29)).astype(jnp.int32),
        )
        old = call(query, key, value, is_causal=False, segment_ids=ids)
        new = call(query, *(jax.lax.dynamic_slice_in_dim(x, live - rows, rows, 1) for x in (key, value)))
        return merge_partials([old.output, new.output], [old.lse, new.lse], null_logit=b)

    dead = (np.arange(29) >= live)[None, :, None, None]
    for actual, want in zip(step(np.where(dead, 1e4, key), np.where(dead, 1e4, value), live), wanted):
        assert_close(actual, want, 1e-6)


@every_implementation
def test_decoding_against_an_empty_cache_gives_everything_to_the_null(implementation):
    cache, ids = jnp.full((2, 29, 2, 5), 7.0), (jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 29), jnp.int32))
    result = null_attention(
        jnp.ones((2, 1, 6, 5)), cache, cache, is_causal=False, segment_ids=ids, implementation=implementation
    )
    for actual, wanted in ((result.output, 0), (result.null_mass, 1), (result.lse, 0)):
        assert np.all(np.asarray(actual) == wanted)


def compiled(length, **options):
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (2, 1, 1)]
    loss = lambda *x: (null_attention(*x, implementation="xla", **options).output ** 2).sum()
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*shapes)


@pytest.mark.parametrize("options", [{}, {"window": 100}], ids=["causal", "window"])
def test_memory_is_linear_in_the_length(options):
    memory = {
        length: compiled(length, **options).compile().memory_analysis().temp_size_in_bytes for length in (2048, 4096)
    }
    assert memory[4096] < 4096 * 4096 * 4 / 2
    assert memory[4096] < 2.2 * memory[2048]


def test_the_program_does_not_grow_with_the_length():
    assert len(compiled(32768).as_text()) < 1.3 * len(compiled(2048).as_text())


@pytest.mark.parametrize(
    "argument, change",
    [
        ("query", dict(query=np.ones((2, 9, 30), np.float32))),
        ("query", dict(query=np.ones((2, 9, 0, 5), np.float32))),
        ("query", dict(query=np.ones((2, 9, 6, 5), np.int32))),
        ("key", dict(key=np.ones((2, 9, 3, 5), np.float16))),
        ("key", dict(key=np.ones((2, 9, 3, 7), np.float32), value=np.ones((2, 9, 3, 7), np.float32))),
        ("key", dict(key=np.ones((2, 9, 4, 5), np.float32), value=np.ones((2, 9, 4, 5), np.float32))),
        ("value", dict(value=np.ones((2, 8, 3, 5), np.float32))),
        ("null_logit", dict(null_logit=np.zeros(3))),
        ("is_causal", dict(is_causal=None)),
        ("window", dict(window=0)),
        ("window", dict(window=-4)),
        ("window", dict(window=2.0)),
        ("logit_softcap", dict(logit_softcap=-1.0)),
        ("logit_softcap", dict(logit_softcap=0.0)),
        ("scale", dict(scale="1")),
        ("segment_ids", dict(segment_ids=np.zeros((2, 8), np.int32))),
        ("segment_ids", dict(segment_ids=np.zeros((2, 9), np.float32))),
        ("segment_ids", dict(segment_ids=(np.zeros((2, 9), np.int32),) * 3)),
        ("implementation", dict(implementation="xal")),
    ],
)
def test_bad_arguments_are_named(argument, change):
    arguments = dict(
        query=np.ones((2, 9, 6, 5), np.float32),
        key=np.ones((2, 9, 3, 5), np.float32),
        value=np.ones((2, 9, 3, 5), np.float32),
    )
    with pytest.raises(ValueError, match=f"^{argument}: .*(got|there are)"):
        null_attention(**arguments | change)
