"""The joint mass of depth and tokens, against q(i, j) written out in float64."""

import numpy as np
import pytest
from evaluation.toys import ROUNDING, all_probabilities, build, forward, measure_family, token_batches

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation.measures.joint import NEAR_NO_OP, source_layers
from oasis_jax.model.wiring import schedule

CASES = [
    dict(preset="oasis"),
    dict(preset="attnres"),
    dict(preset="oasis_blocks", blocks=2),
    dict(preset="oasis", normalizer="learned_sink"),
    dict(preset="oasis", normalizer="clipped"),
]


def xlogx(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1))


def materialized_joint(p, null_mass, alpha, depth_null, layers, variant) -> dict[str, np.ndarray]:
    """Measures [B, N, T] of q, from p and null mass of all layers and the weights alpha [B, T, I] of one router."""
    batch, _, heads, length, _ = p.shape
    own = np.broadcast_to(np.eye(length), (batch, heads, length, length))
    branches = [own] + [p[:, layer] for layer in layers]
    nulls = [np.zeros((batch, heads, length))] + [null_mass[:, layer] for layer in layers]
    weights, rest = alpha, depth_null
    if variant == "attention_only_conditional":
        scale = 1 / (1 - alpha[..., :1])
        weights, rest, branches, nulls = alpha[..., 1:] * scale, depth_null * scale[..., 0], branches[1:], nulls[1:]
    q = np.stack(
        [w[:, None, :, None] * b for w, b in zip(np.moveaxis(weights, -1, 0), branches)], -2
    )  # [B, N, T, I, T]
    lost = np.stack([w[:, None] * b for w, b in zip(np.moveaxis(weights, -1, 0), nulls)], -1)
    return {
        "leakage_first_token": q[..., 0].sum(-1),
        "leakage_prefix_4": q[..., :4].sum((-2, -1)),
        "concentration": q.max((-2, -1)),
        "negative_entropy": xlogx(q).sum((-2, -1)) + xlogx(lost).sum(-1) + xlogx(rest)[:, None],
    }


@pytest.mark.parametrize("fields", CASES, ids=lambda fields: "-".join(map(str, fields.values())))
def test_joint_measures_equal_q(fields):
    model, batches = build(**fields), token_batches()
    _, statistics = forward(model, batches)
    p = all_probabilities(model, statistics)
    null = np.stack([layer.null_mass for layer in statistics.attention], 1).astype(np.float64)
    outputs = np.stack([layer.head_output for layer in statistics.attention], 1).astype(np.float64)
    norms = np.linalg.norm(outputs, axis=-1).transpose(0, 1, 3, 2)  # [B, layer, N, T]
    metrics = measure_family("joint", model, batches)
    places = source_layers(model.config)
    largest = {name: norms[:, sorted(set(layers))].max(1) for name, layers in places.items()}
    pooled = np.stack([largest[name] for name in schedule(model.config).routers], 1)
    flat = np.sort(pooled.reshape(len(pooled), -1))
    threshold = flat[:, int(NEAR_NO_OP * (flat.shape[1] - 1))][:, None, None]
    for variant in ("identity_outcome", "attention_only_conditional"):
        values = {
            name: materialized_joint(
                p, null, *(np.asarray(x, np.float64) for x in statistics.routers[name][:2]), layers, variant
            )
            for name, layers in places.items()
        }
        for measure, first in {
            "leakage_first_token": 1,
            "leakage_prefix_4": 4,
            "concentration": 1,
            "negative_entropy": 1,
        }.items():
            every = np.stack([values[name][measure] for name in schedule(model.config).routers], 1)[..., first:]
            name = f"joint_{measure}_{variant}"
            # Sums over up to six branches of products of two rounded probabilities.
            assert metrics[name] == pytest.approx(every.mean(), abs=4 * ROUNDING), name
            np.testing.assert_allclose(
                metrics[f"{name}_by_router"], every.mean((0, 2, 3)), atol=4 * ROUNDING, err_msg=name
            )
            chosen = (pooled <= threshold[:, None] * (1 + 1e-6))[..., first:]
            assert metrics[f"{name}_near_no_op"] == pytest.approx(every[chosen].mean(), abs=4 * ROUNDING), name
    assert metrics["joint_layer_coverage"] == 1.0


def test_sources_stem_from_the_layers_that_made_them():
    assert source_layers(ModelConfig(preset="oasis", num_layers=2)) == {
        "layer0.attention": [0],
        "layer0.mlp": [0, 0],
        "layer1.attention": [0, 1],
        "layer1.mlp": [0, 1, 1],
    }
    assert source_layers(ModelConfig(preset="attnres", num_layers=2))["final"] == [0, 0, 1, 1]
    assert source_layers(ModelConfig(preset="oasis_blocks", num_layers=4, blocks=4))["final"] == [0, 1, 2, 3]
    assert source_layers(ModelConfig(preset="oasis_blocks", num_layers=4, blocks=3)) is None


@pytest.mark.parametrize("fields", [dict(preset="residual"), dict(preset="oasis_blocks", num_layers=4, blocks=3)])
def test_models_without_sources_of_one_layer_are_not_applicable(fields):
    assert set(measure_family("joint", build(**fields), token_batches(1)).values()) == {None}
