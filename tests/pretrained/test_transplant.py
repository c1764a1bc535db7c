"""Sink transplant and rotation: what they promise not to change, and what they change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretrained.tiny import random_model
from sampling import sampled

from oasis_jax import Context, LayerPattern, ModelConfig, UserError
from oasis_jax.model.mlp import hadamard
from oasis_jax.pretrained import Pretrained, find_prefix, rotate, sink_heads, transplant_sink
from oasis_jax.pretrained.rotation import random_rotation

BEGIN, VOCABULARY = 3, 29
SMALL = dict(width=24, num_heads=4, num_kv_heads=2, head_dim=8, num_layers=2, mlp_dim=20, vocab_size=VOCABULARY)
# What families of pretrained models have, and the wirings over softmax.
KINDS = {
    "plain": {},
    "scaled": dict(
        qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True, attention_scale=0.3, logit_softcap=5.0
    ),
    "positions": dict(learned_positions=40, position_offset=2, rope_theta=0.0, mlp_gated=False, mlp_activation="relu"),
    "multipliers": dict(residual_multiplier=0.4, embedding_multiplier=3.0, logits_multiplier=0.2, rope_fraction=0.5),
    "gated": dict(gate="per_head"),
    "gated channels": dict(gate="elementwise"),
    "full routing": dict(preset="attnres"),
    # seed 0 gives one whose logits move by 3e-5 where its parameters move by half a unit in the last place
    "cumulative routing": dict(preset="attnres_cumulative", seed=2),
    "qkv routing": dict(preset="attnres_qkv", blocks=3),
}


def pretrained(seed=0, **fields) -> Pretrained:
    return random_model(ModelConfig(**(SMALL | dict(preset="residual") | fields)), seed, BEGIN)


def text(rows=2, length=11, seed=1):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length)).astype(np.int32)


def logits(model, ids):
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.decoder()(jnp.asarray(ids))[0], np.float64)


def assert_close(actual, expected, tolerance=1e-5):
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    "kind, prefix",
    sampled(
        [*((kind, [BEGIN]) for kind in KINDS), ("plain", [BEGIN, 7, 19]), ("positions", [7, BEGIN])],
        [("scaled", [BEGIN]), ("full routing", [BEGIN]), ("plain", [BEGIN, 7, 19]), ("positions", [7, BEGIN])],
    ),
)
def test_a_transplant_computes_what_the_model_computed_behind_the_prefix(kind, prefix):
    model, ids = pretrained(**KINDS[kind]), text()
    whole = np.concatenate([np.broadcast_to(np.array(prefix, np.int32), (len(ids), len(prefix))), ids], axis=1)
    expected = logits(model, whole)[:, len(prefix) :]
    moved = transplant_sink(model, prefix)
    assert moved.begin_token is None and moved.config.position_offset == model.config.position_offset + len(prefix)
    assert_close(logits(moved, ids), expected)
    assert np.abs(logits(model, ids) - expected).max() > 1e-2 * np.abs(expected).max()  # the prefix does something


def test_a_transplanted_model_reports_the_mass_of_its_prefix_as_null_mass():
    model, ids = pretrained(), text()
    whole = np.insert(ids, 0, BEGIN, axis=1)
    before = model.decoder()(jnp.asarray(whole))[1].attention
    after = transplant_sink(model).decoder()(jnp.asarray(ids))[1].attention
    for old, new in zip(before, after):
        np.testing.assert_allclose(new.null_mass, old.first_token_mass[:, :, 1:], rtol=2e-4, atol=1e-6)


def test_a_transplant_follows_packed_documents():
    model, ids = pretrained(), text(rows=1)
    moved = transplant_sink(model)
    segments = np.array([[0] * 4 + [1] * 7], np.int32)
    positions = np.array([[*range(4), *range(7)]], np.int32)
    packed = moved.decoder()(
        jnp.asarray(ids), Context(positions=jnp.asarray(positions), segment_ids=jnp.asarray(segments))
    )
    assert_close(np.asarray(packed[0][:, 4:], np.float64), logits(moved, ids[:, 4:]))


def test_a_dropped_value_is_another_model():
    model, ids = pretrained(), text()
    assert (
        np.abs(logits(transplant_sink(model, value_scale=0.0), ids) - logits(transplant_sink(model), ids)).max() > 1e-3
    )


@pytest.mark.parametrize(
    "fields, prefix, message",
    [
        (dict(window=4), None, r"layers 0, 1 have a window"),
        (dict(num_layers=4, layer_pattern=(LayerPattern(), LayerPattern(window=3))), None, "layers 1, 3 have a window"),
        (dict(normalizer="softmax1"), None, "normalizer=softmax1"),
        ({}, [VOCABULARY], f"token {VOCABULARY} is outside the vocabulary 0..{VOCABULARY - 1}"),
        ({}, [], "the prefix is empty"),
    ],
)
def test_what_would_not_be_exact_is_refused(fields, prefix, message):
    with pytest.raises(UserError, match=message):
        transplant_sink(pretrained(**fields), prefix)


def test_a_model_without_a_begin_token_has_to_be_told():
    with pytest.raises(UserError, match="no begin token; name the tokens"):
        transplant_sink(pretrained().replace(begin_token=None))


def test_a_transplant_into_some_heads_leaves_the_others_without_a_null():
    model, ids = pretrained(), text()
    whole, none = (transplant_sink(model, heads=np.full((2, 4), value)) for value in (True, False))
    assert_close(logits(whole, ids), logits(transplant_sink(model), ids), 1e-6)
    moved = dataclasses.replace(model.config, position_offset=1)
    assert_close(logits(none, ids), logits(model.replace(config=moved), ids), 1e-6)
    some = np.arange(8).reshape(2, 4) % 3 == 0
    masses, wanted = (
        x.decoder()(jnp.asarray(ids))[1].attention[0].null_mass for x in (transplant_sink(model, heads=some), whole)
    )
    np.testing.assert_allclose(masses, np.asarray(wanted) * some[0][:, None], rtol=1e-5)


def test_sink_heads_are_those_with_the_mass_on_the_first_token():
    model, ids = pretrained(), text()
    statistics = model.decoder()(jnp.asarray(np.insert(ids, 0, BEGIN, axis=1)))[1].attention
    mass = np.stack([np.asarray(layer.first_token_mass[:, :, 1:]).mean(axis=(0, 2)) for layer in statistics])
    above = float(np.median(mass))
    np.testing.assert_array_equal(sink_heads(model, ids, above), mass > above)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(value_scale=1.5), "value_scale must lie between 0 and 1, got 1.5"),
        (dict(heads=np.ones((4, 2), bool)), r"heads must be booleans \[2, 4\], got bool \[4, 2\]"),
        (dict(heads=np.ones((2, 4))), r"heads must be booleans \[2, 4\], got float64 \[2, 4\]"),
    ],
)
def test_parts_of_a_transplant_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        transplant_sink(pretrained(), **options)


def test_the_prefix_is_found_where_massive_activations_are():
    """Two tokens whose embedding has one enormous channel: both are found, the more frequent one first."""
    model, ids = pretrained(), text(rows=3, length=17)
    first, second = 11, 5
    ids[:, ::4], ids[:, 2] = first, second
    table = np.asarray(model.params["embedding"]["table"]).copy()
    table[first, 0] = table[second, 0] = 1e6
    model = model.replace(params={**model.params, "embedding": {"table": jnp.asarray(table)}})
    assert find_prefix(model, ids) == [BEGIN, first, second]
    calm = pretrained()
    assert find_prefix(calm, text()) == [BEGIN]


@pytest.mark.parametrize(
    "kind, online",
    sampled(
        [*((kind, True) for kind in KINDS), ("plain", False), ("positions", False)],
        [("scaled", True), ("gated channels", True), ("cumulative routing", True), ("plain", False)],
    ),
)
def test_a_rotation_changes_nothing_in_float(kind, online):
    model, ids = pretrained(**KINDS[kind]), text()
    turned = rotate(model, seed=4, online=online)
    assert not turned.config.tied_head and bool(turned.config.mlp_rotation) == online
    assert_close(logits(turned, ids), logits(model, ids))


def test_a_rotation_after_a_transplant_and_before_one_are_exact():
    model, ids = pretrained(), text()
    expected = logits(model, np.insert(ids, 0, BEGIN, axis=1))[:, 1:]
    for both in (rotate(transplant_sink(model)), transplant_sink(rotate(model))):
        assert_close(logits(both, ids), expected)


def test_a_rotation_spreads_a_channel():
    model, ids = pretrained(), text()
    table = np.asarray(model.params["embedding"]["table"]).copy()
    table[:, 5] = 400.0
    model = model.replace(params={**model.params, "embedding": {"table": jnp.asarray(table)}})
    streams = [m.decoder()(jnp.asarray(ids))[1].taps["layer_output"][0] for m in (model, rotate(model))]
    ratio = [float(jnp.abs(x).max() / jnp.median(jnp.abs(x))) for x in streams]
    assert ratio[1] < ratio[0] / 10


@pytest.mark.parametrize("size", [1, 2, 16, 24, 36, 21])
def test_rotations_are_orthogonal_and_seeded(size):
    rotation = random_rotation(size, seed=3)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(size), atol=1e-12)
    np.testing.assert_array_equal(rotation, random_rotation(size, seed=3))
    assert size <= 2 or np.abs(rotation - random_rotation(size, seed=4)).max() > 0.1


def test_a_hadamard_matrix_has_entries_of_one_size():
    found = hadamard(8)
    np.testing.assert_allclose(np.abs(found), 8**-0.5, rtol=1e-12)
    np.testing.assert_allclose(found @ found, np.eye(8), atol=1e-12)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(norm="layernorm"), "norm=layernorm"),
        (dict(norm="dyt"), "norm=dyt"),
        (dict(residual_clip=3.0), "residual_clip=3.0"),
        (dict(mlp_rotation=4), "rotated already"),
    ],
)
def test_models_that_do_not_commute_with_a_rotation_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        rotate(pretrained(**fields))


def test_a_card_says_what_was_done():
    changes = rotate(transplant_sink(pretrained())).card["changes"]
    assert changes == ["sink transplanted: 3", "rotated: stream, values and MLP, seed 0"]


def test_mlp_rotation_has_to_divide_the_hidden_size():
    with pytest.raises(UserError, match=r"model.mlp_rotation: must be a power of two that divides the hidden size 20"):
        dataclasses.replace(pretrained().config, mlp_rotation=8)
