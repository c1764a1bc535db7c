"""Interventions against the decoder written out by hand: the cumulative wiring with the weights edited in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation.toys import build, forward, placed, token_batches
from flax import nnx

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.evaluation import evaluate_model
from oasis_jax.evaluation.interventions import INTERVENTIONS, families, intervene
from oasis_jax.model.decoder import Decoder

# Float32 losses of two compilations, and a change is the difference of two of them.
CLOSE = dict(rel=1e-5, abs=2e-5)


def loss_with_masked_routers(
    model: Decoder, batches: list[dict], masked: dict[str, list[int]], renormalize: bool
) -> float:
    """The oasis preset layer by layer; `masked`: router -> sources whose weight becomes 0."""
    total = weight = 0.0
    for batch in batches:
        h = model.embedding.parameters["table"][batch["inputs"]]
        history, evidence = [h], [jnp.zeros(h.shape[:2])]
        for index, layer in enumerate(model.layers):
            own, own_evidence = [], []
            for kind in ("attention", "mlp"):
                if kind == "attention":
                    output, statistics = layer.attention(layer.attention_norm(h))
                else:
                    output = layer.mlp(layer.mlp_norm(h))
                own, own_evidence = [*own, h + output], [*own_evidence, statistics.null_mass.mean(1)]
                _, found = model.routers[2 * index + (kind == "mlp")](history + own, evidence + own_evidence)
                alpha = np.array(found.weights, np.float64)
                alpha[..., masked.get(f"layer{index}.{kind}", [])] = 0
                alpha = alpha / (alpha.sum(-1) + np.asarray(found.null_mass))[..., None] if renormalize else alpha
                h = jnp.asarray(np.einsum("BTL,LBTD->BTD", alpha, np.stack(history + own)), jnp.float32)
            history, evidence = [*history, h], [*evidence, own_evidence[-1]]
        table = model.embedding.parameters["table"][: model.config.vocab_size]
        logits = np.asarray(model.final_norm(h) @ table.T, np.float64)
        nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        total, weight = total + (nats * batch["weights"]).sum(), weight + batch["weights"].sum()
    return total / weight


def effects_of(model, batches, **options) -> dict[tuple, object]:
    return {effect[:5]: effect for effect in intervene(*placed(model), batches, **options)}


def test_masked_sources_equal_the_model_written_out():
    model, batches = build(preset="oasis", num_layers=3), token_batches()
    base = evaluate_model(model, batches)
    found = effects_of(model, batches, interventions=["sources"])
    assert loss_with_masked_routers(model, batches, {}, False) == pytest.approx(base["loss"], rel=1e-5)
    cases = {
        ("embedding", "all", "all"): {f"layer{i}.{kind}": [0] for i in range(3) for kind in ("attention", "mlp")},
        ("current", "mlp", "middle"): {"layer1.mlp": [2, 3]},
        ("current", "attention", "late"): {"layer2.attention": [3]},
        ("older", "mlp", "late"): {"layer2.mlp": [1, 2]},
    }
    routers = forward(model, batches)[1].routers
    for (family, sublayers, band), masked in cases.items():
        for renormalized in (False, True):
            effect = found["sources", family, sublayers, band, renormalized]
            expected = loss_with_masked_routers(model, batches, masked, renormalized)
            assert effect.loss == pytest.approx(expected, **CLOSE), (family, sublayers, band, renormalized)
            assert effect.change == pytest.approx(expected - base["loss"], **CLOSE)
            assert effect.interval[0] <= effect.change <= effect.interval[1]
            weight = np.mean([routers[name].weights[..., sources].sum(-1).mean() for name, sources in masked.items()])
            assert effect.mean_weight == pytest.approx(weight, rel=1e-4)
    # Layer 0 has no older sources; every other family has every band and kind, with and without renormalizing.
    assert len(found) == 2 * (3 + 2 * (3 * 3 - 1))


def test_zero_beta_and_zero_evidence_are_the_same_model():
    model, batches = build(preset="oasis"), token_batches()
    found = {
        effect.intervention: effect for effect in intervene(*placed(model), batches, interventions=["beta", "evidence"])
    }
    bare = build(preset="oasis", coupling=False)
    state, of_model = nnx.state(bare), nnx.to_pure_dict(nnx.state(model))
    for router in of_model["routers"].values():
        del router["beta_raw"]
    nnx.replace_by_pure_dict(state, of_model)
    nnx.update(bare, state)
    for name in ("beta", "evidence"):
        assert found[name].loss == pytest.approx(evaluate_model(bare, batches)["loss"], **CLOSE)
    assert abs(found["beta"].change) > 1e-6  # the signal does something in this model


@pytest.mark.parametrize(
    ("name", "fields", "change"),
    [
        ("softmax", dict(normalizer="softmax1"), dict(normalizer="softmax")),
        ("softmax", dict(normalizer="learned_sink"), dict(normalizer="softmax")),
        ("depth_softmax", {}, dict(depth_normalizer="softmax")),
    ],
)
def test_other_normalizers_at_evaluation(name, fields, change):
    model, batches = build(preset="oasis", **fields), token_batches()
    (effect,) = intervene(*placed(model), batches, interventions=[name])
    other = Decoder(dataclasses.replace(model.config, **change), rngs=nnx.Rngs(0))
    parameters = nnx.to_pure_dict(nnx.state(model))
    for layer in parameters["layers"].values():
        layer["attention"].pop("null_logit", None)
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, parameters)
    nnx.update(other, state)
    expected = evaluate_model(other, batches)["loss"]
    assert effect.loss == pytest.approx(expected, **CLOSE)
    assert effect.change == pytest.approx(expected - evaluate_model(model, batches)["loss"], **CLOSE)


def test_without_the_begin_token_the_same_targets_are_compared():
    model, batches = build(preset="residual"), token_batches()
    (effect,) = intervene(*placed(model), batches, interventions=["begin_token"], begin_token=True)
    shorter = [{name: x[:, 1:] for name, x in batch.items()} for batch in batches]
    later = [batch | {"weights": batch["weights"] * (np.arange(11) > 0).astype(np.float32)} for batch in batches]
    assert effect.loss == pytest.approx(evaluate_model(model, shorter)["loss"], **CLOSE)
    assert effect.change == pytest.approx(effect.loss - evaluate_model(model, later)["loss"], **CLOSE)


def loss_and_first_token_mass(model: Decoder, batches: list[dict], norm) -> tuple[float, float]:
    """The residual preset written out, its norms by a function of (scale, h)."""
    total = weight = 0.0
    masses = []
    for batch in batches:
        h = np.asarray(model.embedding.parameters["table"][batch["inputs"]], np.float64)
        for layer in model.layers:
            normed = norm(layer.attention_norm.parameters["scale"], h)
            output, statistics = layer.attention(jnp.asarray(normed, jnp.float32))
            masses.append(np.mean(statistics.first_token_mass))
            h = h + np.asarray(output)
            h = h + np.asarray(layer.mlp(jnp.asarray(norm(layer.mlp_norm.parameters["scale"], h), jnp.float32)))
        kernel = np.asarray(model.head.parameters["kernel"][:, : model.config.vocab_size], np.float64)
        logits = norm(model.final_norm.parameters["scale"], h) @ kernel
        nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        total, weight = total + (nats * batch["weights"]).sum(), weight + batch["weights"].sum()
    return total / weight, np.mean(masses)


@pytest.mark.parametrize("name", ["sink_denominator", "sink_output"])
def test_a_residual_sink_is_taken_from_the_norms(name):
    sink, epsilon = 7, 0.3
    model, batches = build(preset="residual", norm_epsilon=epsilon, tied_head=False), token_batches(1)
    table = np.array(model.embedding.parameters["table"])
    table[:, sink] += 30
    model.embedding.table[...] = jnp.asarray(table)

    def norm(scale, h, changed):
        others = np.arange(h.shape[-1]) != sink
        counted = h[..., others] if changed and name == "sink_denominator" else h
        y = h / np.sqrt((counted**2).mean(-1, keepdims=True) + epsilon) * np.asarray(scale)
        return y * others if changed and name == "sink_output" else y

    (effect,) = intervene(*placed(model), batches, interventions=[name])
    before, after = (
        loss_and_first_token_mass(model, batches, lambda scale, h, x=x: norm(scale, h, x)) for x in (False, True)
    )
    assert effect.channel == sink and abs(effect.change) > 1e-2
    assert effect.loss == pytest.approx(after[0], rel=1e-4)
    assert effect.change == pytest.approx(after[0] - before[0], rel=1e-3)
    assert effect.sinks["first_token_mass"] == pytest.approx((before[1], after[1]), rel=1e-4)
    assert effect.sinks["null_mass"] == (None, None)


def test_a_fixed_beta_is_switched_off_as_a_learned_one():
    model, batches = build(preset="oasis", fixed_beta=3.0), token_batches(1)
    found = intervene(*placed(model), batches, interventions=["beta", "evidence"])
    assert found[0].loss == pytest.approx(found[1].loss, **CLOSE) and abs(found[0].change) > 1e-4
    assert found[0].sinks["null_mass"] == pytest.approx(found[1].sinks["null_mass"], abs=1e-5)
    assert found[0].sinks["null_mass"][0] == pytest.approx(evaluate_model(model, batches)["null_mass"], abs=1e-6)


def test_a_model_is_left_as_it_is():
    model, batches = build(preset="oasis"), token_batches(1)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    intervene(*placed(model), batches, interventions=["beta", "softmax"])
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))
    assert model.layers[0].attention.config.normalizer == "softmax1"


def test_a_diverged_model_has_no_loss_and_no_traceback():
    model = build(normalizer="softmax1")
    params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), model.parameters())
    found = intervene(params, model.config, placed(model)[2], token_batches(), interventions=["all"], begin_token=True)
    changes = [effect.change for effect in found if effect.reason is None]
    assert changes and np.isnan(changes).all()


def test_what_does_not_apply_says_why_and_has_no_loss():
    found = intervene(*placed(build(preset="residual", norm="none")), token_batches(1))
    assert [effect.intervention for effect in found] == list(INTERVENTIONS)
    assert all(effect.loss is None and "not applicable: only for " in effect.reason for effect in found)


def test_families_of_the_delta_wiring():
    config = ModelConfig(preset="oasis_blocks", num_layers=3, blocks=3)
    found = families(config)
    assert found["layer0.mlp"] == {"embedding": [0], "older": [], "current": [1]}
    assert found["final"] == {"embedding": [0], "older": [1, 2], "current": [3]}
    effects = effects_of(
        build(preset="oasis_blocks", blocks=3, num_layers=3), token_batches(1), interventions=["sources"]
    )
    assert ("sources", "older", "final", "late", True) in effects
    three = families(ModelConfig(preset="attnres_qkv", num_layers=3, blocks=3))
    assert [name for name, members in three.items() if members["older"] == [1]] == [
        "layer1.mlp", "layer2.attention.query", "layer2.attention.key", "layer2.attention.value"
    ]  # fmt: skip


@pytest.mark.parametrize("names", [["source"], ["all", "betas"]])
def test_unknown_interventions_are_named(names):
    with pytest.raises(
        UserError, match=r"^interventions: unknown name '(source|betas)' \(did you mean '(sources|beta)'\?\)"
    ):
        intervene(*placed(build(preset="residual")), token_batches(1), interventions=names)


def test_no_batch():
    with pytest.raises(UserError, match="batches is empty"):
        intervene(*placed(build(preset="residual")), [])
