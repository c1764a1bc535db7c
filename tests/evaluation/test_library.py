"""`measure` on somebody else's models: the example of docs/measure.md, NNX, Linen, our stack from outside, and
mistakes.
"""

import pathlib
import re
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
from evaluation.toys import ROUNDING, VOCAB, build, token_batches
from flax import nnx

from oasis_jax import AttentionConfig, RouterConfig, Statistics, UserError, linen
from oasis_jax.evaluation import DEFINITIONS, EVALUATORS, measure, measure_model
from oasis_jax.placement import UNSHARDED

HERE = pathlib.Path(__file__).parent
WIDTH = 20


def test_the_example_of_the_documentation_runs_as_it_is_shown(capsys):
    text = (HERE.parents[1] / "docs" / "measure.md").read_text()
    example, ours = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    body = example.split("\n\n", 2)[2]  # after the imports
    assert len([line for line in body.splitlines() if line.strip()]) <= 20
    names: dict = {}
    exec(compile(example, "docs/measure.md", "exec"), names)
    found = names["found"]
    printed = capsys.readouterr().out.split()
    assert float(printed[0]) == found.values["sink_rate"] and float(printed[-1]) == found.values["null_mass"]
    # What the numbers are, apart from the library: softmax1 over the scores of the one layer.
    model = nnx.merge(names["graphdef"], names["params"])
    _, (layer,) = model(names["tokens"][:, :-1])
    scores = np.einsum(
        "btnh,bsnh->bnts", np.asarray(layer.query, np.float64), np.asarray(layer.key, np.float64)
    ) / np.sqrt(6)
    e = np.where(np.tril(np.ones((32, 32), bool)), np.exp(scores), 0)
    p = e / (1 + e.sum(-1, keepdims=True))
    assert found.values["null_mass"] == pytest.approx((1 - p.sum(-1)).mean(), abs=ROUNDING)
    assert found.values["max_probability"] == pytest.approx(p.max(-1).mean(), abs=ROUNDING)
    assert found.values["sink_rate"] == pytest.approx((p[..., 0].mean(-1) > 0.3).mean())
    assert 60 < found.values["perplexity"] < 90  # 64 tokens, never trained

    decoder, batches = build(preset="oasis"), token_batches(1)
    state, config = SimpleNamespace(params=decoder.parameters()), SimpleNamespace(model=decoder.config)
    names = dict(model=decoder, batches=batches, state=state, config=config, placement=UNSHARDED)
    exec(compile(ours, "docs/measure.md", "exec"), names)
    assert names["values"].items() <= names["found"].values.items()


class ForeignLinen(nn.Module):
    """Two attention layers and a router of ours in a model of its own."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, WIDTH)(tokens)
        a, first = linen.Attention(AttentionConfig(width=WIDTH, num_heads=5, normalizer="softmax1"))(x)
        b, second = linen.Attention(AttentionConfig(width=WIDTH, num_heads=5, normalizer="softmax"))(x + a)
        evidence = [0 * first.null_mass.mean(1), first.null_mass.mean(1), second.null_mass.mean(1)]
        h, router = linen.Router(RouterConfig(width=WIDTH, depth_normalizer="softmax"))([x, x + a, x + a + b], evidence)
        statistics = Statistics([first, second], {"only": router}, {"layer_output": [x + a, x + a + b]})
        return nn.Dense(VOCAB)(h), statistics


def test_a_foreign_linen_model_with_a_router():
    model, batches = ForeignLinen(), token_batches()
    params = model.init(jax.random.key(0), batches[0]["inputs"])
    found = measure(model.apply, params, batches, measures=["all"])
    assert set(found.values) == set(DEFINITIONS)
    _, statistics = model.apply(params, np.concatenate([batch["inputs"] for batch in batches]))
    alpha = np.asarray(statistics.routers["only"].weights, np.float64)
    np.testing.assert_allclose(found.values["depth_weights"], [alpha.mean((0, 1))], atol=ROUNDING)
    assert found.values["depth_sources"] == ["source0", "source1", "source2"]
    assert found.values["depth_null_mass"] is None  # a softmax router has none: not 0
    stream = np.abs(np.asarray(statistics.taps["layer_output"][1]))
    assert found.values["max_layer_inf_norm"] >= stream.max((1, 2)).mean() * (1 - 1e-5)
    null = np.stack([layer.null_mass for layer in statistics.attention], 1)
    assert found.values["null_mass"] == pytest.approx(null.mean(), abs=ROUNDING)
    absent = {name for name, value in found.values.items() if value is None}
    assert {
        "max_ffn_inf_norm",
        "norm_gain_at_sink",
        "trigger_null_mass",
        "joint_layer_coverage",
        "bits_per_byte",
    } <= absent
    assert not absent & {
        "sink_rate",
        "beta",
        "value_drain",
        "attention_entropy",
        "massive_activations",
        "avg_kurtosis",
        "loss",
    }


def test_our_decoder_from_outside_measures_the_same():
    model, batches = build(preset="oasis"), token_batches()
    graphdef, params = nnx.split(model)
    names = [
        name for name in EVALUATORS if name not in ("joint", "residual_sinks")
    ]  # these read the config and the norms too
    outside = measure(lambda params, inputs: nnx.merge(graphdef, params)(inputs), params, batches, measures=names)
    inside = measure_model(model, batches, {name: EVALUATORS[name] for name in names})
    assert outside.identity == inside.identity
    # A foreign model's depth matrix names sources by age and has no gaps.
    shared = [
        name for name in inside.values if not name.startswith(("depth_weight", "depth_sources", "depth_sink_rate_by"))
    ]
    for name in shared:
        one, other = (found.values[name] for found in (outside, inside))
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
            if isinstance(x, str):
                assert x == y
            else:
                np.testing.assert_allclose(x, y, rtol=2e-6, atol=5e-5)


def test_a_model_that_says_nothing_about_itself_has_a_loss_and_nothing_else():
    batch = token_batches(1)[0]
    found = measure(
        lambda table, inputs: table[inputs], np.zeros((VOCAB, VOCAB), np.float32), [batch], measures=["all"]
    )
    assert found.values["loss"] == pytest.approx(np.log(VOCAB), rel=1e-6)
    first_five = [(batch["targets"] < k).astype(float) * batch["weights"] for k in (1, 5)]  # of equal logits the first
    shares = [found.values[f"top_{k}_accuracy"] for k in (1, 5)]
    np.testing.assert_allclose(shares, [x.sum() / batch["weights"].sum() for x in first_five], rtol=1e-5)
    known = {"loss", "perplexity", "top_1_accuracy", "top_5_accuracy"}
    assert {name for name, value in found.values.items() if value is not None} == known


def nothing(params, inputs):
    return inputs


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            dict(measures=["sink"]),
            r"^measures: unknown name 'sink' \(did you mean 'sinks'\?\); allowed: default, all, perplexity",
        ),
        (dict(measures=["sink_rate"]), "^measures: 'sink_rate' is one of the values of 'sinks'; ask for that$"),
        (dict(measures=[]), "^measures: give at least one of default"),
        (dict(batches=[]), "^measure: batches is empty; give at least one$"),
        (dict(batches=[{"tokens": 1}]), "^measure: batch 0 has no 'inputs', only tokens$"),
        (dict(batches=[3]), "^measure: batch 0 has to be a dict of arrays, got int$"),
        (
            dict(batches=[{"inputs": [[1, 2]]}]),
            r"^measure: batch 0: 'inputs' has to be an array \[batch, length, ...\]$",
        ),
        (
            dict(batches=[{"inputs": np.zeros((2, 5), int)}, {"inputs": np.zeros((3, 7), int)}]),
            "^measure: batch 1 has sequences of 7 tokens, the first one of 5; measure each length alone",
        ),
        (
            dict(batches=[{"inputs": np.zeros((2, 5), int), "targets": np.zeros((2, 4), int)}]),
            r"^measure: batch 0: 'targets' has shape \(2, 4\) where inputs have \(2, 5\)$",
        ),
        (dict(measures="sinks"), r"^measures: expected a list of names, such as \['sinks'\], got 'sinks'$"),
        (dict(measures=None), "^measures: expected a list of names, "),
        (dict(batches=[{"inputs": np.zeros((2, 0), int)}]), r"^measure: batch 0 is empty: inputs of shape \(2, 0\)$"),
        (dict(apply_fn=lambda params, inputs: (inputs, [inputs])), "^measure: apply_fn has to return outputs, or"),
    ],
)
def test_mistakes_are_named(options, says):
    given = dict(apply_fn=nothing, params=np.zeros(1), batches=[{"inputs": np.zeros((1, 3), np.int32)}]) | options
    with pytest.raises(UserError, match=says):
        measure(**given)


def test_one_token_sequences_have_no_other_token_to_compare_with():
    model = build(preset="oasis")
    found = measure_model(model, [{name: x[:, :1] for name, x in token_batches(1)[0].items()}], EVALUATORS)
    assert found.values["value_drain"] is None and found.values["secondary_sink_rate"] is None
    assert found.values["first_token_mass"] is not None and found.values["joint_concentration_identity_outcome"] is None
