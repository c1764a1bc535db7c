"""Depth weights that no kernel makes: sigmoid, each source on its own, and uniform, with nothing learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model.exact import SMALL, in_float64, moved_parameters

from oasis_jax import Decoder, ModelConfig
from oasis_jax.commands.model_tables import steps
from oasis_jax.config import RouterConfig
from oasis_jax.errors import UserError
from oasis_jax.evaluation.quantization.inference import tensor_roles
from oasis_jax.model.decoder import forward, parameter_specs
from oasis_jax.model.depth_weights import depth_operator, sigmoid_route
from oasis_jax.model.router import Router, route

B, T, D, S, LIVE = 2, 3, 5, 4, 3


def test_uniform_weights_with_their_sum_preserved_are_the_residual_stream():
    residual = in_float64(ModelConfig(preset="residual", num_layers=2, **SMALL))
    options = dict(depth_normalizer="uniform", sum_preserving=True, blocks=3)
    uniform = in_float64(ModelConfig(preset="attnres", num_layers=2, **SMALL, **options))
    tokens = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (2, 7))
    with jax.enable_x64(True):
        params = moved_parameters(residual)
        run = jax.jit(lambda params: [forward(params, config, tokens)[0] for config in (uniform, residual)])
        np.testing.assert_allclose(*run(params), rtol=1e-10, atol=1e-10)
    assert "routers" not in parameter_specs(uniform)
    assert not [name for name in tensor_roles(uniform) if ".router." in name]
    assert Decoder(uniform, rngs=nnx.Rngs(0)).parameters().keys() == params.keys()


def test_sigmoid_starts_where_softmax1_does():
    sources = [jnp.full((B, T, D), i + 1.0) for i in range(LIVE)]
    evidence = [jnp.zeros((B, T))] * LIVE
    found = {}
    for normalizer in ("sigmoid", "softmax1"):
        config = RouterConfig(width=D, router="static", depth_normalizer=normalizer)
        parameters = Router(config, rngs=nnx.Rngs(0)).parameters
        found[normalizer] = jax.jit(lambda *x, config=config: route(x[0], config, *x[1:]))(
            parameters, sources, evidence
        )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found["sigmoid"], found["softmax1"])


def test_sources_that_are_not_live_reach_nothing():
    random = np.random.default_rng(1)
    sources, query = random.normal(size=(S, B, T, D)), random.normal(size=D)
    dead = sources.copy()
    dead[LIVE:] = np.nan
    d_output, into = random.normal(size=(B, T, D)), random.normal(size=(S, B, T, D))
    with jax.enable_x64(True):
        options = dict(key_norm_scale=jnp.asarray(random.normal(size=D)), score_scale=0.7)

        @jax.jit
        def run(live):
            found = sigmoid_route(dead, query, num_sources=live, **options)
            wanted, pull = jax.vjp(lambda x, u: sigmoid_route(x, u, **options).output, sources[:LIVE], query)
            arguments = (jnp.asarray(into), d_output, found, jnp.asarray(dead), jnp.asarray(query))
            gradients = depth_operator("sigmoid").add_gradients(*arguments, num_sources=live, **options)
            return found, wanted, pull(jnp.asarray(d_output)), gradients

        found, wanted, (d_sources, d_query), gradients = run(LIVE)
        np.testing.assert_allclose(found.output, wanted, rtol=1e-12)
        assert (np.asarray(found.weights)[..., LIVE:] == 0).all()
        np.testing.assert_allclose(gradients.sources[:LIVE], into[:LIVE] + d_sources, rtol=1e-12)
        np.testing.assert_array_equal(gradients.sources[LIVE:], into[LIVE:])
        np.testing.assert_allclose(gradients.query, d_query, rtol=1e-12)
        assert gradients.bias is gradients.coupling is None and gradients.key_norm_scale.shape == (D,)


def test_what_they_cannot_do_is_refused_and_said():
    with pytest.raises(UserError, match=r"model\.coupling: depth_normalizer=uniform weighs by nothing"):
        ModelConfig(preset="oasis", depth_normalizer="uniform")
    with pytest.raises(UserError, match=r"model\.depth_implementation: .* plain JAX; leave it at auto, got xla"):
        ModelConfig(preset="oasis", depth_normalizer="sigmoid", depth_implementation="xla")
    text = steps(ModelConfig(preset="attnres", depth_normalizer="uniform", vocab_size=8), 120)
    assert "8 routers (uniform) over" in text
