"""Routers and nulls that join a trained model: what they compute, and that at their start they change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.exact import SMALL, T, V, in_float64, moved_parameters
from sampling import sampled

from oasis_jax import Context, ModelConfig, UserError
from oasis_jax.config import Config, OptimizerConfig, RouterConfig
from oasis_jax.model.decoder import forward, initial_params
from oasis_jax.model.router import route
from oasis_jax.training.optimizer import at_step

TOKENS = np.random.default_rng(5).integers(0, V, (2, T))


def logits(config: ModelConfig, params, **context) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: forward(p, config, TOKENS, Context(**context))[0])(params))


@pytest.mark.parametrize(
    "options",
    [
        dict(preset="attnres_cumulative", alpha_gate=True, recency_bias_init=8.0),
        pytest.param(dict(preset="attnres", sum_preserving=True), marks=pytest.mark.slow),
        dict(preset="attnres", sum_preserving=True, blocks=4),
    ],
    ids=["alpha gate", "sum of all", "sum of blocks"],
)
def test_routers_at_their_start_leave_the_residual_model_as_it_is(options):
    """No norm has to hide a factor: its epsilon is large."""
    sizes = dict(num_layers=3, norm_epsilon=0.3) | SMALL
    plain, routed = (in_float64(ModelConfig(**sizes | chosen)) for chosen in (dict(preset="residual"), options))
    with jax.enable_x64(True):
        params = moved_parameters(plain)
        routers = jax.tree.map(lambda x: x.astype(jnp.float64), initial_params(routed, jax.random.key(0))["routers"])
        wanted = logits(plain, params)
        np.testing.assert_allclose(logits(routed, params | {"routers": routers}), wanted, rtol=1e-10, atol=1e-11)
        moved = jax.tree.map(lambda x: x + 0.3, routers)
        assert np.abs(logits(routed, params | {"routers": moved}) - wanted).max() > 1e-3


def test_an_alpha_gate_goes_from_the_newest_source_towards_the_mixture():
    config = RouterConfig(width=5, router="static", alpha_gate=True, depth_normalizer="softmax1", coupling=False)
    random = np.random.default_rng(0)
    sources, query, gain, alpha = random.normal(size=(4, 2, 3, 5)), random.normal(size=5), random.normal(size=5), 0.3
    root = np.sqrt((sources**2).mean(-1, keepdims=True) + 1e-6)
    scores = np.exp((sources / root * gain) @ query)
    weights = scores / (1 + scores.sum(0))
    effective = alpha * weights + (1 - alpha) * (np.arange(4) == 3).reshape(4, 1, 1)
    with jax.enable_x64(True):
        parameters = dict(query=jnp.asarray(query), key_norm=jnp.asarray(gain), alpha=jnp.asarray(alpha))
        output, seen = route(parameters, config, list(jnp.asarray(sources)), [jnp.zeros((2, 3))] * 4)
    np.testing.assert_allclose(output, (effective[..., None] * sources).sum(0), rtol=1e-6)
    np.testing.assert_allclose(np.moveaxis(seen.weights, -1, 0), effective, rtol=1e-5)
    np.testing.assert_allclose(seen.null_mass, alpha * (1 - weights.sum(0)), rtol=1e-5)


@pytest.mark.parametrize(
    "normalizer", sampled(["softmax1", "learned_sink", "token_null", "null_key_value"], ("learned_sink", "token_null"))
)
def test_the_nulls_weight_goes_from_softmax_to_the_normalizer(normalizer):
    """Half of the null's exponential is a logit of ln 1/2 more."""
    config = in_float64(ModelConfig(preset="residual", normalizer=normalizer, num_layers=2, **SMALL))
    softmax = in_float64(dataclasses.replace(config, dtype="float32", normalizer="softmax"))
    weighted = lambda weight: in_float64(dataclasses.replace(config, dtype="float32", null_weight=weight))
    with jax.enable_x64(True):
        params = moved_parameters(config)
        whole = logits(config, params)
        np.testing.assert_array_equal(logits(weighted(1.0), params), whole)
        np.testing.assert_allclose(logits(weighted(0.0), params), logits(softmax, params), rtol=1e-9)
        half = logits(weighted(0.5), params)
        np.testing.assert_allclose(logits(config, params, null_weight=jnp.asarray(0.5)), half, rtol=1e-9)
        assert np.abs(half - whole).max() > 1e-3
        if normalizer == "learned_sink":
            attention = params["layers"]["attention"]
            moved = attention | {"null_logit": attention["null_logit"] + np.log(0.5)}
            shifted = params | {"layers": params["layers"] | {"attention": moved}}
            np.testing.assert_allclose(logits(config, shifted), half, rtol=1e-9)


def test_a_null_bias_is_added_to_the_null_keys_score():
    config = in_float64(ModelConfig(preset="residual", normalizer="null_key", null_bias=True, num_layers=2, **SMALL))
    plain = in_float64(dataclasses.replace(config, dtype="float32", null_bias=False))
    with jax.enable_x64(True):
        params = moved_parameters(config)
        attention = params["layers"]["attention"]

        def with_bias(value):
            moved = attention | {"null_logit": jnp.full_like(attention["null_logit"], value)}
            return params | {"layers": params["layers"] | {"attention": moved}}

        np.testing.assert_allclose(logits(config, with_bias(0.0)), logits(plain, params), rtol=1e-9)
        weighted = in_float64(dataclasses.replace(config, dtype="float32", null_bias=False, null_weight=0.25))
        np.testing.assert_allclose(logits(config, with_bias(np.log(0.25))), logits(weighted, params), rtol=1e-9)


def test_a_run_knows_the_weight_of_its_null_at_every_step():
    config = Config(optimizer=OptimizerConfig(null_ramp_steps=4))
    assert [at_step(config, step).model.null_weight for step in (0, 1, 3, 4, 9)] == [0.0, 0.25, 0.75, 1.0, 1.0]
    assert at_step(Config(), 3) == Config()
    model = ModelConfig(preset="residual", normalizer="null_key_value")
    config = Config(model=model, optimizer=OptimizerConfig(null_value_fade_steps=4))
    assert [at_step(config, step).model.null_value_weight for step in (0, 1, 3, 4, 9)] == [1.0, 0.75, 0.25, 0.0, 0.0]
    assert at_step(config, 2).model.null_weight == 1.0


def test_a_null_value_fades_from_what_it_is_to_nothing():
    config = in_float64(ModelConfig(preset="residual", normalizer="null_key_value", num_layers=2, **SMALL))
    weighted = lambda weight: in_float64(dataclasses.replace(config, dtype="float32", null_value_weight=weight))
    with jax.enable_x64(True):
        params = moved_parameters(config)

        def with_values_times(factor):
            attention = params["layers"]["attention"]
            changed = attention | {"null_value": factor * attention["null_value"]}
            return params | {"layers": params["layers"] | {"attention": changed}}

        for weight in (0.0, 0.5, 1.0):
            wanted = logits(config, with_values_times(weight))
            np.testing.assert_allclose(logits(weighted(weight), params), wanted, rtol=1e-9)
            np.testing.assert_allclose(logits(config, params, null_value_weight=jnp.asarray(weight)), wanted, rtol=1e-9)
        null_key = in_float64(dataclasses.replace(config, dtype="float32", normalizer="null_key"))
        attention = {k: v for k, v in params["layers"]["attention"].items() if k != "null_value"}
        without = params | {"layers": params["layers"] | {"attention": attention}}
        np.testing.assert_allclose(logits(null_key, without), logits(weighted(0.0), params), rtol=1e-9)
        assert np.abs(logits(weighted(0.5), params) - logits(config, params)).max() > 1e-3


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(preset="attnres", alpha_gate=True), "alpha_gate: goes with wiring=cumulative, got wiring=delta"),
        (dict(preset="oasis", sum_preserving=True), "sum_preserving: goes with wiring=delta, got wiring=cumulative"),
        (dict(null_value_weight=0.5), "null_value_weight: goes with normalizer=null_key_value, got softmax1"),
        (dict(null_weight=1.5), "null_weight: must be at least 0 and at most 1, got 1.5"),
        (dict(null_bias=True), "null_bias: goes with normalizer=null_key or null_key_value, got softmax1"),
        (dict(router_init_std=-1.0), "router_init_std: must be at least 0"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**options)
