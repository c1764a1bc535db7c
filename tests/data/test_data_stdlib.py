"""The corpus that is on every machine with Python."""

import hashlib
import pathlib
import platform
import sysconfig

import pytest

from oasis_jax.config import DataConfig
from oasis_jax.data import load_corpus
from oasis_jax.data.stdlib import library_files
from oasis_jax.errors import UserError


def test_packages_tests_and_other_files_are_left_out_in_a_fixed_order(tmp_path):
    kept = ["abc.py", "json/__init__.py", "json/decoder.py", "unittest/case.py", "zipfile.py"]
    dropped = [
        "site-packages/x.py",
        "test/test_abc.py",
        "json/tests/test_a.py",
        "notes.txt",
        "__pycache__/abc.py",
        "idlelib/idle_test/a.py",
    ]
    for name in reversed(kept + dropped):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    files = library_files(tmp_path)
    assert [file.name for file in files] == kept
    assert [file.documents for file in files] == [[f"# {name}".encode()] for name in kept]


def test_the_running_interpreters_library_is_a_corpus():
    corpus = load_corpus(DataConfig(), seed=0)
    identity = corpus.identity
    assert identity["python"] == platform.python_version() and identity["name"] == "stdlib"
    assert identity["bytes"] > 5_000_000 and identity["files"] > 300
    assert 0.04 < identity["holdout"]["bytes"] / identity["bytes"] <= 0.05
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    listed = "".join(
        f"{file.name}\0{hashlib.sha256((root / file.name).read_bytes()).hexdigest()}\n" for file in library_files(root)
    )
    assert identity["sha256"] == hashlib.sha256(listed.encode()).hexdigest()
    assert len(corpus.train) > 10_000 and len(corpus.heldout) > 500
    text = corpus.tokenizer.decode(corpus.train.tokens) + corpus.tokenizer.decode(corpus.heldout.tokens)
    assert len(text) == identity["bytes"] and (root / "json" / "decoder.py").read_bytes() in text


def test_no_library_source_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"no Python source in .*; use data\.corpus=files"):
        load_corpus(DataConfig(), seed=0)
