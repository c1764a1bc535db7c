"""A cache of a test's own."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OASIS_JAX_CACHE", str(tmp_path / "cache"))
