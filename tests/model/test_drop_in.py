"""The operator inside Flax' multi-head attention and under JAX' signature: against both libraries where there is no
null, against the plain definition in float64 where there is one.
"""

import inspect
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sampling import sampled

from oasis_jax import attention_fn, dot_product_attention

HEADS, SIZE, WIDTH = 3, 5, 7
NONE = -np.inf


def normal(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype(np.float32)


def softmax_with_null(scores, seen, null_logit):
    """Probabilities [..., N, T, S] in float64, b [N] or [..., N, T]: nothing is subtracted."""
    b = np.asarray(null_logit, np.float64)
    b = b[..., :, None] if b.ndim == 1 else b
    e = np.where(seen, np.exp(scores), 0.0)
    return e / (np.exp(b)[..., None] + e.sum(-1, keepdims=True))


def nnx_attention(function, **options):
    options = dict(num_heads=HEADS, in_features=WIDTH, qkv_features=HEADS * SIZE, decode=False) | options
    options |= {} if function is None else dict(attention_fn=function)
    module = nnx.MultiHeadAttention(**options, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    return graphdef, jax.tree.map(lambda x: x + 0.1 * normal(*x.shape), state)


def compare(run, functions, *arrays, tolerance=3e-6):
    """Outputs and gradients of `run(function, *arrays)` for two attention functions."""
    found = []
    for function in functions:
        loss = lambda *arrays, function=function: (lambda y: ((y**3).sum(), y))(run(function, *arrays))
        (_, output), gradients = jax.jit(jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True))(*arrays)
        found.append((output, gradients))
    scale = max(np.abs(x).max() for x in jax.tree.leaves(found[1]))  # a bias of keys has gradient 0 without a null
    for ours, theirs in zip(*map(jax.tree.leaves, found)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)


BATCHES = {
    "one_batch_dimension": (2,),
    "several": (2, 1, 3),
    "none": (),
}


def masks(batch, length, keys):
    """By name; every query sees its own key."""
    random = np.random.default_rng(1)
    full = random.random((*batch, HEADS, length, keys)) < 0.6
    full[..., np.arange(length), np.arange(length)] = True
    padding = np.arange(keys) < keys - 2
    return {
        "none": None,
        "boolean_of_every_pair": full,
        "zeros_and_ones": full.astype(np.float32),
        "padding": np.broadcast_to(padding, (*batch, 1, 1, keys)),
        "without_batch": full[(0,) * len(batch)],
    }


@pytest.mark.parametrize(
    "case",
    sampled(
        ["-".join(case) for case in itertools.product(BATCHES, masks((), 6, 6))],
        ("one_batch_dimension-zeros_and_ones", "several-padding", "none-without_batch"),
    ),
)
def test_nnx_equals_its_own_attention_without_a_null(case):
    if case == "several-without_batch":
        pytest.skip("Flax reshapes such a mask and fails")
    batch, _, name = case.partition("-")
    batch = BATCHES[batch]
    x, mask = normal(*batch, 6, WIDTH), masks(batch, 6, 6)[name]
    graphdef, state = nnx_attention(None)

    def run(function, state, x):
        module = nnx.merge(graphdef, state)
        if function is not None:
            module.attention_fn = function
        return module(x, mask=mask)

    compare(run, (attention_fn(null_logit=NONE), None), state, x)


@pytest.mark.parametrize("causal", [False, True])
def test_nnx_cross_attention_to_grouped_keys_counts_from_the_first(causal):
    """Queries from one sequence, keys and values from another; causal from the top left, as Flax has it."""
    graphdef, state = nnx_attention(None, num_kv_heads=1, in_kv_features=4)
    x, context = normal(2, 6, WIDTH), normal(2, 9, 4)

    def run(function, state, x, context):
        module = nnx.merge(graphdef, state)
        if function is not None:
            module.attention_fn = function
        return module(x, context, is_causal=causal)

    compare(run, (attention_fn(null_logit=NONE), None), state, x, context)


@pytest.mark.parametrize("batch", sampled(BATCHES, ("several",)))
def test_linen_equals_its_own_attention_without_a_null(batch):
    batch = BATCHES[batch]
    x, context = normal(*batch, 6, WIDTH), normal(*batch, 9, 4)
    mask = masks(batch, 6, 9)["zeros_and_ones"]
    options = dict(num_heads=HEADS, qkv_features=HEADS * SIZE, normalize_qk=True)
    params = nn.MultiHeadDotProductAttention(**options).init(jax.random.key(0), x, context)

    def run(function, params, x, context):
        given = {} if function is None else dict(attention_fn=function)
        return nn.MultiHeadDotProductAttention(**options, **given).apply(params, x, context, mask=mask)

    compare(run, (attention_fn(null_logit=NONE), None), params, x, context)


def test_both_decode_against_their_cache():
    x = normal(2, 6, WIDTH)

    def with_nnx(function):
        graphdef, state = nnx_attention(function, decode=True)
        module = nnx.merge(graphdef, state)
        module.init_cache(x.shape)
        step = nnx.jit(lambda module, x: module(x))
        return jnp.concatenate([step(module, x[:, i : i + 1]) for i in range(6)], axis=1)

    def with_linen(function):
        given = {} if function is None else dict(attention_fn=function)
        module = nn.MultiHeadDotProductAttention(num_heads=HEADS, qkv_features=HEADS * SIZE, decode=True, **given)
        variables, outputs = module.init(jax.random.key(0), x), []
        step = jax.jit(lambda variables, x: module.apply(variables, x, mutable=["cache"]))
        for i in range(6):
            output, cache = step(variables, x[:, i : i + 1])
            variables = variables | cache
            outputs.append(output)
        return jnp.concatenate(outputs, axis=1)

    for run in (with_nnx, with_linen):
        np.testing.assert_allclose(run(attention_fn(null_logit=NONE)), run(None), atol=1e-5)
        assert np.abs(run(attention_fn()) - run(None)).max() > 1e-3


@pytest.mark.parametrize("implementation", sampled(["xla", "reference"], ("xla",)))
@pytest.mark.parametrize("null", ["softmax1", "per_head", "per_query"])
@pytest.mark.parametrize("batch", sampled(BATCHES, ("several", "none")))
def test_with_a_null_it_is_the_definition(batch, null, implementation):
    """Bias and mask too, and a query that sees no key."""
    batch = BATCHES[batch]
    query = normal(*batch, 6, HEADS, SIZE)
    key, value = normal(*batch, 8, HEADS, SIZE, seed=1), normal(*batch, 8, HEADS, SIZE, seed=2)
    bias, mask = normal(HEADS, 1, 8), masks(batch, 6, 8)["boolean_of_every_pair"]
    mask[..., 2, :] = False
    logit = {"softmax1": np.zeros(HEADS), "per_head": normal(HEADS), "per_query": normal(*batch, 6, HEADS)}[null]
    scores = np.einsum("...tnh,...snh->...nts", query.astype(np.float64), key) / math.sqrt(SIZE) + bias
    p = softmax_with_null(scores, mask, np.moveaxis(logit, -1, -2) if null == "per_query" else logit)
    expected = np.einsum("...nts,...snh->...tnh", p, value)
    given = 0.0 if null == "softmax1" else logit
    function = attention_fn(null_logit=given, implementation=implementation)
    found = jax.jit(lambda *x: function(*x, bias, mask, dropout_rate=0.1, deterministic=True))(query, key, value)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not np.asarray(found)[..., 2, :, :].any()


def test_a_learned_null_is_a_parameter_of_the_module():
    """In NNX by handing over a Param, in Linen by the parameter of the module around; gradients by differences."""
    x, start = normal(2, 6, WIDTH), normal(HEADS)
    keys = normal(2, HEADS, SIZE)
    graphdef, state = nnx_attention(attention_fn(null_logit=nnx.Param(start), null_key=nnx.Param(keys[0])))
    assert state["attention_fn"]["null_logit"].get_value().shape == (HEADS,)
    loss = jax.jit(lambda state: (nnx.merge(graphdef, state)(x) ** 2).sum())
    gradient = jax.grad(loss)(state)["attention_fn"]

    class Around(nn.Module):
        @nn.compact
        def __call__(self, x):
            null = self.param("null", lambda _: jnp.asarray(start))
            function = attention_fn(null_logit=null, null_key=keys[0])
            return nn.MultiHeadDotProductAttention(HEADS, qkv_features=HEADS * SIZE, attention_fn=function)(x)

    module = Around()
    params = module.init(jax.random.key(0), x)
    linen_loss = jax.jit(lambda params: (module.apply(params, x) ** 2).sum())

    def moved(tree, step):
        return jax.tree.map_with_path(lambda path, y: y + step if "null" in jax.tree_util.keystr(path) else y, tree)

    for function, tree, gradients in ((loss, state, gradient), (linen_loss, params, jax.grad(linen_loss)(params))):
        differences = (function(moved(tree, 1e-2)) - function(moved(tree, -1e-2))) / 2e-2
        total = sum(g.sum() for p, g in jax.tree_util.tree_leaves_with_path(gradients) if "null" in str(p))
        np.testing.assert_allclose(total, differences, rtol=2e-2)


def test_the_signature_covers_what_flax_passes():
    """Linen drops what the signature lacks: a mask would get lost."""
    ours = inspect.signature(attention_fn()).parameters
    for library in (nnx.dot_product_attention, nn.dot_product_attention):
        theirs = inspect.signature(library).parameters
        assert theirs.keys() <= ours.keys()
        assert list(ours)[:11] == list(theirs)[:11]
        assert all(ours[name].default == p.default for name, p in theirs.items() if name != "promote_dtype")


def test_what_cannot_be_followed_is_refused_by_name():
    q, k = normal(2, 4, HEADS, SIZE), normal(2, 6, HEADS, SIZE)
    refused = dict(
        dropout_rate=0.1, module=object(), precision="highest", input_positions=np.zeros((2, 4), int),
        einsum_dot_general=max, qk_attn_weights_einsum=max, attn_weights_value_einsum=max,
        mask=np.ones((2, HEADS, 4, 5)), bias=np.ones((1, 1, 2, 1, 4, 6)),
    )  # fmt: skip
    for name, given in refused.items():
        with pytest.raises(ValueError, match=f"^{name}: must "):
            attention_fn()(q, k, k, **{name: given})
    with pytest.raises(ValueError, match=r"^window: 4 queries and 6 keys"):
        attention_fn(window=3)(q, k, k)
    with pytest.raises(ValueError, match=r"^key: must be"):
        attention_fn()(q, k[0], k[0])
    with pytest.raises(ValueError, match=r"^value: must have the shape of key"):
        attention_fn()(q, k, k[..., :3])
    module = nn.MultiHeadDotProductAttention(HEADS, dropout_rate=0.5, attention_fn=attention_fn(), qkv_features=15)
    x = normal(2, 4, WIDTH)
    params = module.init(jax.random.key(0), x, deterministic=True)
    assert module.apply(params, x, deterministic=True).shape == x.shape
    with pytest.raises(ValueError, match=r"^dropout_rate: must be 0"):
        module.apply(params, x, deterministic=False, rngs=dict(dropout=jax.random.key(0)))
    with pytest.raises(ValueError, match=r"^module: must be None \(sow_weights=False\)"):
        module.apply(params, x, deterministic=True, sow_weights=True, mutable=["intermediates"])
    with pytest.raises(ValueError, match=r"^module: must be None \(sow_weights=False\)"):
        nnx.merge(*nnx_attention(attention_fn()))(x, sow_weights=True)


def test_dtype_decides_the_type_of_the_computation():
    q = normal(2, 4, HEADS, SIZE)
    assert attention_fn()(q, q, q, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert attention_fn()(q.astype(jnp.bfloat16), q, q).dtype == jnp.float32


# jax.nn.dot_product_attention

SHAPES = {"self": (2, 7, 7, 6, 3), "few_queries": (2, 5, 8, 6, 2), "few_keys": (3, 8, 5, 4, 4)}
WINDOWS = (None, 2, (1, 3), (3, 0))


def arrays_of(shape, bias, mask):
    batch, length, keys, heads, key_heads = shape
    arrays = dict(
        query=normal(batch, length, heads, SIZE),
        key=normal(batch, keys, key_heads, SIZE, seed=1),
        value=normal(batch, keys, key_heads, SIZE, seed=2),
    )
    if bias:
        arrays["bias"] = normal(1, heads, length, keys)
    fixed = dict(mask=np.random.default_rng(3).random((batch, 1, length, keys)) < 0.7) if mask else {}
    return arrays, fixed


def seen_by(shape, *, mask=None, is_causal=False, query_seq_lengths=None, key_value_seq_lengths=None,
            local_window_size=None, bias=None, scale=None):  # fmt: skip
    """[B, 1, T, S], counted out as the documentation of jax.nn says it."""
    batch, length, keys = shape[:3]
    seen = np.ones((batch, 1, length, keys), bool) if mask is None else mask.copy()
    window = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
    for b, i, j in np.ndindex(batch, length, keys):
        seen[b, :, i, j] &= not (is_causal and j > i)
        seen[b, :, i, j] &= window is None or i - window[0] <= j <= i + window[1]
        seen[b, :, i, j] &= key_value_seq_lengths is None or j < key_value_seq_lengths[b]
        seen[b, :, i, j] &= query_seq_lengths is None or i < query_seq_lengths[b]
    return seen


def cases():
    slow = pytest.mark.slow
    for name, bias, mask, causal, window, lengths in itertools.product(
        SHAPES, (False, True), (False, True), (False, True), WINDOWS, (False, True)
    ):
        chosen = (bias + 2 * mask + 3 * causal + 5 * WINDOWS.index(window) + 7 * lengths + len(name)) % 17 == 5
        words = [
            name,
            *(w for w, on in zip(("bias", "mask", "causal", "lengths"), (bias, mask, causal, lengths)) if on),
        ]
        words += [] if window is None else [str(window)]
        yield pytest.param(
            name, bias, mask, causal, window, lengths, id="-".join(words), marks=[] if chosen else [slow]
        )


@pytest.mark.parametrize("name, bias, mask, causal, window, lengths", list(cases()))
def test_it_is_jaxs_attention_without_a_null_and_the_definition_with_one(name, bias, mask, causal, window, lengths):
    shape = SHAPES[name]
    arrays, options = arrays_of(shape, bias, mask)
    options |= dict(is_causal=causal, local_window_size=window, scale=0.6)
    if lengths:
        options["query_seq_lengths"] = np.arange(shape[0], dtype=np.int32) + 4
        options["key_value_seq_lengths"] = 5 - np.arange(shape[0], dtype=np.int32)
    seen = seen_by(shape, **options)
    some = seen.any(-1).swapaxes(1, 2)[..., None]  # [B, T, 1, 1]
    keep = np.broadcast_to(some[..., 0], (*some.shape[:2], shape[3]))

    def run(function, arrays, null_logit):
        more = {} if null_logit is None else dict(null_logit=null_logit)
        output, residual = function(**arrays, **options, **more, return_residual=True)
        return output, residual, (jnp.where(some, output, 0.0) ** 3).sum()

    differentiate = lambda function, null=None: jax.jit(
        jax.value_and_grad(lambda a: (lambda o: (o[2], o))(run(function, a, null)), has_aux=True)
    )
    (_, theirs), wanted = differentiate(jax.nn.dot_product_attention)(arrays)
    (_, ours), gradients = differentiate(dot_product_attention, NONE)(arrays)
    np.testing.assert_allclose(ours[0], jnp.where(some, theirs[0], 0.0), atol=1e-5)
    np.testing.assert_allclose(np.where(keep, ours[1], 0), np.where(keep, theirs[1], 0), atol=1e-5)
    for field, expected in wanted.items():
        np.testing.assert_allclose(gradients[field], expected, atol=3e-5 * np.abs(expected).max(), err_msg=field)

    null_logit = normal(shape[3])
    repeat = lambda x: np.repeat(x.astype(np.float64), shape[3] // shape[4], axis=2)
    scores = 0.6 * np.einsum("btnh,bsnh->bnts", arrays["query"], repeat(arrays["key"])) + arrays.get("bias", 0.0)
    p = softmax_with_null(scores, seen, null_logit)
    output, residual, _ = jax.jit(lambda a: run(dot_product_attention, a, null_logit))(arrays)
    np.testing.assert_allclose(output, np.einsum("bnts,bsnh->btnh", p, repeat(arrays["value"])), atol=1e-5)
    lse = np.log(np.where(seen, np.exp(scores), 0).sum(-1) + np.exp(null_logit)[:, None]).swapaxes(1, 2)
    np.testing.assert_allclose(residual, lse, atol=1e-5)


def test_without_a_batch():
    q, k, v = normal(6, 4, SIZE), normal(8, 2, SIZE), normal(8, 2, SIZE, seed=1)
    options = dict(bias=normal(4, 6, 8), mask=np.tri(6, 8, 1, bool), return_residual=True, is_causal=True)
    theirs = jax.nn.dot_product_attention(q, k, v, **options)
    ours = jax.jit(lambda *x: dot_product_attention(*x, **options, null_logit=NONE))(q, k, v)
    for x, y in zip(ours, theirs):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, atol=1e-5)
    per_query = normal(6, 4)
    one, many = (
        jax.jit(lambda *x, b=b: dot_product_attention(*x, null_logit=b))(*arrays)
        for arrays, b in (((q, k, v), per_query), ((q[None], k[None], v[None]), per_query[None]))
    )
    np.testing.assert_array_equal(one, many[0])


def test_null_keys_and_values_and_queries_beyond_their_length():
    """A query beyond its length gives 0 whatever it holds, one without keys the null value."""
    q, k, v = (normal(2, 5, 4, SIZE, seed=i) for i in range(3))
    null_key, null_value = normal(4, SIZE), normal(4, SIZE, seed=1)
    q[0, 3:] = np.nan
    call = lambda q, null_key: dot_product_attention(
        q, k, v, null_key=null_key, null_value=null_value, query_seq_lengths=np.array([3, 5]),
        key_value_seq_lengths=np.array([4, 0]),
    )  # fmt: skip
    output = np.asarray(jax.jit(call)(q, null_key))
    assert not output[0, 3:].any() and np.isfinite(output).all()
    np.testing.assert_allclose(output[1], np.broadcast_to(null_value, (5, 4, SIZE)), atol=1e-6)
    scores = np.einsum("tnh,snh->nts", q[0, :3].astype(np.float64), np.stack([null_key, *k[0, :4]])) / math.sqrt(SIZE)
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(
        output[0, :3], np.einsum("nts,snh->tnh", p, np.stack([null_value, *v[0, :4]])), atol=1e-5
    )
    gradients = jax.jit(jax.grad(lambda *x: (call(*x) ** 2).sum(), (0, 1)))(q, null_key)
    assert all(np.isfinite(x).all() for x in gradients) and not np.asarray(gradients[0])[0, 3:].any()


def test_the_residual_has_a_gradient():
    q = normal(1, 4, 2, SIZE)
    residual = lambda q: dot_product_attention(q, q, q, return_residual=True)[1].sum()
    assert np.abs(jax.grad(residual)(q)).max() > 0.1


def test_the_signature_is_jaxs():
    ours, theirs = (inspect.signature(f).parameters for f in (dot_product_attention, jax.nn.dot_product_attention))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all((ours[n].default, ours[n].kind) == (p.default, p.kind) for n, p in theirs.items())


def test_mistakes_are_named():
    q = normal(2, 5, 4, SIZE)
    wrong = dict(
        local_window_size=[(1, 2, 3), 1.5, (-3, 1)], query_seq_lengths=[np.ones(3, int), np.ones(2)],
        key_value_seq_lengths=[np.ones((2, 1), int)], mask=[np.ones((2, 4, 5, 5))], bias=[normal(2, 4, 5, 3)],
        scale=["1"], implementation=["triton"], null_logit=[normal(3)],
    )  # fmt: skip
    for name, given in wrong.items():
        for x in given:
            with pytest.raises(ValueError, match=f"^{name}: "):
                dot_product_attention(q, q, q, **{name: x})
