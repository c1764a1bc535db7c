"""What a checkpoint holds and what it refuses."""

import dataclasses
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_runs import equal, resume

from oasis_jax.config import Config, ModelConfig, from_dict, to_dict
from oasis_jax.data import load_corpus
from oasis_jax.errors import UserError
from oasis_jax.model.layout import unstack_layers
from oasis_jax.training import manifest
from oasis_jax.training.checkpoints import Checkpoints, Keep
from oasis_jax.training.description import check_corpus, check_length, describe, differing_fields
from oasis_jax.training.load import load_run
from oasis_jax.training.state import build_model


def test_everything_comes_back(run, workdir, said):
    asked, config, corpus, states = run
    resumed = resume(asked, workdir, said)
    assert resumed.step == 9
    assert equal(resumed.state, states[9])
    assert jax.tree.structure(resumed.state) == jax.tree.structure(states[9])
    assert resumed.data_state == {"next_index": 45}
    assert resumed.tokenizer.to_json() == corpus.tokenizer.to_json()
    assert resumed.corpus_identity == corpus.identity
    assert said == []
    with Checkpoints(workdir, keep=None, say=said.append) as checkpoints:
        metadata = checkpoints.metadata(9)
    assert from_dict(metadata["config"]) == config
    assert metadata["layout"] == "2: embedding, head, layers, routers, final_norm"
    packages = {"python", "oasis_jax", "jax", "flax", "optax", "orbax-checkpoint"}
    assert packages == metadata["versions"].keys() - {"commit"}  # which only a clone has
    assert metadata["versions"]["jax"] == jax.__version__


def test_the_newest_are_kept(workdir):
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["6", "9"]


NAMES = [
    "a[1]b",
    "a*b",
    "a?b",
    "a\\b",
    "$HOME",
    "a&b<c>",
    " a b ",
    "a\nb",
    "-a",
    "x" * 255,
    os.fsdecode(b"a\xffb"),
    "{a}",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_whatever_a_workdir_is_called(run, written, tmp_path, said, name):
    asked, config, corpus, states = run
    workdir = tmp_path / name
    workdir.mkdir()
    with Checkpoints(workdir, keep=Keep(1), say=said.append) as checkpoints:
        for step in (3, 6):
            checkpoints.save(states[step], step=step, data_state={}, description=describe(config, corpus))
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["6"]
    resumed = resume(asked, workdir, said)
    assert resumed.step == 6 and equal(resumed.state, states[6])
    assert said == []


def test_an_empty_workdir_is_a_new_run(run, tmp_path, said):
    assert resume(run[0], tmp_path, said) is None


# Another run


def changed(config, **fields):
    for name, value in fields.items():
        section, field = name.split("__")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
        )
    return config


def test_another_config_is_refused_by_the_names_of_its_fields(run, workdir, said):
    asked = changed(run[0], model__width=28, data__sequence_length=10, optimizer__beta2=0.99, run__seed=1)
    with pytest.raises(UserError) as error:
        resume(asked, workdir, said)
    assert (
        "model.width is 14 there, 28 now; data.sequence_length is 9 there, 10 now; optimizer.beta2 is 0.95 there, "
        "0.99 now; " in str(error.value)
    )
    assert "run.seed is 0 there, 1 now; take these values or another workdir" in str(error.value)


def test_what_may_differ(run, workdir, said):
    asked = changed(
        run[0], model__remat="layer", model__stack="scan", model__attention_implementation="reference",
        optimizer__accumulation_steps=2, mesh__data=1, mesh__rules=(("batch", ("data",)),), run__log_interval=7,
        run__telemetry_interval=0, run__eval_interval=3, run__eval_batches=1, run__checkpoint_interval=2,
        run__keep_checkpoints=5, run__tensorboard=True, run__wandb=True,
    )  # fmt: skip
    assert resume(asked, workdir, said).step == 9


def test_every_other_field_is_compared():
    config = Config(model=ModelConfig(vocab_size=258))
    fields = [f"{section}.{name}" for section, values in to_dict(config).items() for name in values]
    other = to_dict(config)
    compared = [line.split()[0] for line in differing_fields(_Everything(other), config)]
    free = [name for name in fields if name not in compared]
    assert set(free) == {
        "model.remat", "model.stack", "model.attention_implementation", "model.depth_implementation", "data.pattern",
        "optimizer.accumulation_steps", "optimizer.nonfinite", "optimizer.nonfinite_limit", "run.steps",
        "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence", "mesh.rules",
        "run.log_interval", "run.telemetry_interval", "run.eval_interval", "run.eval_batches",
        "run.checkpoint_interval", "run.keep_checkpoints", "run.keep_every", "run.keep_best",
        "run.tensorboard", "run.wandb",
    }  # fmt: skip


class _Everything:
    """A config whose every field has another value than any other config's."""

    def __init__(self, values):
        for name, fields in values.items():
            setattr(self, name, type("Section", (), dict.fromkeys(fields, object())))


@pytest.mark.parametrize(
    "schedule, steps, words",
    [
        # (1 + cos(pi 10/16)) / 2 and 30/40 of 4e-4; half of it at 10/20
        ("cosine", 16, "step 10 has learning rate 0.0001235, not 0.0002"),
        ("linear", 40, "step 10 has learning rate 0.0003, not 0.0002"),
        ("constant", 40, "the learning rate is constant and stays"),
        ("linear", 9, "run.steps: 20 until step 9, 9 now"),
    ],
)
def test_a_run_may_become_longer_or_shorter(run, workdir, said, schedule, steps, words):
    """The checkpoint of step 9 of 20, of a run with the schedule asked for."""
    stored = changed(
        run[1],
        optimizer__schedule=schedule,
        optimizer__warmup_steps=0,
        optimizer__learning_rate=4e-4,
        optimizer__final_fraction=0.0,
    )
    assert words in check_length(changed(stored, run__steps=steps), stored, 9, workdir)
    assert check_length(stored, stored, 9, workdir) == ""


def test_another_length_is_said_and_one_that_is_over_refused(run, workdir, said):
    assert resume(changed(run[0], run__steps=30), workdir, said).step == 9
    assert said[-1].startswith("run.steps: 20 until step 9, 30 now; from here on the cosine schedule is that of 30 ")
    with pytest.raises(UserError, match=r"run.steps: 8 asked for, but .* is at step 9 .* --set run.steps=N of at lea"):
        resume(changed(run[0], run__steps=8), workdir, said)


def test_a_vocabulary_is_only_compared_when_asked_for():
    stored = Config(model=ModelConfig(vocab_size=258))
    assert differing_fields(Config(), stored) == []
    assert differing_fields(changed(stored, model__vocab_size=300), stored) == [
        "model.vocab_size is 258 there, 300 now"
    ]


def test_another_corpus_is_refused_by_name(run, text, tmp_path):
    asked, _, corpus, _ = run
    moved = shutil.copytree(text, tmp_path / "moved")
    elsewhere = dataclasses.replace(asked.data, pattern=f"{moved}/*.txt")
    check_corpus(load_corpus(elsewhere, seed=0, tokenizer=corpus.tokenizer), corpus.identity)
    (moved / "3.txt").write_text("something else " * 60)
    with pytest.raises(
        UserError, match=r"the corpus is not the one this run was trained on \(sha256 was '.*', is '.*'; bytes was"
    ) as error:
        check_corpus(load_corpus(elsewhere, seed=0, tokenizer=corpus.tokenizer), corpus.identity)
    assert "\n" not in str(error.value)


def test_another_split_of_the_same_text_is_refused_as_such(run):
    """As a run of a version with another rule has it."""
    corpus = run[2]
    holdout = corpus.identity["holdout"]
    older = [{"split": "by file: 2 of 9 files"}, {"holdout": holdout | {"sha256": "0" * 64}}]
    for stored in older:
        with pytest.raises(UserError, match=f"this version holds out another part of it .{next(iter(stored))} was"):
            check_corpus(corpus, corpus.identity | stored)
    without = {name: value for name, value in holdout.items() if name != "sha256"}
    with pytest.raises(UserError, match="this version holds out another part"):
        check_corpus(corpus, corpus.identity | {"holdout": without})


def test_a_checkpoint_of_another_layout_is_refused(run, tmp_path, said):
    asked, config, corpus, states = run
    description = describe(config, corpus)
    del description["layout"]
    with Checkpoints(tmp_path, keep=Keep(2), say=said.append) as checkpoints:
        layers = unstack_layers(states[9].params)
        checkpoints.save(states[9]._replace(params=layers), step=9, data_state={}, description=description)
    for attempt in (lambda: resume(asked, tmp_path, said), lambda: load_run(tmp_path)):
        with pytest.raises(
            UserError,
            match="checkpoint 9 holds its parameters in the layout None, this version reads '2: embedding, head, ",
        ) as error:
            attempt()
        assert "\n" not in str(error.value)


def test_a_field_that_this_version_does_not_know_is_named_with_the_version_that_wrote_it(run, tmp_path, said):
    asked, config, corpus, states = run
    description = describe(config, corpus)
    description["config"]["model"]["num_layer"] = description["config"]["model"].pop("num_layers")
    description["versions"]["oasis_jax"] = "9.8.7"
    with Checkpoints(tmp_path, keep=Keep(2), say=said.append) as checkpoints:
        checkpoints.save(states[9], step=9, data_state={}, description=description)
    for attempt in (lambda: resume(asked, tmp_path, said), lambda: load_run(tmp_path)):
        with pytest.raises(UserError) as error:
            attempt()
        words = str(error.value)
        assert words.startswith("model.num_layer: unknown name 'num_layer' (did you mean 'num_layers'?); allowed: ")
        assert words.endswith("; the config was written by oasis_jax 9.8.7")
        assert "\n" not in words


def test_changed_versions_are_said(run, workdir, said, monkeypatch):
    monkeypatch.setattr("oasis_jax.training.description.platform.python_version", lambda: "3.99.1")
    assert resume(run[0], workdir, said).step == 9
    assert said == [
        f"versions changed since the checkpoint (python {'.'.join(map(str, sys.version_info[:3]))} -> 3.99.1): "
        "losses may differ in their last bits"
    ]


# A run from its checkpoint alone


def test_load_run(run, workdir):
    _, config, corpus, states = run
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    loaded = load_run(str(workdir))
    assert (loaded.step, loaded.config, loaded.corpus_identity) == (9, config, corpus.identity)
    assert loaded.tokenizer.identity == corpus.tokenizer.identity
    inputs = jnp.arange(14).reshape(2, 7)
    assert np.array_equal(loaded.model(inputs)[0], build_model(config.model, states[9].params)(inputs)[0])
    assert load_run(workdir, step=6).step == 6
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_load_run_reads_parameters_only(workdir, capsys):
    shutil.rmtree(workdir / "checkpoints" / "9" / "rest")
    manifest.write(workdir / "checkpoints" / "9", 9, late=True)
    assert load_run(workdir).step == 9


def test_load_run_without_a_run(workdir, tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for folder, step, message in [
        (tmp_path / "nowhere", None, "there is no run in"),
        (tmp_path, None, "there is no run in"),
        (tmp_path / "empty", None, "has no checkpoint yet"),
        (workdir, 7, "step 7: .* has no such checkpoint; allowed: 9, 6"),
    ]:
        with pytest.raises(UserError, match=message):
            load_run(folder, step)
    assert not (tmp_path / "nowhere").exists()


def test_what_a_killed_save_left_is_removed_by_training_and_left_by_reading(workdir):
    unfinished = workdir / "checkpoints" / "12.orbax-checkpoint-tmp" / "params"
    unfinished.mkdir(parents=True)
    load_run(workdir)
    assert unfinished.exists()
    with Checkpoints(workdir, keep=Keep(2), say=print) as checkpoints:
        assert not unfinished.exists()
        assert checkpoints.steps() == [9, 6]
