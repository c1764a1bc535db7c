"""A run of three checkpoints, of which a test may damage a copy."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import pytest
from saved_runs import MESH, STEPS

from oasis_jax.config import Config, DataConfig, ModelConfig, RunConfig
from oasis_jax.data import load_corpus
from oasis_jax.training.checkpoints import Checkpoints, Keep
from oasis_jax.training.description import describe
from oasis_jax.training.loop import with_sizes
from oasis_jax.training.state import new_state


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(9):
        (folder / f"{i}.txt").write_text(" ".join(f"{i * k % 97} apples" for k in range(60)))
    return folder


@pytest.fixture(scope="module")
def run(text):
    """(asked config, config with its vocabulary, corpus, states by step) of a run that never took place."""
    asked = Config(
        model=ModelConfig(preset="oasis_blocks", blocks=2, num_layers=1, width=14, num_heads=1, mlp_dim=22),
        data=DataConfig(
            corpus="files",
            pattern=f"{text}/*.txt",
            tokenizer="bpe",
            bpe_vocab_size=300,
            sequence_length=9,
            batch_size=2,
            holdout_fraction=0.2,
        ),
        run=RunConfig(steps=20),
    )
    corpus = load_corpus(asked.data, seed=0)
    config = with_sizes(asked, corpus)
    first = new_state(config, MESH)
    states = {}
    for step in STEPS:
        arrays = jax.tree.map(
            lambda x, step=step: x + jnp.asarray(step / 7, x.dtype), first._replace(rng=None, step=None)
        )
        states[step] = arrays._replace(rng=jax.random.key(step), step=jnp.int32(step))
    return asked, config, corpus, states


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def written(run, tmp_path_factory) -> pathlib.Path:
    _, config, corpus, states = run
    workdir = tmp_path_factory.mktemp("written")
    with Checkpoints(workdir, keep=Keep(2), say=print) as checkpoints:
        for step, state in states.items():
            checkpoints.save(
                state, step=step, data_state={"next_index": 5 * step}, description=describe(config, corpus)
            )
    return workdir


@pytest.fixture
def workdir(written, tmp_path) -> pathlib.Path:
    """A copy that may be damaged."""
    return shutil.copytree(written, tmp_path / "run")
