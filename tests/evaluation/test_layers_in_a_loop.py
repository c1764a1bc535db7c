"""Layers without routers are evaluated as a loop: with the values of layers one by one, in one program for all."""

import jax
import numpy as np
import pytest
from flax import nnx

from oasis_jax import UNSHARDED, Decoder, LayerPattern, ModelConfig
from oasis_jax.evaluation import choose, evaluate
from oasis_jax.evaluation.passes import DecoderPass, lower
from oasis_jax.evaluation.quantization import calibrate, losses, parse_scheme
from oasis_jax.evaluation.quantization.calibration import calibration_for
from oasis_jax.model import unrolled
from oasis_jax.model.layout import stack_layers

SMALL = dict(preset="residual", width=24, num_heads=4, num_kv_heads=2, num_layers=4, mlp_dim=32, vocab_size=29)
KINDS = {
    "alike": {},
    "pattern": dict(layer_pattern=(LayerPattern(window=3), LayerPattern(rope_theta=0.0)), norm="layernorm"),
}


@pytest.fixture(params=KINDS)
def model(request):
    config = ModelConfig(**(SMALL | KINDS[request.param]))
    return stack_layers(Decoder(config, rngs=nnx.Rngs(0)).parameters()), config, UNSHARDED


def batches(count=2, rows=3, length=9):
    random = np.random.default_rng(0)
    tokens = random.integers(0, 29, (count, rows, length + 1)).astype(np.int32)
    return [{"inputs": x[:, :-1], "targets": x[:, 1:], "weights": np.ones((rows, length), np.float32)} for x in tokens]


def both(function, monkeypatch):
    """What it gives with layers in a loop, and one by one."""
    found = function()
    with monkeypatch.context() as patch:
        patch.setattr(unrolled, "_loops", lambda *_: False)
        jax.clear_caches()
        return found, function()


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


def test_measures(model, monkeypatch):
    chosen = choose(["perplexity", "sinks", "outliers", "massive", "residual_sinks"])
    assert_equal(*both(lambda: evaluate(*model, batches(), chosen).values, monkeypatch))


@pytest.mark.parametrize("scheme", ["w8a8_tensor+smooth", "w4a8+smooth"])
def test_quantization(model, monkeypatch, scheme):
    def run():
        found = calibrate(*model, batches())
        rows = losses(*model, batches(), parse_scheme(scheme), calibration_for(parse_scheme(scheme), *model, batches()))
        return found, rows

    (found, rows), (expected, plain) = both(run, monkeypatch)
    assert len(found.ranges) > 4 * 7  # of every layer, the embedding and the head
    assert_equal(found, expected)
    for name in rows:  # one rounding may fall the other way
        np.testing.assert_allclose(rows[name], plain[name], rtol=1e-3)


def test_the_program_does_not_grow_with_depth():
    def size(layers):
        config = ModelConfig(**(SMALL | dict(num_layers=layers)))
        params = stack_layers(Decoder(config, rngs=nnx.Rngs(0)).parameters())
        lowered = lower(DecoderPass(config), params, batches()[0], choose(["perplexity", "sinks"]))
        return lowered.as_text().count("stablehlo.dot_general")

    assert size(4) == size(8)


def test_measures_of_packed_documents_and_all_families(model, monkeypatch):
    """What measures know of a row's documents is the same in every layer."""
    documents = [batch | {"segment_ids": np.repeat([[0] * 4 + [1] * 5], 3, 0).astype(np.int32)} for batch in batches()]
    assert_equal(*both(lambda: evaluate(*model, documents, choose(["all"])).values, monkeypatch))
