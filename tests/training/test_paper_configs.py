"""The paper's recipes: the same runs as those of the configs that they are made from, on data laid out as its scripts
do; each runs on a small corpus of the same shape.
"""

import dataclasses
import pathlib

import numpy as np
import pytest
from pretrained.tiny import small_checkpoint
from sampling import sampled

from oasis_jax.commands.config_file import load_config
from oasis_jax.data import load_corpus, prepare
from oasis_jax.overrides import apply_overrides
from oasis_jax.pretrained.tokenizer import open_tokenizer
from oasis_jax.training.loop import fit
from oasis_jax.training.plan import abstract_batch, make_mesh, with_vocabulary

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
BASES = {
    "paper_llama3_1b": "finetune_llama3_1b",
    "paper_qwen3": "finetune_qwen3",
    "paper_phi4_mini": "finetune_phi4_mini",
    "paper_opt_125m": "opt_125m",
}
FAMILIES = {"paper_llama3_1b": "llama", "paper_qwen3": "qwen3", "paper_phi4_mini": "phi3"}


@pytest.mark.parametrize("name", BASES)
def test_only_the_data_differs(name, monkeypatch, tmp_path):
    """So that the plan is the same: the same model, step and shapes of a batch."""
    monkeypatch.chdir(tmp_path)
    config, base = (load_config(CONFIGS / f"{stem}.py") for stem in (name, BASES[name]))
    assert (config.optimizer, config.mesh, config.run) == (base.optimizer, base.mesh, base.run)
    assert dataclasses.replace(config.model, vocab_size=0) == dataclasses.replace(base.model, vocab_size=0)
    assert with_vocabulary(config) == config and config.model.vocab_size == with_vocabulary(base).model.vocab_size
    data = config.data
    assert (data.corpus, data.packing, data.sequence_length) == ("prepared", "group_texts", 512)
    shapes = lambda c: {
        name: (x.shape, x.dtype)
        for name, x in abstract_batch(c, make_mesh(dataclasses.replace(c.mesh, data=1))).items()
    }
    assert shapes(config) == shapes(base)
    text = (CONFIGS / f"{name}.py").read_text()
    assert f"--out {data.pattern}\n" in text and f"--config=configs/{name}.py" in text


SMALL = ["num_layers=2", "width=24", "num_heads=3", "mlp_dim=40", "vocab_size=211", "dtype=float32"]


@pytest.mark.parametrize("name", sampled(BASES, ["paper_opt_125m"]))
def test_each_runs_on_a_corpus_of_its_shape(name, tmp_path):
    """Lines as WikiText has them: headings and blank ones among paragraphs. Blocks are as long as the recipe's, texts
    more than make one group, and the method, tokenizer, packing and optimizer are its own.
    """
    family = FAMILIES.get(name)
    source = small_checkpoint(tmp_path / "model", family or "llama")
    random = np.random.default_rng(0)
    text = lambda size: " ".join(f"w{i}" for i in random.integers(0, 211, size))
    lines = [line for _ in range(600) for line in (f"= {text(2)} =", "", text(random.integers(20, 90)))]
    (tmp_path / "lines.jsonl").write_text("\n".join(f'{{"text": "{line}"}}' for line in lines))
    assignments = [f"model.{field}" for field in SMALL] + ["data.batch_size=2"]
    assignments += [f"data.pattern={tmp_path}/prepared", "mesh.data=1", "run.steps=2", "run.eval_interval=0"]
    assignments.append("optimizer.warmup_steps=1")
    if family:
        assignments += [f"run.init_from={source}", "model.num_kv_heads=1", "optimizer.accumulation_steps=2"]
    if family == "qwen3":
        assignments.append("model.head_dim=10")
    config = apply_overrides(load_config(CONFIGS / f"{name}.py"), [*assignments, "run.log_interval=1"])
    raw = dataclasses.replace(config.data, corpus="files", pattern=f"{tmp_path}/lines.jsonl", packing="stream")
    tokenizer = open_tokenizer(str(source))
    index = prepare.prepare(raw, tokenizer, tmp_path / "prepared")
    shards = index["parts"]["train"]["shards"]
    lengths = np.concatenate([np.load(tmp_path / "prepared" / shard["lengths"]["file"]) for shard in shards])
    assert len(lengths) > 1000 and config.data.sequence_length == 512
    begins = tokenizer.begin_id is not None
    blocks = sum(int(lengths[i : i + 1000].sum() + begins * len(lengths[i : i + 1000])) // 512 for i in (0, 1000))
    assert len(load_corpus(config.data, seed=0, tokenizer=tokenizer).train) == blocks > 9
    last = fit(config, tmp_path / "run")
    assert last["step"] == 2 and np.isfinite(last["loss"])
