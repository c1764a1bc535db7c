"""Checkpoints of transformers in and out again: byte for byte, and transformers loads what comes out."""

import json

import numpy as np
import pytest

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
pytest.importorskip("torch", reason="torch is not installed; make test-parity installs it")
transformers = pytest.importorskip("transformers", reason="transformers is missing; make test-parity installs it")

from pretrained.against_transformers import compare, ours, random_checkpoint, theirs  # noqa: E402
from pretrained.test_parity import CASES, TOLERANCE, tokens  # noqa: E402

from oasis_jax.pretrained import load_pretrained, rotate, save_pretrained  # noqa: E402

ROUND_TRIPS = [
    "llama_biases", "llama_3", "mistral", "qwen2_windows", "qwen3", "phi3_longrope", "opt", "gpt2", "gpt2_other",
    "granite_swa", "granite_swa_other",
]  # fmt: skip


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_a_round_trip_is_byte_for_byte_and_can_be_loaded(tmp_path, case):
    family, keys = CASES[case]
    model, ids = random_checkpoint(tmp_path / "in", family, **keys), tokens(1, 50)
    assert save_pretrained(load_pretrained(tmp_path / "in"), tmp_path / "out") == family
    first, second = (tmp_path / name / "model.safetensors" for name in ("in", "out"))
    assert first.read_bytes() == second.read_bytes()
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "out"))
    assert first == second
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert np.array_equal(theirs(again.eval(), ids).logits, theirs(model, ids).logits)


@pytest.mark.parametrize("case", ["llama_3", "qwen3", "phi3_longrope"])
def test_a_rotated_model_is_a_checkpoint_that_transformers_loads(tmp_path, case):
    """With a head of its own; in transformers it computes what the model before the rotation did."""
    family, keys = CASES[case]
    model, ids = random_checkpoint(tmp_path / "in", family, **keys), tokens()
    rotated = rotate(load_pretrained(tmp_path / "in"), online=False)
    assert save_pretrained(rotated, tmp_path / "out", dtype="float32") == family
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    real, other = np.ones(ids.shape, bool), theirs(again, ids)
    found = compare(ours(rotated, ids), other, ids, real, TOLERANCE)
    print(f"{case}, rotated: logits {found['logits']:.1e}, perplexity {found['perplexity']:.1e}")
    found = compare(theirs(model, ids)._replace(modules={}), other._replace(modules={}), ids, real, TOLERANCE)
    print(f"{case}, before rotation: logits {found['logits']:.1e}, perplexity {found['perplexity']:.1e}")
