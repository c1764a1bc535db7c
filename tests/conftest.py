import os

import jax
import pytest

# Kernels' interpreters call back into Python, and a callback waits for a thread of XLA's pool: where the program that
# called holds the only one, it waits for ever (jax issues 24255 and 25861). With a pool of one thread
# `test_vmap_and_remat` hung in 8 of 12 runs, with four in none of 12.
os.environ["NPROC"] = str(max(4, int(os.environ.get("NPROC", 0))))
jax.config.update("jax_cpu_enable_async_dispatch", False)


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Drops what a file of tests has compiled: a worker would otherwise hold gigabytes of programs that nobody runs
    again.
    """
    yield
    jax.clear_caches()
