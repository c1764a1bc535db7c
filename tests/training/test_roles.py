"""What follows from what a parameter is: weight decay, groups of learning rates, FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oasis_jax.config import ModelConfig, OptimizerConfig
from oasis_jax.errors import UserError
from oasis_jax.model.decoder import parameter_roles, parameter_shapes
from oasis_jax.model.parameters import ROLES
from oasis_jax.training.flops import forward_flops
from oasis_jax.training.optimizer import make_optimizer

LAYERS, D, N, K, H, F, V, P, C = 2, 24, 4, 2, 6, 40, 16, 9, 64
MODEL = ModelConfig(
    preset="oasis", num_layers=LAYERS, width=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=F, vocab_size=V,
    learned_positions=P, norm="layernorm", normalizer="null_key_value", gate="per_head", qk_norm=True, qkv_bias=True,
    output_bias=True, mlp_bias=True, tied_head=False,
)  # fmt: skip

# Everything the model has: name -> (decays, multiplies, group).
MATRIX, SMALL = (True, True, "base"), (False, False, "base")
ROUTER_MATRIX, ROUTER = (True, True, "router"), (False, False, "router")
LAYERNORM = {"scale": SMALL, "bias": SMALL}
EXPECTED = {
    "embedding": {"table": MATRIX, "positions": MATRIX},
    "head": {"kernel": MATRIX},
    "final_norm": LAYERNORM,
    "layers": {
        "attention_norm": LAYERNORM,
        "mlp_norm": LAYERNORM,
        "attention": dict.fromkeys(("query", "key", "value", "output", "gate"), MATRIX)
        | dict.fromkeys(("query_bias", "key_bias", "value_bias", "output_bias"), SMALL)
        | dict.fromkeys(("query_norm", "key_norm", "null_key", "null_value"), SMALL),
        "mlp": dict.fromkeys(("gate", "up", "down"), MATRIX)
        | dict.fromkeys(("gate_bias", "up_bias", "down_bias"), SMALL),
    },
    "routers": {"query": ROUTER_MATRIX, "key": ROUTER_MATRIX, "recency_bias": ROUTER, "beta_raw": ROUTER},
}


def by_path(tree) -> dict[str, object]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
    }


def parameters(model: ModelConfig) -> dict:
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(1.0 + random.random(x.shape), jnp.float32), parameter_shapes(model))


def test_every_parameter_has_the_role_of_what_it_is():
    found = jax.tree.map(lambda role: tuple(ROLES[role]), parameter_roles(MODEL))
    assert by_path(found) == by_path(EXPECTED)


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            dict(preset="attnres"),
            {"routers.query": ROUTER, "routers.key_norm": ROUTER, "layers.attention_norm.scale": SMALL},
        ),
        (dict(preset="learned_sink"), {"layers.attention.null_logit": SMALL, "routers.query": ROUTER_MATRIX}),
        (
            dict(preset="residual", gate="affine"),
            {"layers.attention.gate": MATRIX, "layers.attention.gate_average": (False, False, "running")},
        ),
        (dict(preset="token_null"), {"layers.attention.null_projection": SMALL}),
        (
            dict(preset="residual", norm="gatednorm"),
            {"layers.mlp_norm.gate_down": MATRIX, "layers.mlp_norm.gate_up": MATRIX, "layers.mlp_norm.scale": SMALL},
        ),
        (
            dict(preset="residual", norm="dyt", mlp_gated=False, inputs="vectors", vector_dim=5),
            {
                "layers.mlp_norm.alpha": SMALL,
                "layers.mlp_norm.shift": SMALL,
                "embedding.table": MATRIX,
                "head.kernel": MATRIX,
            },
        ),
        (dict(preset="residual", norm="preaffine"), {"final_norm.pre_scale": SMALL}),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if "preset" in x else "",
)
def test_roles_of_what_other_models_have(options, expected):
    roles = by_path(parameter_roles(ModelConfig(**dict(vocab_size=V) | options)))
    assert {name: tuple(ROLES[roles[name]]) for name in expected} == expected


def updates_of(model: ModelConfig, gradients, **options) -> dict:
    config = OptimizerConfig(**dict(learning_rate=0.1, warmup_steps=0, schedule="constant") | options)
    optimizer, params = make_optimizer(config, 10, model), parameters(model)
    return optimizer.update(gradients, optimizer.init(params), params)[0]


@pytest.mark.parametrize("multiplier", [1.0, 3.0, 0.0])
def test_without_a_gradient_weight_decay_moves_what_decays_and_nothing_else(multiplier):
    params = parameters(MODEL)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = by_path(updates_of(MODEL, zeros, weight_decay=0.2, router_multiplier=multiplier))
    for name, p in by_path(params).items():
        decays, _, group = by_path(EXPECTED)[name]
        rate = 0.1 * 0.2 * decays * (multiplier if group == "router" else 1.0)
        np.testing.assert_allclose(updates[name], -rate * p, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("model", [MODEL, ModelConfig(preset="attnres", vocab_size=V, width=D, num_layers=2)])
def test_the_router_multiplier_multiplies_the_updates_of_routers_and_nothing_else(model):
    random = np.random.default_rng(1)
    gradients = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), parameters(model))
    plain = by_path(updates_of(model, gradients))
    multiplied = by_path(updates_of(model, gradients, router_multiplier=0.25))
    routers = [name for name in plain if name.startswith("routers.")]
    assert len(routers) == (4 if model is MODEL else 2)
    for name, update in plain.items():
        assert np.abs(update).min() > 0
        np.testing.assert_array_equal(multiplied[name], (0.25 if name in routers else 1.0) * update, err_msg=name)


def test_a_negative_multiplier_is_refused():
    with pytest.raises(UserError, match=r"optimizer\.router_multiplier: must be at least 0, got -1\.0"):
        OptimizerConfig(router_multiplier=-1.0)


def test_flops_count_what_multiplies():
    """By hand: every matrix of a layer once a token, routers' two products, an untied head; no bias, gain or null."""
    length = 5
    found = forward_flops(MODEL, length)
    attention = D * N * H + 2 * D * K * H + N * H * D + D * N  # query, key, value, output, gate per head
    assert found["linear"] == 2 * LAYERS * (attention + 3 * D * F)
    assert found["head"] == 2 * D * V
    assert found["attention"] == LAYERS * 4 * N * H * (length + 1) / 2
    assert found["routing"] == 2 * LAYERS * 2 * 2 * D * C + 4 * D * (2 + 3 + 3 + 4)


def test_a_model_without_routers_has_no_group_of_them():
    """The multiplier then changes nothing, and is no error."""
    model = ModelConfig(preset="residual", vocab_size=V, width=D, num_layers=1)
    gradients = jax.tree.map(jnp.ones_like, parameters(model))
    for x, y in zip(*(jax.tree.leaves(updates_of(model, gradients, router_multiplier=m)) for m in (1.0, 7.0))):
        np.testing.assert_array_equal(x, y)


def test_state_of_the_optimizer_holds_moments_for_every_parameter():
    params = parameters(MODEL)
    state = make_optimizer(OptimizerConfig(router_multiplier=2.0), 10, MODEL).init(params)
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
    (adam,) = (part for part in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(part))
    for moments in (adam.mu, adam.nu):
        assert jax.tree.map(jnp.shape, moments) == jax.tree.map(jnp.shape, params)
