"""What commands read from and write to object stores, beside workdirs."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from pretrained.tiny import small_checkpoint

from oasis_jax.commands import COMMANDS
from oasis_jax.config import DataConfig
from oasis_jax.data import load_corpus, prepare, train_batches
from oasis_jax.errors import UserError
from oasis_jax.evaluation import runs
from oasis_jax.pretrained import load_pretrained
from oasis_jax.pretrained.tokenizer import open_tokenizer
from oasis_jax.storage import as_path, listing
from oasis_jax.storage.paths import filesystem
from oasis_jax.training.warm_start import is_pretrained


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OASIS_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(9):
        (folder / f"{i}.txt").write_text(" ".join(f"{i * k % 97} plums" for k in range(60)))
    return folder


@pytest.fixture(scope="module")
def config(text):
    return DataConfig(corpus="files", pattern=f"{text}/*.txt", sequence_length=9, batch_size=5, holdout_fraction=0.2)


def put(folder, bucket, name):
    """A copy of a folder in a store."""
    remote = as_path(f"{bucket}/{name}", "test")
    filesystem(remote).put(f"{folder}/", str(remote), recursive=True)
    return str(remote)


def rows(corpus, config):
    batches = train_batches(corpus.train, config, seed=3)
    return np.stack([next(batches)["inputs"] for _ in range(4)])


def test_texts(bucket, text, config):
    remote = put(text, bucket, "text")
    here = load_corpus(config, seed=0)
    there = load_corpus(dataclasses.replace(config, pattern=f"{remote}/*.txt"), seed=0)
    assert there.identity == here.identity and np.array_equal(rows(there, config), rows(here, config))
    with pytest.raises(UserError, match=r"data\.pattern: no object matches '.*/text/\*\.jsonl'"):
        load_corpus(dataclasses.replace(config, pattern=f"{remote}/*.jsonl"), seed=0)
    with pytest.raises(UserError, match=r"which is neither \.txt nor \.jsonl"):
        as_path(f"{remote}/a.csv", "test").write_text("1,2")
        load_corpus(dataclasses.replace(config, pattern=f"{remote}/*"), seed=0)


def test_prepared_shards(bucket, config, tmp_path):
    prepare.prepare(config, None, tmp_path / "made", shard_bytes=900)
    remote = put(tmp_path / "made", bucket, "made")
    prepared = dataclasses.replace(config, corpus="prepared", pattern=remote)
    found = load_corpus(prepared, seed=0)
    here = load_corpus(dataclasses.replace(prepared, pattern=str(tmp_path / "made")), seed=0)
    assert found.identity == here.identity and np.array_equal(rows(found, config), rows(here, config))
    name = next(name for name in listing(as_path(remote, "test")) if name.startswith("train"))
    as_path(f"{remote}/{name}", "test").write_bytes(b"cut")
    with pytest.raises(UserError, match="3 bytes where"):
        load_corpus(prepared, seed=0)


def test_pretrained_models_and_their_tokenizers(bucket, tmp_path):
    small_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"not fetched")
    remote = put(tmp_path / "model", bucket, "model")
    here, there = load_pretrained(tmp_path / "model"), load_pretrained(remote)
    assert jax.tree.all(jax.tree.map(np.array_equal, here.params, there.params)) and there.card["source"] == remote
    assert is_pretrained(remote) and not is_pretrained(f"{bucket}/nothing")
    assert not list((tmp_path / "cache").rglob("*.bin"))
    for source in ("", "/tokenizer.json"):
        here, there = (open_tokenizer(f"{folder}{source}") for folder in (tmp_path / "model", remote))
        assert here.identity == there.identity
    with pytest.raises(UserError, match=r"model: there is nothing at '.*/nothing'"):
        load_pretrained(f"{bucket}/nothing")


def test_reports_go_where_they_are_to_be(bucket, tmp_path, text):
    small_checkpoint(tmp_path / "model", "llama")
    options = runs.ModelOptions(text=f"{put(text, bucket, 'read')}/*.txt", length=9, num_batches=1, batch_size=3)
    report = f"{bucket}/report"
    runs.evaluate(
        [], report, models=[put(tmp_path / "model", bucket, "measured")], options=options, measures=["perplexity"]
    )
    found = listing(as_path(report, "--report"))
    assert {"index.html", "metrics.json"} <= found.keys() and any(name.startswith("figures/") for name in found)
    stored = json.loads(as_path(f"{report}/metrics.json", "--report").read_bytes())
    (run,) = stored["runs"].values()
    assert stored["complete"] and run["source"] == f"{bucket}/measured" and run["metrics"]["loss"]["value"] > 0


@pytest.mark.parametrize(
    "command, flags",
    [
        ("export", ["model", "--out=gs://bucket/x"]),
        ("prepare", ["--source=*.txt", "--tokenizer=bytes", "--out=s3://bucket/x"]),
        ("perplexity", ["--model=m", "--text=t", "--window=8", "--stride=4", "--out=gs://bucket/x"]),
        ("study", ["study_trigger", "--out=gs://bucket/x"]),
        ("train", ["--config=demo", "--workdir=gcs://bucket/x"]),
        ("eval", ["--workdir=a", "--report=azure://bucket/x"]),
    ],
)
def test_a_path_that_a_command_cannot_use_is_refused_before_anything_else(command, flags, capsys):
    assert command in COMMANDS
    module = __import__(f"oasis_jax.commands.{command}", fromlist=["main"])
    with pytest.raises(SystemExit) as stopped:
        module.main(flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and ("has to be on this machine" in line or "allowed: gs, s3" in line)


def test_library_calls_make_no_folder_of_that_name(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--out: 's3://bucket/x': has to be on this machine"):
        prepare.prepare(config, None, "s3://bucket/x")
    assert list(tmp_path.iterdir()) == []
