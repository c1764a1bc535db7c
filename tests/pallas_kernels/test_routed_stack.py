"""A stack over the append-only buffer against float64 autodiff of the plain list of sources, with made-up sublayers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import routed_stack

N, B, T, D = 3, 2, 5, 7  # three periods of two kinds of sublayer

CASES = {
    "softmax1": dict(),
    "softmax": dict(null_logit=-np.inf),
    "coupled": dict(coupled=True),
    "coupled_softmax": dict(coupled=True, null_logit=-np.inf),
    "clamped": dict(coupled=True, loud=25.0),
    "clamped_softmax": dict(loud=25.0, null_logit=-np.inf),
}


def make_evidence(parameters, context, h, psi):
    """Makes a source and an evidence of its own, as attention does."""
    return jnp.tanh(h @ parameters["w"] + context), jax.nn.sigmoid(h @ parameters["e"])


def keep_evidence(parameters, context, h, psi):
    """Passes the evidence on, as an MLP does, and uses it besides."""
    return jnp.sin(h @ parameters["w"]) * (1 + psi[..., None]), psi


SUBLAYERS = (make_evidence, keep_evidence)


def make(coupled=False, null_logit=0.0, loud=1.0):
    random = np.random.default_rng(8)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape))
    arguments = {
        "parameters": ({"w": normal(N, D, D) / 2, "e": normal(N, D)}, {"w": normal(N, D, D) / 2}),
        "first": normal(B, T, D),
        "queries": normal(2 * N, D) * loud,
    }
    if coupled:
        arguments["couplings"] = jnp.asarray(random.uniform(1, 2, size=2 * N)) * (5.0 if loud > 1 else 1.0)
    return arguments, normal(B, T, D), normal(B, T, D), null_logit


def plain(a, context, null_logit, largest=50.0):
    sources, psis, h, psi = [a["first"]], [jnp.zeros((B, T))], a["first"], jnp.zeros((B, T))
    for s in range(2 * N):
        own = jax.tree.map(lambda x, s=s: x[s // 2], a["parameters"][s % 2])
        source, psi = SUBLAYERS[s % 2](own, context, h, psi)
        sources, psis = [*sources, source], [*psis, psi]
        scores = []
        for v, e in zip(sources, psis):
            score = (v / jnp.sqrt((v * v).mean(-1, keepdims=True) + 1e-6) * a["queries"][s]).sum(-1)
            if "couplings" in a:
                score = score - a["couplings"][s] * (e - sum(psis) / len(psis))
            scores.append(jnp.clip(score, -largest, largest))
        total = jnp.exp(null_logit) + sum(jnp.exp(score) for score in scores)
        h = sum((jnp.exp(score) / total)[..., None] * v for score, v in zip(scores, sources))
    return h


def relative(actual, wanted):
    return float(jnp.abs(actual - wanted).max() / jnp.abs(wanted).max())


@pytest.mark.parametrize("name", CASES)
def test_equals_the_list_of_sources(name):
    with jax.enable_x64(True):
        arguments, context, cotangent, null_logit = make(**CASES[name])

        def stack(a):
            return routed_stack(
                SUBLAYERS, a["parameters"], context, a["first"], a["queries"], a.get("couplings"), null_logit=null_logit
            )

        @jax.jit
        def both(arguments):
            wanted, vjp = jax.vjp(lambda a: plain(a, context, null_logit), arguments)
            got, got_vjp = jax.vjp(stack, arguments)
            return (got, got_vjp(cotangent)), (wanted, vjp(cotangent)), plain(arguments, context, null_logit, jnp.inf)

        got, wanted, unclamped = both(arguments)
        assert (relative(unclamped, wanted[0]) > 1e-3) == ("loud" in CASES[name])
        errors = jax.tree.map(relative, got, wanted)
        assert max(jax.tree.leaves(errors)) < 1e-12, errors


def test_a_wrong_number_of_queries_is_named():
    arguments, context, _, _ = make()
    with pytest.raises(ValueError, match="queries: must have shape"):
        routed_stack(SUBLAYERS, arguments["parameters"], context, arguments["first"], arguments["queries"][1:])
