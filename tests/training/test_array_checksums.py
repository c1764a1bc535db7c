"""Checksums of arrays against a plain sum in Python's whole numbers."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from oasis_jax.training.array_checksums import checksums, differing, on_device, on_host

TYPES = [np.float32, ml_dtypes.bfloat16, np.int32, np.uint8]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 5, 7), (0, 3), (9, 8111)]  # the last: more than one block, not a multiple


def plain(x: np.ndarray) -> int:
    """As the module's docstring says it, element by element, in numbers without bounds."""
    total = 0
    for place, element in enumerate(x.reshape(-1)):
        word = int.from_bytes(element.tobytes(), "little")
        word = (word + 0x9E3779B1 * place) % 2**32
        word = (word ^ (word >> 15)) * 0x85EBCA6B % 2**32
        total += word ^ (word >> 13)
    return total % 2**32


def values(shape: tuple[int, ...], kind: type) -> np.ndarray:
    return np.asarray(100 * np.random.default_rng(len(shape)).random(shape)).astype(kind)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_the_host_and_on_devices_it_is_the_sum(shape, kind):
    x = values(shape, kind)
    assert on_host(x) == int(jax.jit(on_device)(jnp.asarray(x))) == plain(x)


def test_any_change_of_one_element_and_flipped_signs_of_two_change_it():
    x = values((5, 9), np.float32)
    right = on_host(x)
    for place in range(x.size):
        for bit in range(32):
            changed = x.copy()
            changed.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << bit)
            assert on_host(changed) != right
    assert on_host(-x) != right
    assert len({on_host(-x[: 2 * n]) for n in (1, 2)}) == 2


def test_places_count():
    x = values((6, 6), np.float32)
    assert len({on_host(y) for y in (x, x.T, x[::-1], x[:, ::-1], np.roll(x, 1))}) == 5


def test_names_say_where_an_array_differs():
    tree = {"params": {"layers": [jnp.ones(3), jnp.zeros((2, 5))]}, "rng": jax.random.key(3)}
    stored = checksums(tree)
    assert set(stored) == {"params.layers.0", "params.layers.1", "rng"}
    assert differing(checksums(tree), stored) == []
    other = {**tree, "rng": jax.random.key(4)}
    other["params"] = {"layers": [jnp.ones(3), jnp.zeros((2, 5)).at[1, 2].set(-0.0)]}
    assert differing(checksums(other), stored) == ["params.layers.1", "rng"]
    assert differing(checksums(tree["params"]), stored) == ["layers.0", "layers.1"]  # not there under these names
