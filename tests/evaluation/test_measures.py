"""The measures against numpy in float64, on statistics computed apart from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation.toys import (
    BATCH,
    LENGTH,
    NORMALIZERS,
    ROUNDING,
    WITH_NULL,
    build,
    forward,
    materialized,
    measure_family,
    token_batches,
)
from sampling import sampled

from oasis_jax.config import PRESETS, ModelConfig
from oasis_jax.evaluation import DEFINITIONS, EVALUATORS, evaluate_model
from oasis_jax.evaluation.measures.depth import depth_sinks, source_columns
from oasis_jax.evaluation.measures.outliers import kurtosis, token_kurtosis
from oasis_jax.evaluation.measures.probabilities import conditional_mass
from oasis_jax.evaluation.measures.sinks import sink_rate
from oasis_jax.model import decoder
from oasis_jax.model.decoder import Decoder
from oasis_jax.model.wiring import schedule


def measure(model: Decoder, batches: list[dict]) -> dict:
    """All measures in one pass: tests of the same model share its compilation."""
    return evaluate_model(model, batches, EVALUATORS)


@pytest.mark.parametrize("normalizer", sampled(NORMALIZERS, ("softmax", "softmax1", "entmax15")))
def test_sinks_equal_those_of_materialized_probabilities(normalizer):
    model, batches = build(normalizer=normalizer), token_batches()
    _, statistics = forward(model, batches)
    p = []
    for layer, module in zip(statistics.attention, model.layers):
        learned = (
            np.asarray(module.attention.parameters["null_logit"], np.float64)
            if normalizer == "learned_sink"
            else np.zeros(6)
        )
        p.append(materialized(layer, model.config, learned))
    p = np.stack(p, 1)  # [B, L, N, T, T]
    first, omega = p[..., 0], np.maximum(0, 1 - p.sum(-1))
    metrics = measure(model, batches)

    def close(name, expected):
        np.testing.assert_allclose(metrics[name], expected, atol=ROUNDING, err_msg=name)

    close("first_token_mass", first.mean())
    close("first_token_mass_by_head", first.mean((0, 3)))
    close("first_token_mass_by_position", first.mean((0, 2)))
    close("sink_rate", (first.mean(-1) > 0.3).mean())
    null_names = [name for name in EVALUATORS["sinks"].definitions if "null" in name or "conditional" in name]
    if normalizer not in WITH_NULL:
        assert [metrics[name] for name in null_names] == [None] * 6
        return
    close("null_mass", omega.mean())
    close("null_mass_by_head", omega.mean((0, 3)))
    close("null_mass_by_position", omega.mean((0, 2)))
    attending = 1 - omega > 1e-4
    share = np.where(attending, first / np.where(attending, 1 - omega, 1), 0).sum(-1) / np.maximum(attending.sum(-1), 1)
    close("first_token_mass_conditional", share.mean())
    close("first_token_mass_conditional_by_head", share.mean(0).mean(0) if share.ndim == 4 else share.mean(0))
    close("sink_rate_conditional", (share > 0.3).mean())


def test_sink_rate_counts_the_heads_of_each_sequence():
    mass = np.zeros((2, 3, 5))
    mass[0, 1, :4] = 0.31
    mass[1] = 0.29
    assert sink_rate(mass).value == pytest.approx(4 / 30)


def test_conditional_mass_of_a_row_that_attends_to_nothing_is_left_out():
    share, attending = conditional_mass(np.float32([0.2, 1e-9]), np.float32([0.5, 1.0]))
    np.testing.assert_allclose(share, [0.4, 0.0])
    np.testing.assert_array_equal(attending, [True, False])


def numpy_kurtosis(x: np.ndarray) -> float:
    x = x.astype(np.float64).ravel()
    return ((x - x.mean()) ** 4).mean() / (x.std(ddof=1) ** 4 + 1e-6)


def test_kurtosis_of_known_distributions():
    random = np.random.default_rng(3)
    gauss, laplace = random.standard_normal((1, 500, 401)), random.laplace(size=(1, 500, 401))
    assert kurtosis(gauss.astype(np.float32))[0] == pytest.approx(3, rel=0.03)
    assert kurtosis(laplace.astype(np.float32))[0] == pytest.approx(6, rel=0.05)


def test_kurtosis_of_a_small_and_shifted_tensor():
    x = 7 + 0.01 * np.random.default_rng(4).standard_normal((2, 5, 3)).astype(np.float32)
    np.testing.assert_allclose(kurtosis(x), [numpy_kurtosis(row) for row in x], rtol=1e-3)


@pytest.mark.parametrize("size", [1e-12, 1e-2, 1.0, 1e10, 1e15])
def test_kurtosis_of_any_size_is_that_of_float64(size):
    """1e-12: far below the 1e-6 of the definition; 1e10: the fourth power is beyond float32."""
    x = size * np.random.default_rng(4).laplace(size=(2, 5, 3)).astype(np.float32)
    for measure, axis in ((kurtosis, None), (token_kurtosis, -1)):
        expected = [
            np.mean([numpy_kurtosis(part) for part in ([row] if axis is None else row)]) for row in x.astype(float)
        ]
        np.testing.assert_allclose(measure(x), expected, rtol=1e-5, atol=1e-30)


def test_kurtosis_says_its_constant_and_nan_stays_nan():
    for name in ("avg_kurtosis", "kurtosis_by_tap", "max_token_kurtosis"):
        assert "(std^4 + 1e-6)" in DEFINITIONS[name]["average"]
    assert kurtosis(np.zeros((1, 2, 3), np.float32))[0] == 0
    for odd in (np.nan, np.inf):
        assert np.isnan(kurtosis(jnp.array([[[1.0, odd, 2.0]]]))[0])


def test_outliers_equal_numpy_at_every_tap():
    model, batches = build(preset="oasis"), token_batches()
    taps = forward(model, batches)[1].taps
    metrics = measure(model, batches)
    norms = {kind: [np.abs(x).max((1, 2)).mean() for x in layers] for kind, layers in taps.items()}
    kurtoses = {kind: [np.mean([numpy_kurtosis(row) for row in x]) for x in layers] for kind, layers in taps.items()}
    assert sorted(norms) == [
        "attention_norm",
        "attention_output",
        "final_norm",
        "layer_output",
        "mlp_norm",
        "mlp_output",
    ]
    for kind in norms:
        np.testing.assert_allclose(metrics["inf_norm_by_tap"][kind], norms[kind], rtol=1e-5)
        np.testing.assert_allclose(metrics["kurtosis_by_tap"][kind], kurtoses[kind], rtol=1e-4)
    every_norm, every_kurtosis = (
        [value for layers in kinds.values() for value in layers] for kinds in (norms, kurtoses)
    )
    expected = (
        max(every_norm),
        max(norms["mlp_output"]),
        max(norms["layer_output"]),
        np.mean(every_kurtosis),
        max(every_kurtosis),
    )
    names = ("max_inf_norm", "max_ffn_inf_norm", "max_layer_inf_norm", "avg_kurtosis", "max_kurtosis")
    np.testing.assert_allclose([metrics[name] for name in names], expected, rtol=1e-4)


def test_outliers_of_a_bfloat16_model_are_reduced_in_float32():
    model, batches = build(preset="oasis", dtype="bfloat16"), token_batches(1)
    tap = forward(model, batches)[1].taps["mlp_output"][0]
    value = measure(model, batches)["kurtosis_by_tap"]["mlp_output"][0]
    # Two compilations of a bfloat16 model differ by bfloat16's rounding, not more.
    assert value == pytest.approx(np.mean([numpy_kurtosis(row) for row in tap.astype(np.float32)]), rel=2e-2)


def test_perplexity_by_hand():
    model, batches = build(preset="oasis"), token_batches()
    logits = forward(model, batches)[0].astype(np.float64)
    assert logits.shape[-1] == 29  # the padding of the vocabulary takes no part
    targets, weights = (np.concatenate([batch[name] for batch in batches]) for name in ("targets", "weights"))
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    mean = (nats * weights).sum() / weights.sum()
    metrics = measure(model, batches)
    assert metrics["loss"] == pytest.approx(mean, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(np.exp(mean), rel=1e-5)
    assert metrics["bits_per_byte"] is None and metrics["squared_error"] is None
    descending = np.argsort(-logits, axis=-1, kind="stable")
    for k in (1, 5):
        among = (descending[..., :k] == targets[..., None]).any(-1)
        assert metrics[f"top_{k}_accuracy"] == pytest.approx((among * weights).sum() / weights.sum(), rel=1e-6)

    lengths = np.random.default_rng(5).integers(4, size=(len(batches), BATCH, LENGTH))
    measured = measure_family("perplexity", model, [batch | {"bytes": lengths[i]} for i, batch in enumerate(batches)])
    expected = (nats * weights).sum() / np.log(2) / (lengths.reshape(weights.shape) * weights).sum()
    assert measured["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


WIRINGS = [
    dict(preset="oasis"),
    dict(preset="attnres"),
    dict(preset="oasis_blocks", blocks=3),
    dict(preset="attnres_cumulative"),
]


@pytest.mark.parametrize("fields", WIRINGS, ids=lambda fields: fields["preset"])
def test_depth_equals_numpy(fields):
    model, batches = build(**fields), token_batches()
    found = forward(model, batches)[1].routers
    routers = {name: found[name] for name in schedule(model.config).routers}
    metrics = measure(model, batches)
    assert metrics["depth_routers"] == list(routers)
    entropies, largest = [], []
    for name, row, variance in zip(routers, metrics["depth_weights"], metrics["depth_weight_variance"]):
        alpha, null = (np.asarray(x, np.float64) for x in routers[name][:2])
        np.testing.assert_allclose([w for w in row if w is not None], alpha.mean((0, 1)), atol=ROUNDING)
        np.testing.assert_allclose([v for v in variance if v is not None], alpha.var(1).mean(0), atol=ROUNDING)
        outcomes = np.concatenate([alpha, null[..., None]], -1)
        entropies.append(-(outcomes * np.log(np.where(outcomes > 0, outcomes, 1))).sum(-1).mean())
        largest.append(alpha.max(-1).mean())
    assert metrics["depth_entropy"] == pytest.approx(np.mean(entropies), abs=ROUNDING)
    assert metrics["depth_max_weight"] == pytest.approx(np.mean(largest), abs=ROUNDING)
    embedding = [router.weights[..., 0].mean() for router in routers.values()]
    wide = [mean > 0.3 for mean, router in zip(embedding, routers.values()) if router.weights.shape[-1] >= 3]
    assert metrics["depth_embedding_weight"] == pytest.approx(np.mean(embedding), abs=ROUNDING)
    assert metrics["depth_sink_rate"] == pytest.approx(np.mean(wide))
    if fields["preset"].startswith("oasis"):
        betas = [np.logaddexp(0, float(router.parameters["beta_raw"])) for router in model.routers]
        np.testing.assert_allclose(metrics["beta_by_router"], betas, rtol=1e-5)
        assert metrics["beta"] == pytest.approx(np.mean(betas), rel=1e-5)
        assert metrics["depth_null_mass"] == pytest.approx(
            np.mean([router.null_mass.mean() for router in routers.values()]), abs=ROUNDING
        )
    else:
        assert metrics["beta"] is metrics["beta_by_router"] is metrics["depth_null_mass"] is None


def test_depth_sinks_count_only_routers_that_read_the_source():
    weights = [[0.9, 0.1, None, None], [0.5, 0.2, 0.3, None], [0.2, 0.4, 0.4, None]]
    assert depth_sinks(weights) == [1 / 2, 1 / 2, 1 / 2, None]  # the first router has two sources and does not count


def test_sources_are_named_by_what_they_hold():
    names, rows = source_columns(ModelConfig(preset="oasis", num_layers=3))
    assert names == ["embedding", "layer0", "layer1", "own attention", "own mlp"]
    assert rows["layer0.mlp"] == [0, 3, 4] and rows["layer2.attention"] == [0, 1, 2, 3]
    names, rows = source_columns(ModelConfig(preset="attnres", num_layers=2))
    assert names == ["embedding", "layer0.attention", "layer0.mlp", "layer1.attention", "layer1.mlp"]
    assert rows["layer0.mlp"] == [0, 1] and rows["final"] == [0, 1, 2, 3, 4]
    # Six sublayers in four blocks: the first two hold two.
    names, rows = source_columns(ModelConfig(preset="oasis_blocks", num_layers=3, blocks=4))
    assert names == ["embedding", "block1", "block2", "block3", "block4"]
    assert rows["layer0.mlp"] == rows["layer1.attention"] == [0, 1] and rows["layer1.mlp"] == [0, 1, 2]
    assert rows["layer2.mlp"] == [0, 1, 2, 3] and rows["final"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("blocks", range(7))
def test_sources_of_a_router_are_as_many_as_its_weights(blocks):
    model = build(preset="attnres", num_layers=3, blocks=blocks)
    places = source_columns(model.config)[1]
    _, statistics = jax.eval_shape(
        lambda params, inputs: decoder.forward(params, model.config, inputs),
        model.parameters(),
        token_batches(1)[0]["inputs"],
    )
    assert len(statistics.routers) == 6
    for name, router in statistics.routers.items():
        assert len(places[name]) == router.weights.shape[-1], name


def trigger_batches() -> list[dict]:
    random = np.random.default_rng(6)
    shape = (BATCH, LENGTH)
    vectors = lambda: random.standard_normal((*shape, 5)).astype(np.float32)
    mask = random.random(shape) < 0.3
    return [
        {"inputs": vectors(), "targets": vectors(), "weights": np.ones(shape, np.float32), "trigger": m}
        for m in (mask, ~mask)
    ]


@pytest.mark.parametrize("normalizer", ["softmax", "softmax1"])
def test_trigger_rows_equal_numpy(normalizer):
    model, batches = build(normalizer=normalizer, inputs="vectors", preset="residual"), trigger_batches()
    outputs, statistics = forward(model, batches)
    trigger = np.concatenate([batch["trigger"] for batch in batches])
    others = ~trigger
    others[:, 0] = False
    metrics = measure(model, batches)
    for mass in ("first_token_mass", "null_mass"):
        by_layer = np.stack([getattr(layer, mass) for layer in statistics.attention], 1)  # [B, L, N, T]
        for kind, mask in (("trigger", trigger), ("non_trigger", others)):
            expected = (by_layer * mask[:, None, None]).sum((0, 3)) / mask.sum()
            if normalizer == "softmax" and mass == "null_mass":
                assert metrics[f"{kind}_{mass}"] is metrics[f"{kind}_{mass}_by_head"] is None
                continue
            np.testing.assert_allclose(metrics[f"{kind}_{mass}_by_head"], expected, atol=ROUNDING)
            assert metrics[f"{kind}_{mass}"] == pytest.approx(expected.mean(), abs=ROUNDING)
    assert metrics["non_trigger_first_token_mass_max"] == np.max(metrics["non_trigger_first_token_mass_by_head"])
    error = (outputs - np.concatenate([batch["targets"] for batch in batches])) ** 2
    assert metrics["squared_error"] == pytest.approx(error.mean(), rel=1e-5)
    assert metrics["perplexity"] is None


def test_depth_weights_that_sum_to_anything_have_no_entropy_and_no_joint_distribution():
    model, batches = build(preset="oasis", depth_normalizer="sigmoid"), token_batches(1)
    routers = forward(model, batches)[1].routers.values()
    metrics = evaluate_model(model, batches, {name: EVALUATORS[name] for name in ("depth", "joint")})
    assert {name for name, value in metrics.items() if value is None} == {
        "depth_entropy", *EVALUATORS["joint"].definitions
    }  # fmt: skip
    null_mass = np.mean([np.maximum(0, 1 - router.weights.astype(np.float64).sum(-1)) for router in routers])
    assert metrics["depth_null_mass"] == pytest.approx(null_mass, abs=ROUNDING) and null_mass > 0


def test_excess_risk_equals_numpy():
    model, batches = build(preset="residual"), token_batches()
    random = np.random.default_rng(8)
    for batch in batches:
        batch |= {"trigger": random.random(batch["inputs"].shape) < 0.4}
        batch |= {"optimal_nats": random.random(batch["inputs"].shape).astype(np.float32)}
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    logits = forward(model, batches)[0].astype(np.float64)
    exponentials = np.exp(logits)
    p = np.take_along_axis(exponentials, joined["targets"][..., None], -1)[..., 0] / exponentials.sum(-1)
    excess, others = -np.log(p) - joined["optimal_nats"], ~joined["trigger"]
    others[:, 0] = False
    metrics = measure(model, batches)
    assert metrics["trigger_excess_risk"] == pytest.approx(excess[joined["trigger"]].mean(), rel=1e-5)
    assert metrics["non_trigger_excess_risk"] == pytest.approx(excess[others].mean(), rel=1e-5)
    without = [{name: x for name, x in batch.items() if name != "optimal_nats"} for batch in batches]
    assert measure(model, without)["trigger_excess_risk"] is None


def test_what_does_not_apply_is_none_and_not_zero():
    metrics = measure(build(preset="residual"), token_batches(1))
    absent = {name for name, value in metrics.items() if value is None}
    assert {
        name for name in DEFINITIONS if name.startswith(("depth_", "beta", "trigger_", "non_trigger_", "null_mass"))
    } <= absent
    assert not absent & {"perplexity", "loss", "sink_rate", "max_inf_norm", "avg_kurtosis", "first_token_mass"}
    assert all("applies_to" in DEFINITIONS[name] for name in absent)


@pytest.mark.parametrize("preset", ["residual", "attnres", "oasis", "oasis_blocks"])
def test_every_metric_has_a_definition_and_one_pass_gives_what_each_evaluator_gives_alone(preset):
    model, batches = build(preset=preset, **({"blocks": 3} if PRESETS[preset]["blocks"] else {})), token_batches(1)
    metrics = measure(model, batches)
    assert set(metrics) == set(DEFINITIONS)
    if preset == "oasis":
        alone = {k: v for name in EVALUATORS for k, v in measure_family(name, model, batches).items()}
        flat, tree = jax.tree.flatten(metrics)
        flat_alone, tree_alone = jax.tree.flatten(alone)
        assert tree == tree_alone
        for one, other in zip(flat, flat_alone):
            assert one == other if isinstance(one, str) else one == pytest.approx(other, rel=1e-5, abs=ROUNDING)


def test_definitions_are_complete():
    for name, definition in DEFINITIONS.items():
        assert {"tensor", "average", "source"} <= set(definition) <= {"tensor", "average", "source", "applies_to"}, name
        assert all(definition.values()), name


def test_a_second_evaluation_compiles_nothing():
    from oasis_jax.evaluation.passes import _run

    model, batches = build(preset="oasis"), token_batches()
    measure(model, batches)
    before = _run._cache_size()
    measure(build(preset="oasis"), batches)
    assert _run._cache_size() == before


def test_no_batches_is_an_error():
    with pytest.raises(ValueError, match="batches is empty"):
        evaluate_model(build(preset="residual"), [], EVALUATORS)
