"""Attention with every option as SPEC writes it down, for float64 autodiff; arguments and comparisons of the suites."""

import jax
import jax.numpy as jnp
import numpy as np

NAMES = ("query", "key", "value", "null_logit", "null_key", "null_value", "bias")


def allowed(shape, *, is_causal=True, window=None, segment_ids=None, mask=None, query_offset=None, kv_lengths=None):
    """[B, N, T, S], counted out."""
    batch, length, keys, heads, _, _ = shape
    lengths = np.full(batch, keys) if kv_lengths is None else np.asarray(kv_lengths)
    offset = lengths - length if query_offset is None else np.broadcast_to(query_offset, batch)
    seen = np.ones((batch, heads, length, keys), bool)
    for b, i, j in np.ndindex(batch, length, keys):
        distance = offset[b] + i - j
        hidden = ((is_causal or window) and distance < 0) or (window and distance >= window) or j >= lengths[b]
        if segment_ids is not None:
            hidden = hidden or segment_ids[0][b, i] != segment_ids[1][b, j]
        seen[b, :, i, j] = not hidden
    return seen if mask is None else seen & np.asarray(mask)


def plain(arrays: dict, *, logit_softcap=None, scale=None, **masks):
    """The definition as it is written down: no maximum is subtracted, keys are repeated, the mask is counted out."""
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    (batch, length, heads, size), (keys, key_heads) = query.shape, key.shape[1:3]
    scale = size**-0.5 if scale is None else scale
    repeat = lambda x: jnp.repeat(x, heads // key_heads, axis=-2)

    def scores(equation, key):
        found = jnp.einsum(equation, query, repeat(key)) * scale
        return found if logit_softcap is None else logit_softcap * jnp.tanh(found / logit_softcap)

    several = lambda x: x if x.ndim == 3 else x[None]
    seen = allowed((batch, length, keys, heads, key_heads, size), **masks)
    e = scores("btnh,bsnh->bnts", key) + arrays.get("bias", 0.0)
    e = jnp.where(seen, jnp.exp(jnp.where(seen, e, 0.0)), 0.0)
    b = jnp.asarray(arrays["null_logit"])
    b = b.swapaxes(1, 2) if b.ndim == 3 else jnp.broadcast_to(b, (heads,))[:, None]
    nulls = jnp.exp(jnp.broadcast_to(b, (batch, heads, length)))[..., None]
    if "null_key" in arrays:
        nulls = nulls * jnp.exp(scores("btnh,pnh->bntp", several(arrays["null_key"])))
    total = e.sum(-1) + nulls.sum(-1)
    output = jnp.einsum("bnts,bsnh->btnh", e / total[..., None], repeat(value))
    if "null_value" in arrays:
        output += jnp.einsum("bntp,pnh->btnh", nulls / total[..., None], repeat(several(arrays["null_value"])))
    return output, nulls.sum(-1) / total, jnp.log(total)


def make(shape, *, null="per_head", null_keys=None, null_values=None, bias=None, mask=None, segments=None, **options):
    """Arrays by name and options, in float32, and one random cotangent for each result.

    null: "per_head", "per_query" or a number. null_keys, null_values: how many; 0: one without the first dimension.
    mask, bias: which of [B, N, T, S] they have.
    """
    batch, length, keys, heads, key_heads, size = shape
    random = np.random.default_rng(sum(shape))
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    part = lambda which: tuple(n if has else 1 for n, has in zip((batch, heads, length, keys), which))
    arrays = dict(
        query=normal(batch, length, heads, size),
        key=normal(batch, keys, key_heads, size),
        value=normal(batch, keys, key_heads, size),
        null_logit={"per_head": normal(heads), "per_query": normal(batch, length, heads)}.get(null, np.float32(0))
        if isinstance(null, str)
        else np.float32(null),
    )
    for name, count in (("null_key", null_keys), ("null_value", null_values)):
        if count is not None:
            arrays[name] = normal(*((count,) if count else ()), key_heads, size)
    if bias:
        arrays["bias"] = normal(*part(bias))
    if mask:
        options["mask"] = random.random(part(mask)) < 0.6
    if segments:
        ids = [np.sort(random.integers(0, 3, (batch, n)), axis=1) for n in (length, keys)]
        options["segment_ids"] = tuple(ids)
    cotangents = normal(batch, length, heads, size), normal(batch, heads, length), normal(batch, heads, length)
    return arrays, options, cotangents


def differentiated(function):
    """A compiled function of arrays and cotangents: the three results and the gradients of all arrays, through all
    three results at once. An infinite lse counts as 0.
    """

    def loss(arrays, cotangents):
        results = tuple(function(arrays))
        finite = (*results[:2], jnp.where(jnp.isfinite(results[2]), results[2], 0.0))
        return sum(jnp.vdot(c, r) for c, r in zip(cotangents, finite)), results

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def call(arrays: dict, cotangents):
        (_, results), gradients = run(arrays, cotangents)
        return jax.tree.map(np.asarray, (results, gradients))

    return call


def results_and_gradients(function, arrays: dict, cotangents):
    """As `differentiated`, once."""
    return differentiated(function)(arrays, cotangents)


def as_float64(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def expected(arrays: dict, options: dict, cotangents):
    """Results and gradients in float64."""
    with jax.enable_x64(True):
        return results_and_gradients(lambda a: plain(a, **options), as_float64(arrays), as_float64(cotangents))


def assert_close(actual, wanted, tolerance, what=""):
    """The largest error, relative to the largest value."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape, what
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max(initial=0.0), err_msg=what)
