"""Both phases together against float64 autodiff of the plain definition: depth routing over the finished sources and
the running one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import depth_route, route_finished, route_running

L, Q, B, T, D = 4, 3, 2, 5, 7

CASES = {
    "plain": dict(),
    "softmax": dict(null_logit=-np.inf),
    "normed_with_evidence": dict(norm=True, evidence=True),
    "normed_softmax_bias": dict(norm=True, evidence=True, bias=True, null_logit=-np.inf),
    "learned_null": dict(bias=True, evidence=True, null_logit=0.7),
    "clamped": dict(score_scale=25.0, evidence=True, bias=True),
    "clamped_softmax": dict(score_scale=25.0, evidence=True, null_logit=-np.inf),
    "one_query_clamped": dict(evidence=True, loud_query=40.0),
}


def make(*, norm=False, bias=False, evidence=False, null_logit=0.0, loud_query=None, **options):
    """Arguments of all queries, and static options. Source L is the running one, another for every query."""
    random = np.random.default_rng(3)
    arguments = {
        "sources": random.normal(size=(L, B, T, D)),
        "running": random.normal(size=(Q, B, T, D)),
        "queries": random.normal(size=(Q, D)),
        "null_logit": np.float64(null_logit),
    }
    if loud_query:
        arguments["queries"][1] *= loud_query
    if norm:
        arguments["key_norm_scales"] = 1 + random.normal(size=(Q, D)) / 3
    if bias:
        arguments["bias"] = random.normal(size=(Q, L + 1))
    if evidence:
        arguments |= {
            "null_evidence": random.uniform(size=(L, B, T)),
            "running_evidence": random.uniform(size=(Q, B, T)),
            "couplings": random.uniform(1, 2, size=Q),
        }
    return jax.tree.map(jnp.asarray, arguments), options


def plain(a, *, score_scale=1.0):
    """The definition, router by router and source by source."""
    results = []
    for q in range(Q):
        sources = [*a["sources"], a["running"][q]]
        scores = []
        for i, source in enumerate(sources):
            key = source
            if "key_norm_scales" in a:
                key = source / jnp.sqrt((source**2).mean(-1, keepdims=True) + 1e-6) * a["key_norm_scales"][q]
            score = (key * a["queries"][q]).sum(-1) * score_scale
            if "bias" in a:
                score = score + a["bias"][q, i]
            if "null_evidence" in a:
                psi = [*a["null_evidence"], a["running_evidence"][q]]
                score = score - a["couplings"][q] * (psi[i] - sum(psi) / (L + 1))
            scores.append(jnp.clip(score, -50, 50))
        total = jnp.exp(a["null_logit"]) + sum(jnp.exp(score) for score in scores)
        output = sum((jnp.exp(score) / total)[..., None] * source for score, source in zip(scores, sources))
        results.append((output, jnp.log(total), jnp.exp(a["null_logit"]) / total))
    return jax.tree.map(lambda *x: jnp.stack(x), *results)


def two_phase(a, *, score_scale=1.0):
    sources = list(a["sources"])
    options = {"score_scale": score_scale}
    given = dict(options)
    if "key_norm_scales" in a:
        given["key_norm_scales"] = a["key_norm_scales"]
    if "bias" in a:
        given["bias"] = a["bias"][:, :L]
    if "null_evidence" in a:
        given |= {"null_evidence": a["null_evidence"], "couplings": a["couplings"]}
    finished = route_finished(sources, a["queries"], **given)
    results = []
    for q in range(Q):
        later = dict(options, null_logit=a["null_logit"], sources=sources)
        if "key_norm_scales" in a:
            later["key_norm_scale"] = a["key_norm_scales"][q]
        if "bias" in a:
            later["bias"] = a["bias"][q]
        if "null_evidence" in a:
            psi = jnp.concatenate([a["null_evidence"], a["running_evidence"][q][None]])
            later |= {"null_evidence": psi, "coupling": a["couplings"][q]}
        one = jax.tree.map(lambda x, q=q: x[q], finished)
        results.append(tuple(route_running(one, a["running"][q], a["queries"][q], **later)))
    return jax.tree.map(lambda *x: jnp.stack(x), *results), finished.may_clamp


def relative(actual, wanted):
    return float(jnp.abs(actual - wanted).max() / jnp.maximum(jnp.abs(wanted).max(), 1e-3))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_definition(name):
    with jax.enable_x64(True):
        arguments, options = make(**CASES[name])
        random = np.random.default_rng(4)
        cotangents = tuple(jnp.asarray(random.normal(size=s)) for s in ((Q, B, T, D), (Q, B, T), (Q, B, T)))

        @jax.jit
        def both(arguments, cotangents):
            wanted, vjp = jax.vjp(lambda a: plain(a, **options), arguments)
            got, got_vjp, may_clamp = jax.vjp(lambda a: two_phase(a, **options), arguments, has_aux=True)
            return wanted, got, may_clamp, got_vjp(cotangents)[0], vjp(cotangents)[0]

        wanted, got, may_clamp, gradients, expected = both(arguments, cotangents)
        expected_branch = {
            "clamped": [True] * 3,
            "clamped_softmax": [True] * 3,
            "one_query_clamped": [False, True, False],
        }
        assert list(may_clamp) == expected_branch.get(name, [False] * 3)
        for actual, value in zip(got, wanted):
            assert relative(actual, value) < 1e-12
        for key in expected:
            if key != "null_logit" or np.isfinite(CASES[name].get("null_logit", 0.0)):
                assert relative(gradients[key], expected[key]) < 1e-12, key


def test_phase_one_alone_would_miss_the_clamp():
    """The branch is needed: merged as if nothing were clamped, the result differs."""
    with jax.enable_x64(True):
        arguments, options = make(**CASES["clamped"])
        wanted = plain(arguments, **options)[0]
        finished = route_finished(
            list(arguments["sources"]), arguments["queries"], bias=arguments["bias"][:, :L], **options
        )
        one = jax.tree.map(lambda x: x[0], finished)._replace(may_clamp=jnp.bool_(False))
        got = route_running(
            one,
            arguments["running"][0],
            arguments["queries"][0],
            sources=list(arguments["sources"]),
            bias=arguments["bias"][0],
            **options,
        )
        assert relative(got.output, wanted[0]) > 1e-3


def test_low_precision_sources_keep_wide_lse_and_match_depth_route():
    random = np.random.default_rng(5)
    sources = [jnp.asarray(random.normal(size=(B, T, D)), jnp.bfloat16) for _ in range(L + 1)]
    query = jnp.asarray(random.normal(size=(1, D)), jnp.float32)
    finished = route_finished(sources[:-1], query)
    assert finished.output.dtype == jnp.bfloat16 and finished.lse.dtype == jnp.float32
    got = route_running(jax.tree.map(lambda x: x[0], finished), sources[-1], query[0], sources=sources[:-1])
    wanted = depth_route(sources, query[0], implementation="reference")
    np.testing.assert_allclose(got.output.astype(np.float32), wanted.output.astype(np.float32), atol=2**-7 * 4)
    np.testing.assert_allclose(got.null_mass, wanted.null_mass, rtol=1e-5)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(queries=np.zeros((Q, D + 1))), "queries: must have shape"),
        (dict(bias=np.zeros((Q, L + 1))), "bias: must have shape"),
        (dict(null_evidence=np.zeros((L, T, B))), "null_evidence: must have shape"),
        (dict(key_norm_scales=np.zeros(D)), "key_norm_scales: must have shape"),
        (dict(sources=[]), "sources: must be arrays"),
    ],
    ids=lambda x: "" if isinstance(x, dict) else x.split(":")[0],
)
def test_what_does_not_fit_is_named(change, words):
    arguments = dict(sources=[jnp.ones((B, T, D))] * L, queries=jnp.ones((Q, D))) | change
    with pytest.raises(ValueError, match=words):
        route_finished(arguments.pop("sources"), arguments.pop("queries"), **arguments)
