"""The configs that train a pretrained model on: their sizes are the published models', and each runs from a small
random checkpoint of its family.
"""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from pretrained.test_families import PUBLISHED
from pretrained.tiny import small_checkpoint
from sampling import sampled

from oasis_jax.commands.config_file import load_config
from oasis_jax.config import ModelConfig
from oasis_jax.overrides import apply_overrides
from oasis_jax.pretrained import load_pretrained
from oasis_jax.pretrained.families import read_model_config
from oasis_jax.training.load import load_run
from oasis_jax.training.loop import fit
from oasis_jax.training.metrics import read_metrics
from oasis_jax.training.plan import with_vocabulary
from oasis_jax.training.warm_start import _OWN

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
MODELS = {"finetune_llama3_1b": "Llama-3.2-1B", "finetune_qwen3": "Qwen3-0.6B", "finetune_phi4_mini": "Phi-4-mini"}
# As the paper's scripts have them: sequences of a step, parts of it, rate, warm-up, steps.
RECIPES = {
    "finetune_llama3_1b": (192, 32, 4e-4, 2000, 2000),
    "finetune_qwen3": (96, 16, 4e-4, 2000, 25_000),
    "finetune_phi4_mini": (32, 16, 2e-4, 200, 2000),
}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_published_model(name, monkeypatch, tmp_path):
    """So that a plan needs no file, and a run is not refused when there is one."""
    monkeypatch.chdir(tmp_path)
    config = load_config(CONFIGS / f"{name}.py")
    published = read_model_config(PUBLISHED[MODELS[name]][1], name)
    for field in dataclasses.fields(ModelConfig):
        if field.name in _OWN:
            continue
        asked, there = getattr(config.model, field.name), getattr(published, field.name)
        assert asked in (there, getattr(ModelConfig(), field.name)), field.name
        if field.name in ("num_layers", "width", "num_heads", "num_kv_heads", "mlp_dim", "vocab_size", "qk_norm"):
            assert asked == there, field.name
    assert config.model.head_size == published.head_size and config.model.rotary_size == published.rotary_size
    assert with_vocabulary(config) == config
    data, optimizer = config.data, config.optimizer
    found = (data.batch_size, optimizer.accumulation_steps, optimizer.learning_rate, optimizer.warmup_steps)
    assert (*found, config.run.steps) == RECIPES[name]
    assert (data.sequence_length, optimizer.schedule) == (512, "linear")


SMALL = ["num_layers=2", "width=24", "num_heads=3", "num_kv_heads=1", "mlp_dim=40", "vocab_size=211", "dtype=float32"]


@pytest.mark.parametrize(
    "name, family",
    sampled(
        [("finetune_llama3_1b", "llama"), ("finetune_qwen3", "qwen3"), ("finetune_phi4_mini", "phi3")],
        [("finetune_qwen3", "qwen3")],
    ),
)
def test_each_runs_from_a_small_checkpoint(name, family, tmp_path):
    source = small_checkpoint(tmp_path / family, family)
    random = np.random.default_rng(0)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in random.integers(0, 211, 2000)))
    assignments = [f"model.{field}" for field in SMALL]
    if family == "qwen3":
        assignments.append("model.head_dim=10")
    assignments += ["data.corpus=files", f"data.pattern={tmp_path}/text.txt", "data.sequence_length=9"]
    assignments += ["data.batch_size=4", "optimizer.accumulation_steps=2", f"run.init_from={source}"]
    assignments += ["run.steps=2", "run.eval_interval=0", "run.log_interval=1", "mesh.data=1"]
    assignments += ["optimizer.warmup_steps=2", "optimizer.learning_rate=2e-7"]
    config = apply_overrides(load_config(CONFIGS / f"{name}.py"), assignments)
    last = fit(config, tmp_path / "run")
    assert last["step"] == 2 and np.isfinite(last["loss"])
    run, model = load_run(tmp_path / "run"), load_pretrained(source)
    assert (run.config.model.wiring, run.config.model.head_size) == ("cumulative", model.config.head_size)
    # Two steps at a rate of some 1e-7 leave what was read where it was; routers are new.
    np.testing.assert_allclose(
        run.params["layers"]["mlp"]["up"], model.params["layers"]["mlp"]["up"], rtol=0, atol=1e-5
    )
    assert run.params["routers"]["query"].shape == (4, 24, 64)


@pytest.mark.slow
def test_gsm8k_is_learned_from_a_small_checkpoint_and_resumed_bit_by_bit(tmp_path):
    random = np.random.default_rng(0)
    text = lambda: " ".join(f"w{i}" for i in random.integers(0, 211, random.integers(3, 9)))
    lines = [json.dumps({"question": text(), "answer": text()}) for _ in range(31)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    source = small_checkpoint(tmp_path / "llama", "llama")
    assignments = [f"data.pattern={tmp_path}/pairs.jsonl", "data.sequence_length=45", "data.batch_size=3"]
    assignments += [f"run.init_from={source}", "run.log_interval=1", "run.checkpoint_interval=2", "mesh.data=1"]
    assignments += ["run.eval_interval=2", "run.eval_batches=1", "optimizer.schedule=constant"]
    assignments.append("optimizer.warmup_steps=2")
    config = lambda steps: apply_overrides(
        load_config(CONFIGS / "finetune_gsm8k.py"), [*assignments, f"run.steps={steps}"]
    )
    losses = lambda workdir: [line["loss"] for line in read_metrics(workdir) if "loss" in line]
    fit(config(4), tmp_path / "whole")
    fit(config(2), tmp_path / "parts")
    fit(config(4), tmp_path / "parts")
    found = losses(tmp_path / "whole")
    assert found == losses(tmp_path / "parts") and len(found) == 4 and np.isfinite(found).all()
    assert load_run(tmp_path / "whole").config.data.corpus == "pairs"
