"""What only the TPU kernels can get wrong: several tiles on both sides, tiles that are left out, folded
heads, and what cannot be served.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import explain, null_attention
from pallas_kernels.dispatch import interpret_kernels
from pallas_kernels.null_attention.mosaic_tpu import tiles

# batch, queries, keys, query heads, key heads, head size. With tiles of 128: 3 x 3, 2 x 4 and 4 x 2 tiles, ragged ones
# among them.
CASES = {
    "causal": dict(shape=(1, 301, 301, 2, 1, 5)),
    "causal_aligned_at_the_end": dict(shape=(1, 201, 430, 2, 2, 7), logit_softcap=3.0),
    "more_queries_than_keys": dict(shape=(1, 430, 201, 2, 1, 5)),
    "window_of_a_part_of_a_tile": dict(shape=(1, 401, 401, 2, 1, 5), window=37),
    "window_of_more_than_a_tile": dict(shape=(1, 301, 430, 2, 1, 5), window=150, is_causal=False),
    "segments": dict(shape=(2, 290, 290, 2, 1, 5), segments=True),
    "both_directions": dict(shape=(1, 130, 301, 2, 1, 70), is_causal=False),
    "decoding_with_folded_heads": dict(shape=(2, 3, 300, 6, 2, 5), segments=True),
}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 128)
    with interpret_kernels():
        yield


def make(shape, segments=False, **options):
    batch, length, keys, heads, key_heads, size = shape
    random = np.random.default_rng(sum(shape))
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    arrays = (
        normal(batch, length, heads, size),
        normal(batch, keys, key_heads, size),
        normal(batch, keys, key_heads, size),
        normal(heads),
    )
    if segments:
        options["segment_ids"] = tuple(np.sort(random.integers(0, 3, (batch, n)), axis=1) for n in (length, keys))
    return (
        arrays,
        options,
        (normal(batch, length, heads, size), normal(batch, heads, length), normal(batch, heads, length)),
    )


def run(arrays, options, cotangents, implementation):
    def loss(arrays):
        *qkv, b = arrays
        result = null_attention(*qkv, null_logit=b, implementation=implementation, **options)
        return sum(jnp.vdot(c, x) for c, x in zip(cotangents, result)), tuple(result)

    (_, values), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return values + gradients


@pytest.mark.parametrize("name", CASES)
def test_several_tiles_equal_the_definition_in_float64(small_tiles, name):
    arrays, options, cotangents = make(**CASES[name])
    actual = run(arrays, options, cotangents, "mosaic_tpu")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (arrays, cotangents))
        wanted = run(wide[0], options, wide[1], "reference")
    for i, (found, want) in enumerate(zip(actual, wanted)):
        np.testing.assert_allclose(found, want, rtol=0, atol=(1e-6 if i < 3 else 1e-5) * np.abs(want).max())


def reached(reach, ours, theirs):
    return {(i, j) for i in range(ours) for first, last in [reach(i)] for j in range(first, last + 1) if j < theirs}


@pytest.mark.parametrize(
    "name", ["causal", "causal_aligned_at_the_end", "window_of_a_part_of_a_tile", "window_of_more_than_a_tile"]
)
def test_only_tiles_with_a_visible_key_are_computed(small_tiles, name):
    _, length, keys, *_ = CASES[name]["shape"]
    window = CASES[name].get("window")
    options = tiles.Options(causal=True, window=window, softcap=None, scale=1.0)
    shape = tiles.Shape.of(jnp.zeros((1, length, 1, 8)), jnp.zeros((1, keys, 1, 8)))
    rows, columns = np.arange(shape.rows)[:, None] + keys - length, np.arange(shape.keys)
    visible = (rows >= columns) & ((rows - columns < window) if window else True)
    seen = visible.reshape(shape.row_tiles, shape.row_tile, shape.key_tiles, shape.key_tile).any((1, 3))
    wanted = set(map(tuple, np.argwhere(seen).tolist()))
    by_rows = reached(lambda i: tiles.key_range(options, shape, i), shape.row_tiles, shape.key_tiles)
    by_keys = reached(lambda j: tiles.row_range(options, shape, j), shape.key_tiles, shape.row_tiles)
    assert by_rows == wanted == {(i, j) for j, i in by_keys}
    assert len(wanted) < shape.row_tiles * shape.key_tiles


@pytest.mark.parametrize("name", CASES)
def test_tiles_without_a_mask_have_nothing_to_mask(small_tiles, name):
    (_, length, keys, heads, key_heads, _), window = CASES[name]["shape"], CASES[name].get("window")
    options = tiles.Options(causal=CASES[name].get("is_causal", True), window=window, softcap=None, scale=1.0)
    shape = tiles.Shape.of(jnp.zeros((1, length, heads, 8)), jnp.zeros((1, keys, key_heads, 8)))
    row, column = np.arange(shape.rows)[:, None], np.arange(shape.keys)
    distance = (row % length if shape.folded else row) + keys - length - column
    visible = (
        (column < keys) & ((distance >= 0) | (not options.causal and window is None)) & (distance < (window or np.inf))
    )
    visible |= row >= (length * heads // key_heads if shape.folded else length)  # padded rows
    seen = visible.reshape(shape.row_tiles, shape.row_tile, shape.key_tiles, shape.key_tile).all((1, 3))
    pairs = [(i, j) for i in range(shape.row_tiles) for j in range(shape.key_tiles)]
    unmasked = [pair for pair in pairs if tiles.wholly_visible(options, shape, *pair)]
    assert all(seen[pair] for pair in unmasked)
    if name in ("causal", "causal_aligned_at_the_end", "both_directions"):  # long enough to have some
        assert unmasked


def test_a_finite_null_logit_below_every_score_takes_rows_without_a_key():
    query, lowest = jnp.ones((1, 5, 1, 8)), np.finfo(np.float32).min
    with interpret_kernels():
        result = null_attention(query, query[:, :3], query[:, :3], null_logit=lowest, implementation="mosaic_tpu")
    np.testing.assert_array_equal(result.null_mass[0, 0], [1.0, 1.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(result.lse[0, 0, :2], [lowest, lowest])
    np.testing.assert_array_equal(result.output[0, :, 0, 0], [0.0, 0.0, 1.0, 1.0, 1.0])


def test_what_cannot_be_served_says_why():
    arrays = [jax.ShapeDtypeStruct((1, 9, 2, size), jnp.float32) for size in (8, 8, 8)]
    assert "runs on TPUs, the call is compiled for cpu" in explain("null_attention", *arrays).reasons["mosaic_tpu"]
    with interpret_kernels(), pytest.raises(ValueError, match="mosaic_tpu: head size 320 is more than 256"):
        null_attention(*[jnp.zeros((1, 3, 1, 320))] * 3, implementation="mosaic_tpu")
