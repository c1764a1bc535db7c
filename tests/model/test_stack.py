"""The three wirings against a numpy oracle, in float64, with the sublayers' outputs and evidence taken as given
functions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oasis_jax import ModelConfig, Router, UserError
from oasis_jax.model.router import MAX_BETA
from oasis_jax.model.wiring import WIRINGS, router_names, sublayer_names

B, T, D, LAYERS = 2, 3, 7, 3


def softplus(x):
    return np.log1p(np.exp(x))


def route_oracle(p, config, sources, evidence):
    """Formulas of the depth router, source by source and token by token."""
    count = len(sources)
    output, weights = np.zeros((B, T, D)), np.zeros((B, T, count))
    beta = min(softplus(p["beta_raw"]), 10.0) if config.coupling else 0.0
    for b, t in np.ndindex(B, T):
        v = [source[b, t] for source in sources]
        psi = np.array([e[b, t] for e in evidence])
        if config.router == "projected":
            keys = [p["key"].T @ vi for vi in v]
            query = p["query"].T @ v[-1]
            g = np.array([query @ key for key in keys]) * p["key"].shape[1] ** -0.5
            g = g + p["recency_bias"] * np.arange(count) / (count - 1)
        else:
            g = np.array([p["query"] @ (vi / np.sqrt((vi * vi).mean() + 1e-6) * p["key_norm"]) for vi in v])
        g = np.clip(g - beta * (psi - psi.mean()), -50, 50)
        null = 1.0 if config.depth_normalizer == "softmax1" else 0.0
        alpha = np.exp(g) / (null + np.exp(g).sum())
        weights[b, t] = alpha
        output[b, t] = sum(a * vi for a, vi in zip(alpha, v))
    return output, weights


def sublayer_oracle(index, h):
    """A made-up sublayer and its layer's evidence."""
    return np.tanh(h * (index + 1) + 0.1 * index), 1 / (1 + np.exp(-(h.sum(-1) + index // 2)))


class Sublayers:
    """The same in JAX; an MLP carries its layer's evidence, which was made when the attention ran."""

    def __init__(self):
        self.psi = None

    def __call__(self, index, h):
        if index % 2 == 0:
            self.psi = jax.nn.sigmoid(h.sum(-1) + index // 2)
        return jnp.tanh(h * (index + 1) + 0.1 * index), self.psi


def cumulative_oracle(route, x):
    history, evidence, h = [x], [np.zeros((B, T))], x
    for layer in range(LAYERS):
        output, psi = sublayer_oracle(2 * layer, h)
        a = h + output
        h = route(f"layer{layer}.attention", [*history, a], [*evidence, psi])
        m = h + sublayer_oracle(2 * layer + 1, h)[0]
        h = route(f"layer{layer}.mlp", [*history, a, m], [*evidence, psi, psi])
        history, evidence = [*history, h], [*evidence, psi]
    return h


def delta_oracle(route, x, blocks):
    """Recomputes every block sum and mean from the list of all outputs."""
    size = 2 * LAYERS // blocks if blocks else 1
    outputs, psis, h = [], [], x
    names = [*sublayer_names(ModelConfig(num_layers=LAYERS))[1:], "final"]
    for index, name in enumerate(names):
        output, psi = sublayer_oracle(index, h)
        outputs.append(output)
        psis.append(psi if index % 2 == 0 else psis[-1])
        starts = list(range(0, 2 * LAYERS, size))[: blocks or None]
        groups = [range(s, e) for s, e in zip(starts, [*starts[1:], 2 * LAYERS])]
        groups = [[i for i in group if i < len(outputs)] for group in groups]
        sources = [x] + [sum(outputs[i] for i in group) for group in groups if group]
        evidence = [np.zeros((B, T))] + [np.mean([psis[i] for i in group], axis=0) for group in groups if group]
        h = route(name, sources, evidence)
    return h


def routers_of(config):
    rng = np.random.default_rng(5)
    routers, parameters = {}, {}
    for name in router_names(config):
        router = Router(config, rngs=nnx.Rngs(0))
        for parameter in router.names:
            array = rng.normal(size=getattr(router, parameter).shape)
            parameters.setdefault(name, {})[parameter] = array
            setattr(router, parameter, nnx.Param(jnp.asarray(array)))
        routers[name] = router
    return routers, parameters


@pytest.mark.parametrize(
    "options",
    [
        dict(preset="oasis"),
        dict(preset="attnres_cumulative"),
        dict(preset="oasis", router="static"),
        dict(preset="attnres"),
        dict(preset="oasis_blocks", blocks=0),
        dict(preset="oasis_blocks", blocks=2),
        dict(preset="oasis_blocks", blocks=4),  # 6 sublayers: blocks of 1, 1, 1 and the remaining 3
        dict(preset="oasis_blocks", blocks=1, router="projected"),
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_routed_wirings_match_the_oracle(options):
    config = ModelConfig(width=D, num_heads=1, head_dim=2, num_layers=LAYERS, **options)
    x = np.random.default_rng(6).normal(size=(B, T, D))
    with jax.enable_x64(True):
        routers, parameters = routers_of(config)
        call = Sublayers()
        sublayers = [lambda h, i=i: call(i, h) for i in range(2 * LAYERS)]
        result = WIRINGS[config.wiring](config, jnp.asarray(x), sublayers, routers)
        seen = {}

        def route(name, sources, evidence):
            output, seen[name] = route_oracle(parameters[name], config, sources, evidence)
            return output

        expected = (
            cumulative_oracle(route, x) if config.wiring == "cumulative" else delta_oracle(route, x, config.blocks)
        )
        np.testing.assert_allclose(result.stream, expected, rtol=1e-10, atol=1e-12)
        assert list(result.routers) == list(seen) == router_names(config)
        for name, weights in seen.items():
            np.testing.assert_allclose(result.routers[name].weights, weights, atol=1e-10)
    assert len(result.layer_outputs) == LAYERS


def test_the_cumulative_wiring_routes_over_l_plus_2_then_l_plus_3_sources():
    config = ModelConfig(preset="oasis", width=D, num_heads=1, head_dim=2, num_layers=LAYERS)
    routers, _ = routers_of(config)
    call = Sublayers()
    result = WIRINGS["cumulative"](
        config, jnp.ones((B, T, D)), [lambda h, i=i: call(i, h) for i in range(2 * LAYERS)], routers
    )
    assert [r.weights.shape[-1] for r in result.routers.values()] == [2, 3, 3, 4, 4, 5]


def test_residual_is_the_plain_sum_and_clipping_bounds_every_source():
    config = ModelConfig(preset="residual", width=D, num_layers=LAYERS, num_heads=1, head_dim=2, residual_clip=0.5)
    x = np.random.default_rng(7).normal(size=(B, T, D))
    call = Sublayers()
    result = WIRINGS["residual"](config, jnp.asarray(x), [lambda h, i=i: call(i, h) for i in range(2 * LAYERS)], {})
    h = x
    for index in range(2 * LAYERS):
        h = np.clip(h + sublayer_oracle(index, h)[0], -0.5, 0.5)
    np.testing.assert_allclose(result.stream, h, atol=1e-5)


def test_beta_is_bounded_and_absent_without_coupling():
    config = ModelConfig(preset="oasis", width=D, num_heads=1, head_dim=2)
    router = Router(config, rngs=nnx.Rngs(0))
    sources, evidence = [jnp.ones((B, T, D)), jnp.zeros((B, T, D))], [jnp.zeros((B, T)), jnp.ones((B, T))]
    np.testing.assert_allclose(router(sources, evidence)[1].beta, softplus(-5.0), rtol=1e-6)
    router.beta_raw[...] = jnp.float32(1e3)
    assert float(router(sources, evidence)[1].beta) == MAX_BETA
    plain = Router(config.with_preset("attnres_cumulative"), rngs=nnx.Rngs(0))
    assert plain(sources, evidence)[1].beta is None and "beta_raw" not in plain.names


def test_gradient_reaches_the_evidence_through_the_coupling():
    config = ModelConfig(preset="oasis", width=D, num_heads=1, head_dim=2)
    router = Router(config, rngs=nnx.Rngs(0))
    sources = [jax.random.normal(jax.random.key(i), (B, T, D)) for i in range(3)]
    gradient = jax.grad(lambda psi: router(sources, [jnp.zeros((B, T)), psi, 0.3 * psi])[0].sum())(
        jnp.full((B, T), 0.4)
    )
    assert float(jnp.abs(gradient).min()) > 0


def test_more_blocks_than_sublayers_is_refused():
    with pytest.raises(UserError, match="9 blocks for 8 sublayers"):
        ModelConfig(preset="oasis_blocks", num_layers=4, blocks=9)
