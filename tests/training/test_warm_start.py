"""A run that starts from the parameters of another: what it takes, what it does not, what it refuses."""

import dataclasses
import json
import pathlib
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.data import load_corpus, train_batches
from oasis_jax.errors import UserError
from oasis_jax.model.head import token_losses
from oasis_jax.placement import make_mesh
from oasis_jax.training.checkpoints import Checkpoints, Keep
from oasis_jax.training.description import describe
from oasis_jax.training.load import load_run
from oasis_jax.training.loop import fit, training_examples, with_sizes
from oasis_jax.training.state import abstract_state, new_state
from oasis_jax.training.warm_start import starting_parameters, starting_point

MESH = make_mesh(MeshConfig(), jax.devices()[:1])


def write_texts(folder: pathlib.Path, fruit: str) -> str:
    for i in range(9):
        (folder / f"{i}.txt").write_text(" ".join(f"{i * k % 97} {fruit}" for k in range(60)))
    return f"{folder}/*.txt"


def changed(config: Config, section: str, **fields) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> tuple[pathlib.Path, Config]:
    """(workdir, config) of a run with two checkpoints that never took place."""
    config = Config(
        model=ModelConfig(preset="oasis", num_layers=1, width=14, num_heads=1, mlp_dim=22),
        data=DataConfig(
            corpus="files",
            pattern=write_texts(tmp_path_factory.mktemp("before"), "apples"),
            tokenizer="bpe",
            bpe_vocab_size=300,
            sequence_length=9,
            batch_size=5,
            holdout_fraction=0.2,
        ),
        run=RunConfig(steps=20),
    )
    corpus = load_corpus(config.data, seed=0)
    state, workdir = new_state(with_sizes(config, corpus), MESH), tmp_path_factory.mktemp("runs") / "before"
    workdir.mkdir()
    with Checkpoints(workdir, keep=Keep(2), say=print) as checkpoints:
        for step in (3, 6):
            moved = state._replace(params=jax.tree.map(lambda x, step=step: x + step / 70, state.params))
            checkpoints.save(moved, step=step, data_state={}, description=describe(with_sizes(config, corpus), corpus))
    return workdir, config


@pytest.fixture
def asked(before, tmp_path) -> Config:
    """A run on other texts that starts from the one before."""
    (tmp_path / "texts").mkdir()
    config = changed(before[1], "data", pattern=write_texts(tmp_path / "texts", "pears"), batch_size=4)
    config = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=0.0, warmup_steps=0))
    return changed(config, "run", init_from=str(before[0]), steps=2, telemetry_interval=0, seed=7)


def test_parameters_are_taken_and_nothing_else(before, asked, tmp_path, capsys):
    source = load_run(before[0])
    fit(asked, tmp_path / "run")
    assert f"starts from the parameters of step 6 in {before[0]}/checkpoints\n" in capsys.readouterr().err
    after = load_run(tmp_path / "run")
    assert after.step == 2
    assert after.tokenizer.identity == source.tokenizer.identity
    assert after.corpus_identity["sha256"] != source.corpus_identity["sha256"]

    # At learning rate 0 the parameters are those of the other run, bit for bit, and the losses its model's on the new
    # data from its beginning.
    mesh_state = abstract_state(after.config, MESH)
    with (
        Checkpoints(before[0], keep=None, say=print) as old,
        Checkpoints(tmp_path / "run", keep=None, say=print) as new,
    ):
        state = new.state(2, mesh_state)
        jax.tree.map(np.testing.assert_array_equal, state.params, old.params(6, mesh_state.params))
    assert int(state.step) == 2
    corpus = load_corpus(asked.data, seed=7, tokenizer=source.tokenizer)
    batches = train_batches(corpus.train, asked.data, seed=7)
    for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        batch = next(batches)
        losses = token_losses(source.model(batch["inputs"])[0], batch["targets"])
        assert_allclose(json.loads(text)["loss"], (losses * batch["weights"]).sum() / batch["weights"].sum(), rtol=1e-6)

    # The other run is not needed to go on.
    assert fit(changed(asked, "run", init_from=str(before[0])), tmp_path / "run")["step"] == 2


def test_a_model_with_the_same_parameters_may_differ_and_says_so(before, asked):
    said = []
    other = changed(asked, "model", normalizer="softmax", window=5)
    with starting_point(other, said.append) as start:
        sized = changed(other, "model", vocab_size=start.model.vocab_size)
        corpus = load_corpus(sized.data, seed=7, tokenizer=start.tokenizer)
        examples = partial(training_examples, corpus, sized)
        starting_parameters(start, sized, abstract_state(sized, MESH).params, examples, said.append)
    line, distance = said
    assert distance.startswith("before the first step: logits differ from that model's by ")
    assert line.endswith(
        "; the model is another one: model.normalizer is 'softmax1' there, 'softmax' now; model.window is 0 there, "
        "5 now"
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(width=28),
            r"embedding.table: shape \(304, 14\) in .*/checkpoints, shape \(304, 28\) in this model .model.width is "
            r"14 there, 28",
        ),
        (
            dict(num_layers=2),
            r"layers.attention.key: shape \(1, 14, 1, 14\) in .*, shape \(2, 14, 1, 14\) in this model "
            r".model.num_layers is 1",
        ),
        (
            dict(qk_norm=True),
            r"layers.attention.key_norm: no such array in .*, shape \(1, 14\) in this model .model.qk_norm is "
            r"False there, True",
        ),
        (
            dict(preset="residual"),
            r"routers.beta_raw: shape \(2,\) in .*/checkpoints, no such array in this model .model.router is "
            r"'projected' there, 'none'",
        ),
    ],
)
def test_another_shape_is_refused_by_the_name_of_its_parameter(asked, fields, message):
    preset = fields.pop("preset", "oasis")
    model = dataclasses.replace(asked.model.with_preset(preset), **fields)
    with starting_point(asked, print) as start:
        other = dataclasses.replace(asked, model=dataclasses.replace(model, vocab_size=start.model.vocab_size))
        with pytest.raises(UserError, match=f"^run.init_from: parameter {message}") as error:
            starting_parameters(start, other, abstract_state(other, MESH).params, None, print)
    assert "\n" not in str(error.value)


def test_nothing_to_start_from(before, asked, tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for folder, message in (
        (tmp_path / "nowhere", "there is no run in"),
        (tmp_path / "empty", "has no checkpoint yet"),
    ):
        with (
            pytest.raises(UserError, match=f"^run.init_from: .*{message}"),
            starting_point(changed(asked, "run", init_from=str(folder)), print),
        ):
            pass
    with (
        pytest.raises(UserError, match=r"^data.tokenizer: bytes asked for, but the model in run.init_from reads bpe"),
        starting_point(changed(asked, "data", tokenizer="bytes"), print),
    ):
        pass


def test_a_damaged_newest_checkpoint_is_passed_over(before, asked, tmp_path):
    workdir, said = shutil.copytree(before[0], tmp_path / "before"), []
    (workdir / "checkpoints" / "6" / "files.json").unlink()
    with starting_point(changed(asked, "run", init_from=str(workdir)), said.append) as start:
        assert start.what.startswith("step 3 in ")
    assert said == ["checkpoint 6 is not whole, step 3 is used instead: files.json is missing; 3 steps lost"]
    assert (workdir / "checkpoints" / "6").is_dir()


@pytest.mark.slow
def test_a_null_of_one_per_cent_joins_a_run_with_softmax(asked, tmp_path, capsys):
    plain = dataclasses.replace(asked, model=asked.model.with_preset("residual"))
    fit(changed(plain, "run", init_from="", steps=1), tmp_path / "softmax")
    sink = changed(plain, "model", normalizer="learned_sink")
    fit(changed(sink, "run", init_from=str(tmp_path / "softmax"), init_null="one_per_cent", steps=1), tmp_path / "sink")
    assert "before the first step: logits differ" in capsys.readouterr().err
    run = load_run(tmp_path / "sink")
    ids = np.random.default_rng(0).integers(0, 300, (4, 9))
    moved = dataclasses.replace(changed(plain, "data", begin_token=False), model=sink.model)
    moved = changed(moved, "model", normalizer="null_key_value")
    with pytest.raises(UserError, match=r"transplant starts from a pretrained model, and '.*softmax' is a run"):
        fit(changed(moved, "run", init_from=str(tmp_path / "softmax"), init_null="transplant"), tmp_path / "moved")
    assert 0.003 < np.median(run.model(ids)[1].attention[0].null_mass) < 0.03
