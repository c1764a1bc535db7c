import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Drops what a file of tests has compiled: a worker would otherwise hold gigabytes of programs that nobody runs again."""
    yield
    jax.clear_caches()
