"""Decoding on meshes equals one pass on one device."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from pretrained.tiny import random_model
from programs import UNOPTIMIZED, on_devices

from oasis_jax import LayerPattern, ModelConfig
from oasis_jax.pretrained import save_pretrained

HERE = pathlib.Path(__file__).parent
MESHES = [dict(data=8), dict(data=1, fsdp=8), dict(data=4, tensor=2), dict(data=2, fsdp=2, tensor=2)]
SIZES = dict(width=24, num_heads=4, num_kv_heads=2, num_layers=2, mlp_dim=40, vocab_size=48)
MODELS = {
    "oasis, half": dict(preset="oasis", layer_pattern=(LayerPattern(window=3), LayerPattern())),
    "transplant": dict(preset="residual"),
    "oasis_blocks, null_key_value": dict(preset="oasis_blocks", blocks=2, normalizer="null_key_value", null_keys=2),
}


@pytest.mark.parametrize(
    "name", ["oasis, half", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])]
)
def test_prefill_and_steps_on_a_mesh_equal_one_pass_without(name, tmp_path):
    save_pretrained(random_model(ModelConfig(**SIZES, **MODELS[name])), tmp_path / "model")
    environment = on_devices(8, UNOPTIMIZED)
    environment["PYTHONPATH"] += os.pathsep + str(HERE.parent)
    meshes = MESHES[2:3] if name == "oasis, half" else MESHES
    command = [sys.executable, "-W", "error", HERE / "eight_devices.py", tmp_path / "model", json.dumps(meshes), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == [str(mesh) for mesh in meshes]
    limit = 1e-5 if name == "transplant" else 1e-9  # a transplant computes its null keys in the model's float32
    for mesh, seen in found.items():
        assert seen["error"] < limit and seen["same"], (mesh, seen)
