"""Runs that start from a pretrained model: its sizes, its tokenizer, its loss before the first step, and the routers it
lacks.
"""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from pretrained.tiny import CONFIG, write

from oasis_jax import Context, ModelConfig, UserError, load_pretrained
from oasis_jax.config import Config, DataConfig, OptimizerConfig, RunConfig
from oasis_jax.data import load_corpus, train_batches
from oasis_jax.model.head import token_losses
from oasis_jax.pretrained import save_pretrained, transplant_sink
from oasis_jax.training.load import load_run
from oasis_jax.training.loop import fit
from oasis_jax.training.plan import with_vocabulary
from oasis_jax.training.warm_start import with_source

WORDS = CONFIG["vocab_size"]


@pytest.fixture
def config(tmp_path) -> Config:
    """Two steps that change nothing, from a tiny Llama whose gains are ones and whose weights are small."""
    folder = write(tmp_path / "llama")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(WORDS - 4)}, unk_token="w0"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.post_processor = tokenizers.processors.TemplateProcessing(single="w3 $A", special_tokens=[("w3", 3)])
    library.save(str(folder / "tokenizer.json"))
    random = np.random.default_rng(0)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in random.integers(0, WORDS - 4, 500)))
    return Config(
        model=ModelConfig(preset="residual"),
        data=DataConfig(
            corpus="files", pattern=str(tmp_path / "text.txt"), tokenizer="library", sequence_length=9, batch_size=4
        ),
        optimizer=OptimizerConfig(learning_rate=0.0, warmup_steps=0),
        run=RunConfig(steps=2, init_from=str(folder), telemetry_interval=0),
    )


def changed(config: Config, section: str, **fields) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


def first_loss(config: Config) -> float:
    """The pretrained model's own loss on the first batch."""
    model = load_pretrained(config.run.init_from)
    corpus = load_corpus(config.data, seed=0, tokenizer=model.tokenizer)
    batch = next(train_batches(corpus.train, config.data, seed=0))
    return float(token_losses(model.decoder()(jnp.asarray(batch["inputs"]), Context())[0], batch["targets"]).mean())


def test_a_run_begins_with_the_loss_of_the_model(config, tmp_path, capsys):
    last = fit(changed(config, "run", steps=1), tmp_path / "run")
    assert last["loss"] == pytest.approx(first_loss(config), rel=1e-5)
    assert f"starts from the parameters of {config.run.init_from}" in capsys.readouterr().err
    run = load_run(tmp_path / "run")
    assert run.config.model.vocab_size == WORDS and run.tokenizer.vocab_size == WORDS - 4
    assert run.tokenizer.encode("w7 w9").tolist() == [7, 9]
    np.testing.assert_array_equal(
        run.params["layers"]["mlp"]["up"], load_pretrained(config.run.init_from).params["layers"]["mlp"]["up"]
    )


@pytest.mark.parametrize(
    "fields",
    [pytest.param(dict(preset="attnres"), marks=pytest.mark.slow), dict(preset="attnres", blocks=2)],
    ids=["full", "blocks"],
)
def test_delta_wiring_with_new_routers_is_the_model_up_to_the_norms_epsilon(config, tmp_path, fields):
    """The exact retrofit: a query of zero weighs all sources alike, and the next norm removes their number."""
    other = changed(dataclasses.replace(config, model=ModelConfig(**fields)), "run", steps=1)
    assert fit(other, tmp_path / "run")["loss"] == pytest.approx(first_loss(config), rel=1e-3)


@pytest.mark.slow
def test_a_run_with_another_method_trains_and_resumes(config, tmp_path):
    other = dataclasses.replace(config, model=ModelConfig(preset="oasis_blocks", blocks=2))
    other = changed(other, "optimizer", learning_rate=1e-2, schedule="constant")
    losses = [fit(changed(other, "run", steps=steps), tmp_path / "run")["loss"] for steps in (1, 4)]
    assert losses[1] != losses[0] and all(map(np.isfinite, losses))


@pytest.mark.slow
def test_a_transplanted_model_goes_on(config, tmp_path):
    save_pretrained(transplant_sink(load_pretrained(config.run.init_from), [3]), tmp_path / "moved", dtype="float32")
    other = changed(config, "run", init_from=str(tmp_path / "moved"), steps=1)
    other = dataclasses.replace(other, model=ModelConfig(preset="residual", normalizer="null_key_value"))
    assert fit(other, tmp_path / "run")["loss"] == pytest.approx(first_loss(other), rel=1e-5)
    assert jax.tree.leaves(load_run(tmp_path / "run").params["layers"]["attention"]["null_key"])[0].shape == (
        2,
        1,
        1,
        10,
    )


def first_lines(config: Config, workdir, capsys) -> str:
    fit(changed(config, "run", steps=1), workdir)
    return capsys.readouterr().err


def distance(text: str) -> tuple[float, float, float]:
    """Largest relative difference of logits, loss and the model's loss, as a run says them."""
    line = re.search(r"logits differ from that model's by (\S+) of the largest, loss (\S+) against (\S+) ", text)
    return tuple(map(float, line.groups()))


@pytest.mark.parametrize(
    "model, run, limit",
    [
        pytest.param(dict(preset="attnres", blocks=2, sum_preserving=True), {}, 1e-5, marks=pytest.mark.slow),
        pytest.param(dict(preset="attnres_cumulative", alpha_gate=True), {}, 1e-6, marks=pytest.mark.slow),
        (dict(preset="residual", normalizer="null_key_value"), dict(init_null="transplant"), 1e-5),
    ],
    ids=["sum", "alpha gate", "transplant"],
)
def test_the_distance_from_the_model_is_said(config, tmp_path, capsys, model, run, limit):
    transplanted = run.get("init_null") == "transplant"
    own = first_loss(config)
    other = changed(dataclasses.replace(config, model=ModelConfig(**model)), "data", begin_token=not transplanted)
    other = changed(other, "run", **run)
    error, loss, wanted = distance(first_lines(other, tmp_path / "run", capsys))
    assert error <= limit
    assert loss == pytest.approx(wanted, abs=2e-4 + limit)
    assert wanted == pytest.approx(own, rel=0.2)  # other rows of the same random tokens
    null = load_run(tmp_path / "run")
    if transplanted:
        expected = transplant_sink(load_pretrained(config.run.init_from)).params["layers"]["attention"]
        np.testing.assert_allclose(null.params["layers"]["attention"]["null_value"], expected["null_value"], rtol=1e-5)
        assert null.config.model.position_offset == 1


@pytest.mark.slow
def test_a_null_of_one_per_cent_has_one_per_cent(config, tmp_path):
    other = dataclasses.replace(config, model=ModelConfig(preset="residual", normalizer="learned_sink"))
    fit(changed(other, "run", init_null="one_per_cent", steps=1), tmp_path / "run")
    run = load_run(tmp_path / "run")
    ids = np.random.default_rng(1).integers(0, WORDS - 4, (8, 9))
    mass = np.stack([layer.null_mass for layer in run.model(jnp.asarray(ids))[1].attention])
    assert 0.003 < np.median(mass) < 0.03


@pytest.mark.slow
def test_the_references_retrofit_is_another_model_and_says_how_far(config, tmp_path, capsys):
    """Cumulative wiring, a recency bias of 8, small projections, Softmax1 at once."""
    method = dict(preset="oasis", recency_bias_init=8.0, router_init_std=0.02 / 64**0.5)
    text = first_lines(dataclasses.replace(config, model=ModelConfig(**method)), tmp_path / "run", capsys)
    assert distance(text)[0] > 1e-2
    routers = load_run(tmp_path / "run").params["routers"]
    np.testing.assert_array_equal(routers["recency_bias"], 8.0)
    assert np.std(routers["query"]) == pytest.approx(0.0025, rel=0.2)


def test_a_run_goes_on_without_its_source(config, tmp_path):
    fit(changed(config, "run", steps=1), tmp_path / "run")
    shutil.rmtree(config.run.init_from)
    schedule = changed(changed(config, "optimizer", schedule="constant"), "run", steps=1)
    fit(changed(config, "run", steps=1), tmp_path / "run")  # it has all its steps
    with pytest.raises(UserError, match="there is no run"):
        fit(schedule, tmp_path / "another")


def test_a_plan_knows_the_sizes(config):
    model = with_vocabulary(config).model
    assert (model.width, model.vocab_size, model.head_dim, model.norm_epsilon) == (24, WORDS, 10, 1e-4)
    assert with_source(dataclasses.replace(config, run=RunConfig())) == dataclasses.replace(config, run=RunConfig())


@pytest.mark.parametrize(
    "section, fields, message",
    [
        ("model", dict(width=32), r"model.width: 32 asked for, but the model in run.init_from has 24; leave it out"),
        (
            "data",
            dict(tokenizer="bytes"),
            r"data.tokenizer: bytes asked for, but the model in run.init_from reads library",
        ),
        (
            "run",
            dict(init_from=""),
            r"data.tokenizer=library: comes with a pretrained model; name one in run.init_from",
        ),
        ("run", dict(init_null="transplant"), r"init_null: transplant goes with model.normalizer=null_key_value, got"),
        ("run", dict(init_null="one_percent"), r"init_null: unknown name 'one_percent'.*one_per_cent"),
    ],
)
def test_what_does_not_go_together_is_refused(config, tmp_path, section, fields, message):
    with pytest.raises(UserError, match=message):
        fit(changed(config, section, **fields), tmp_path / "run")
