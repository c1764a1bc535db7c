"""A checksum of the elements of an array, the same wherever the array lies and however it is split over devices.

Element i in row-major order is taken as an unsigned number b_i of 32 bits (one of 64 bits as two), and the checksum is
the sum over i of mix(b_i + 0x9E3779B1 i), all modulo 2^32, where mix is a bijection: one changed element always changes
the sum. Addition in integers is exact, so that the order in which devices add does not matter.
"""

import concurrent.futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_STRIDE, _FACTOR = 0x9E3779B1, 0x85EBCA6B
_BLOCK = 2**16  # elements that stay in a processor's cache


def checksums(tree: Any) -> dict[str, int]:
    """{where in the tree: checksum} of every array; every process has to call it where arrays lie in several."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [_words(x) for _, x in leaves]
    here = jax.process_count() == 1 and jax.default_backend() == "cpu"  # compiling would take longer than adding
    if here:
        with concurrent.futures.ThreadPoolExecutor() as threads:
            sums = list(threads.map(lambda x: on_host(np.asarray(x)), arrays))
    else:
        sums = jax.device_get(_on_devices(arrays))
    return {_name(path): int(value) for (path, _), value in zip(leaves, sums)}


def differing(found: dict[str, int], stored: dict[str, int]) -> list[str]:
    """The names of arrays whose checksum is not the stored one."""
    return [name for name, value in found.items() if stored.get(name) != value]


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _words(x: Any) -> Any:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def on_host(x: np.ndarray) -> int:
    """The checksum of an array in this process's memory."""
    words = np.ascontiguousarray(x).reshape(-1)
    words = words.view(np.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
    places, total = np.arange(min(_BLOCK, len(words)), dtype=np.uint32) * np.uint32(_STRIDE), 0
    mixed, shifted = np.empty_like(places), np.empty_like(places)  # nothing is allocated for a block
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK]
        if len(block) < len(mixed):
            places, mixed, shifted = places[: len(block)], mixed[: len(block)], shifted[: len(block)]
        np.add(places, np.uint32(start * _STRIDE % 2**32), out=mixed)
        mixed += block
        mixed ^= np.right_shift(mixed, 15, out=shifted)
        mixed *= np.uint32(_FACTOR)
        mixed ^= np.right_shift(mixed, 13, out=shifted)
        total += int(mixed.sum(dtype=np.uint32))
    return total % 2**32


@jax.jit
def _on_devices(arrays: list[jax.Array]) -> list[jax.Array]:
    return [on_device(x) for x in arrays]


def on_device(x: jax.Array) -> jax.Array:
    """The same as a program for devices, uint32 []; what it needs beside the array is one word a device."""
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)
    place, stride = jnp.zeros((), jnp.uint32), _STRIDE
    for axis in reversed(range(words.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words + place), dtype=jnp.uint32)


def _mix(words):
    """A bijection of 32 bits in which every bit reaches others: flipped signs of two elements do not cancel."""
    words = (words ^ (words >> 15)) * np.uint32(_FACTOR)
    return words ^ (words >> 13)
