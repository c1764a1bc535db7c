"""Paths that a run's checkpoint stores are opened where they lead into the current folder or the run's, else not."""

import os
import pathlib

import pytest

from oasis_jax.config import Config, DataConfig, ModelConfig
from oasis_jax.data import load_corpus
from oasis_jax.errors import UserError
from oasis_jax.evaluation.stored_paths import check_found, check_stored
from oasis_jax.evaluation.subjects import subject_of_run
from oasis_jax.training.load import LoadedRun


@pytest.fixture
def here(tmp_path, monkeypatch) -> pathlib.Path:
    """The current folder, with a run in it and a text of both inside and outside."""
    for name in ("here/run", "here/text", "here/run/text", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text("one two three " * 90)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def asked(pattern: str, **fields) -> DataConfig:
    data = dict(corpus="files", sequence_length=8, batch_size=2, holdout_fraction=0.3)
    return DataConfig(pattern=pattern, **data | fields)


@pytest.mark.parametrize(
    "pattern",
    ["text/*.txt", "./text/a.txt", "**/*.txt", "{here}/text/*.txt", "run/text/*.txt", "{here}/run/text/*.txt"],
)
def test_what_lies_in_the_current_folder_or_the_runs_is_opened(here, pattern):
    check_stored(asked(pattern.format(here=here)), "run")


@pytest.mark.parametrize(
    "pattern",
    ["/etc/*.txt", "~/*.txt", "../elsewhere/*.txt", "text/../../elsewhere/*.txt", "**/../../elsewhere/*.txt",
     "text/**/../*.txt", "{here}x/*.txt"],
)  # fmt: skip
def test_what_lies_elsewhere_is_named_and_asked_for(here, pattern, monkeypatch):
    monkeypatch.setattr("glob.glob", lambda *_, **__: pytest.fail("looked at"))
    with pytest.raises(UserError, match=r"^run: data\.pattern: the run stores '.*stored paths are not opened") as error:
        subject_of_run(loaded(asked(pattern.format(here=here)), {}), "run", "run", 1)
    assert "--set " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "pattern, workdir, opened",
    [
        ("gs://bucket/run/text/*.txt", "gs://bucket/run", True),
        ("s3://bucket/run/text/*.txt", "s3://bucket/run/", True),
        ("text/*.txt", "gs://bucket/run", True),
        ("gs://bucket/run/../other/*.txt", "gs://bucket/run", False),
        ("gs://bucket/runs/*.txt", "gs://bucket/run", False),
        ("s3://bucket/run/*.txt", "gs://bucket/run", False),
        ("gs://bucket/run/*.txt", "run", False),
        ("/etc/*.txt", "gs://bucket/run", False),
    ],
)
def test_in_a_store_a_run_owns_what_lies_below_it(here, pattern, workdir, opened):
    for data in (asked(pattern), asked(f"text,{pattern}", corpus="prepared", mixture="1,1")):
        if opened:
            check_stored(data, workdir)
        else:
            with pytest.raises(UserError, match="stored paths are not opened unasked"):
                check_stored(data, workdir)


def test_every_folder_of_a_mixture_counts(here):
    with pytest.raises(UserError, match="'/srv/other'"):
        check_stored(asked("text, /srv/other", corpus="prepared", mixture="1,1"), "run")


def test_at_the_root_nothing_is_taken_for_granted(here, monkeypatch):
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="stores"):
        check_stored(asked("/etc/*.txt"), here / "run")
    check_stored(asked(f"{here}/run/text/*.txt"), here / "run")


def test_the_run_is_read_where_the_user_says_its_data_lie(here, capsys):
    """Stored elsewhere: refused, read where named, and refused there too where it is another text."""
    data = asked(str(here.parent / "elsewhere" / "*.txt"))
    corpus = load_corpus(data, seed=0)
    run = loaded(data, corpus.identity, corpus.tokenizer)
    with pytest.raises(UserError, match="stored paths are not opened unasked"):
        subject_of_run(run, "run", "run", 1)
    assert subject_of_run(run, "run", "run", 1, data.pattern).corpus == corpus.identity
    moved = subject_of_run(run, "run", "run", 1, "text/*.txt")  # the corpus has moved
    assert moved.config.data.pattern == "text/*.txt" and capsys.readouterr().err == ""
    (here / "text" / "b.txt").write_text("more")
    with pytest.raises(UserError, match="the corpus is not the one this run was trained on"):
        subject_of_run(run, "run", "run", 1, "text/*.txt")


def test_a_stored_path_that_is_opened_is_said(here, capsys):
    data = asked("text/*.txt")
    corpus = load_corpus(data, seed=0)
    subject_of_run(loaded(data, corpus.identity, corpus.tokenizer), "run", "run", 1)
    assert capsys.readouterr().err == "run: its text is read from 'text/*.txt', as its checkpoint says\n"


def test_links_in_the_runs_folder_lead_nowhere(here):
    (here / "run" / "text" / "b.txt").symlink_to(here.parent / "elsewhere" / "a.txt")
    with pytest.raises(UserError, match=r"run/text/b\.txt' leads out of the run's folder; it is not opened"):
        subject_of_run(loaded(asked("run/text/*.txt"), {}), "run", "run", 1)
    (here / "data").symlink_to(here.parent / "elsewhere")  # the user's own
    check_found([here / "data" / "a.txt"], "run", None)


def test_far_more_text_than_the_run_was_trained_on_is_not_read(here, monkeypatch):
    os.truncate(here / "text" / "a.txt", 2**40)
    with pytest.raises(UserError, match=rf"bytes was 1260, is {2**40}\)"):
        subject_of_run(loaded(asked("text/*.txt"), {"bytes": 1260}), "run", "run", 1)


def loaded(data: DataConfig, identity: dict, tokenizer=None) -> LoadedRun:
    config = Config(model=ModelConfig(num_layers=1, width=8, num_heads=1, mlp_dim=8, vocab_size=258), data=data)
    return LoadedRun({}, None, config, tokenizer, identity, {}, 1)
