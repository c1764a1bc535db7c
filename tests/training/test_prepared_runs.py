"""Runs on shards that were prepared: packed, mixed, stopped, and gone on with where the folders have moved."""

import dataclasses

import numpy as np
import pytest

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.data import prepare
from oasis_jax.errors import UserError
from oasis_jax.training.loop import fit
from oasis_jax.training.metrics import read_metrics


@pytest.mark.slow
def test_a_mixture_is_gone_on_with_bit_by_bit_where_its_folders_have_moved(tmp_path):
    random = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(40):
            text = " ".join(random.choice(["pear", "fig", "plum", name], random.integers(1, 12)))
            (tmp_path / name / f"{i}.txt").write_text(f"{text} {i}")
        prepare.prepare(
            DataConfig(corpus="files", pattern=f"{tmp_path}/{name}/*.txt", holdout_fraction=0.2),
            None,
            tmp_path / "first" / name,
            shard_bytes=300,
        )

    def config(place, steps):
        pattern = ",".join(str(tmp_path / place / name) for name in "ab")
        data = DataConfig(
            corpus="prepared", pattern=pattern, mixture="2,1", packing="best_fit", sequence_length=21, batch_size=4,
            holdout_fraction=0.2,
        )  # fmt: skip
        model = ModelConfig(preset="residual", num_layers=1, width=12, num_heads=3, mlp_dim=8)
        optimizer = OptimizerConfig(schedule="constant", warmup_steps=0)
        return Config(model=model, data=data, optimizer=optimizer, run=RunConfig(steps=steps, log_interval=1))

    losses = lambda workdir: [line["loss"] for line in read_metrics(workdir)]
    fit(config("first", 4), tmp_path / "whole")
    fit(config("first", 2), tmp_path / "parts")
    (tmp_path / "first").rename(tmp_path / "second")
    with pytest.raises(UserError, match="holds no prepared corpus"):
        fit(config("first", 4), tmp_path / "parts")
    fit(config("second", 4), tmp_path / "parts")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") and len(losses(tmp_path / "parts")) == 4
    other = config("second", 6)
    with pytest.raises(UserError, match=r"data\.mixture is '2,1' there, '1,2' now"):
        fit(dataclasses.replace(other, data=dataclasses.replace(other.data, mixture="1,2")), tmp_path / "parts")
