import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """The models here are tiny and run once or twice: what takes time is to compile them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
