import gc
import os

import jax
import psutil
import pytest
from stores import serve

# Kernels' interpreters call back into Python, and a callback waits for a thread of XLA's pool: where the program that
# called holds the only one, it waits for ever (jax issues 24255 and 25861). With a pool of one thread
# `test_vmap_and_remat` hung in 8 of 12 runs, with four in none of 12.
os.environ["NPROC"] = str(max(4, int(os.environ.get("NPROC", 0))))
jax.config.update("jax_cpu_enable_async_dispatch", False)

# Three quarters of the suite's time is compiling, and half of that is XLA's emitters of fusions, which go through MLIR.
# The older ones serve where optimizations are off anyway (`make test`), in programs that tests start, too; from JAX
# 0.11 on there are no older ones.
if jax.config.read("jax_disable_most_optimizations") and jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()


def pytest_collection_finish():
    """What the libraries have made by now stays: a twentieth of the suite's time was the collector's walks over it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


HELD = 2 * 2**30  # bytes


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Drops what files of tests have compiled once it is much: a worker would otherwise hold gigabytes of programs that
    nobody runs again. Not after every file, for small programs serve many.
    """
    yield
    if psutil.Process().memory_info().rss > HELD:
        jax.clear_caches()


@pytest.fixture(scope="session")
def gs():
    """The address of a bucket; see `stores`."""
    with serve("gs") as bucket:
        yield bucket


@pytest.fixture(scope="session")
def s3():
    """The address of a bucket; see `stores`."""
    with serve("s3") as bucket:
        yield bucket


@pytest.fixture(params=["gs", "s3"])
def bucket(request):
    """The address of a bucket of each kind."""
    return request.getfixturevalue(request.param)
