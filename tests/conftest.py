import jax
import pytest

# Kernels' interpreters call back into Python, which on CPUs hangs now and then while other computations are under way
# (jax issues 24255 and 25861).
jax.config.update("jax_cpu_enable_async_dispatch", False)


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Drops what a file of tests has compiled: a worker would otherwise hold gigabytes of programs that nobody runs
    again.
    """
    yield
    jax.clear_caches()
