"""The pass that serves all measures: what it holds, what it compiles, and what rows that fill a batch up change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation.toys import ROUNDING, build, placed, token_batches

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation import EVALUATORS, choose, evaluate, evaluate_params, measure_model
from oasis_jax.evaluation.passes import DecoderPass, _run, lower, padded_rows
from oasis_jax.model.decoder import parameter_shapes
from oasis_jax.model.layout import stack_layers


def temporary_bytes(families: dict, batch: int = 4, length: int = 64, **fields) -> int:
    """Of the compiled pass, from shapes alone."""
    config = ModelConfig(**dict(preset="residual", width=32, num_heads=2, vocab_size=64) | fields)
    kinds = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct((batch, length), kind) for name, kind in kinds.items()}
    compiled = lower(DecoderPass(config), parameter_shapes(config), batch, families).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_batch_times_vocabulary():
    """Logits of all positions would be 16 MiB; a piece is no larger than two activations, the weights of the head 1
    MiB.
    """
    batch, length, width, vocab = 8, 64, 32, 8192
    sizes = dict(batch=batch, length=length, num_layers=1)
    small, large = (temporary_bytes(choose(["perplexity"]), vocab_size=size, **sizes) for size in (64, vocab))
    logits, head = 4 * batch * length * vocab, 4 * width * vocab
    assert large - small < logits / 4
    assert large - small < 3 * head + 8 * 4 * batch * length * width
    twice = temporary_bytes(choose(["perplexity"]), vocab_size=vocab, **sizes | dict(batch=2 * batch))
    assert twice - large < logits / 8


def test_only_rows_of_a_layer_outlive_it():
    """Four more layers cost all measures no more than they cost perplexity, but for a fifth of one activation a layer:
    rows are there twice while those of all layers are stacked.
    """
    activation, grown = 4 * 8 * 128 * 64, {}
    sizes = dict(batch=8, length=128, width=64, num_heads=2)
    families = {name: evaluator for name, evaluator in EVALUATORS.items() if name != "joint"}  # it keeps [B, N, T]
    for name, chosen in (("all", families), ("perplexity", choose(["perplexity"]))):
        few, many = (temporary_bytes(chosen, num_layers=layers, **sizes) for layers in (2, 6))
        grown[name] = (many - few) / 4
    assert grown["all"] - grown["perplexity"] < 0.2 * activation


def test_stacked_parameters_measure_as_those_of_modules():
    model, batches = build(preset="oasis"), token_batches(1)
    one, other = (
        evaluate_params(params, *placed(model)[1:], batches)
        for params in (stack_layers(model.parameters()), model.parameters())
    )
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, float):
            assert value == pytest.approx(other[name], rel=1e-5, abs=ROUNDING), name


def test_batches_of_two_sizes_are_one_program_and_count_what_they_hold():
    model, (first, second) = build(preset="oasis"), token_batches()
    smaller = {name: x[:1] for name, x in second.items()}
    chosen, before = choose(["perplexity", "outliers"]), _run._cache_size()
    both = evaluate(*placed(model), [first, smaller], chosen)
    assert _run._cache_size() == before + 1
    joined = {name: np.concatenate([first[name], smaller[name]]) for name in first}
    together = evaluate(*placed(model), [joined], chosen)
    assert both.identity["sequences"] == 4
    for name in ("loss", "top_5_accuracy", "avg_kurtosis", "max_inf_norm"):
        assert len(both.estimates[name].totals) == 4
        assert both.values[name] == pytest.approx(together.values[name], rel=1e-5)


def test_rows_that_fill_a_batch_up_repeat_the_last_with_weight_0():
    batch = token_batches(1)[0]
    filled = padded_rows(batch, 5)
    np.testing.assert_array_equal(filled["inputs"][3:], np.repeat(batch["inputs"][-1:], 2, 0))
    assert not filled["weights"][3:].any() and (filled["weights"][:3] == batch["weights"]).all()
    assert padded_rows(batch, 3) is batch


def test_three_documents_in_a_row_measure_as_three_rows():
    """Of equal length, so that what is averaged over queries or documents is the same; places beyond them
    hold nothing.
    """
    model, batch = build(preset="oasis"), token_batches(1)[0]
    row = {name: x.reshape(1, -1) for name, x in batch.items()}
    row["segment_ids"] = np.arange(33, dtype=np.int32)[None] // 11
    # As a trigger task says it: queries without a trigger, the first of each document left out.
    trigger = {"trigger": np.random.default_rng(7).random((3, 11)) < 0.4}
    apart = measure_model(model, [batch | trigger], EVALUATORS).values
    packed = measure_model(model, [row | {"trigger": trigger["trigger"].reshape(1, -1)}], EVALUATORS).values
    scalars = ["loss", "top_1_accuracy", "first_token_mass", "null_mass", "attention_entropy", "max_probability"]
    scalars += ["depth_entropy", "head_output_norm", "non_trigger_first_token_mass", "trigger_null_mass"]
    scalars += [name for name in apart if name.startswith("joint_") and not name.endswith(("_no_op", "_by_router"))]
    for name in scalars:
        assert packed[name] == pytest.approx(apart[name], rel=1e-4, abs=ROUNDING), name
    for name in ("first_token_mass_by_position", "null_mass_by_position", "token_mass_by_key"):
        values = np.array([layer[:11] for layer in packed[name]])
        np.testing.assert_allclose(values, apart[name], rtol=1e-4, atol=ROUNDING, err_msg=name)
        assert all(value is None for layer in packed[name] for value in layer[11:])
    rates = packed["sink_rate_by_key"]
    np.testing.assert_allclose(
        [rates[eps][:11] for eps in rates], list(apart["sink_rate_by_key"].values()), atol=ROUNDING
    )
    secondary = np.array(apart["secondary_sink_mass_by_head"])
    assert (np.array(packed["secondary_sink_mass_by_head"]) > secondary - ROUNDING).all()  # the largest of three


def test_learned_positions_of_packed_documents():
    """Positions given with a batch reach the model: documents packed into a row see the rows of the table that they
    would see alone.
    """
    model, batch = build(preset="residual", rope_theta=0.0, learned_positions=11), token_batches(1)[0]
    row = {name: x.reshape(1, -1) for name, x in batch.items()}
    places = np.arange(33, dtype=np.int32)[None]
    packed = row | {"segment_ids": places // 11, "positions": places % 11}
    one, other = (evaluate(*placed(model), [x], choose(["perplexity"])).values["loss"] for x in (batch, packed))
    assert one == pytest.approx(other, rel=1e-5)
