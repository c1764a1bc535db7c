"""Normalizers against definitions written out in numpy, known answers and finite differences."""

import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oasis_jax.config import AttentionConfig, field_type
from oasis_jax.model.normalizers import DENSE_NORMALIZERS, NULL_LOGITS, WITH_NULL, null_softmax, softmax

ROWS, KEYS = 5, 11


def scores_and_mask(seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random((ROWS, KEYS)) < 0.7
    mask[0] = True
    mask[1] = False
    mask[2] = np.arange(KEYS) == 3
    return rng.normal(size=(ROWS, KEYS)) * 2, mask


def simplex_threshold(z, power):
    """tau with sum relu(z - tau)^power = 1, by bisection."""
    low, high = z.max() - 1.0, z.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (np.maximum(z - middle, 0) ** power).sum() > 1 else (low, middle)
    return np.maximum(z - low, 0) ** power


def oracle(name, row):
    exponential = np.exp(row - row.max())
    if name == "clipped":
        gamma = -4.0 / KEYS
        return np.clip((1.0 - gamma) * exponential / exponential.sum() + gamma, 0, 1)
    if name == "softpick":
        lifted = np.exp(row) - 1
        epsilon = 1e-6 * np.exp(max(row.max(), 0))  # is added relative to the largest exponential
        return np.maximum(lifted, 0) / (np.abs(lifted).sum() + epsilon)
    return simplex_threshold(row, 1) if name == "sparsemax" else simplex_threshold(row / 2, 2)


@pytest.mark.parametrize("name", DENSE_NORMALIZERS)
def test_values_match_the_definition_over_the_allowed_keys(name):
    scores, mask = scores_and_mask()
    with jax.enable_x64(True):
        got = np.array(DENSE_NORMALIZERS[name](jnp.asarray(scores), jnp.asarray(mask), AttentionConfig()))
    for row in range(ROWS):
        expected = np.zeros(KEYS)
        if mask[row].any():
            expected[mask[row]] = oracle(name, scores[row][mask[row]])
        np.testing.assert_allclose(got[row], expected, atol=1e-12)


@pytest.mark.parametrize("name", DENSE_NORMALIZERS)
def test_gradients_match_finite_differences_and_are_finite_on_empty_rows(name):
    scores, mask = scores_and_mask(1)
    cotangent = np.random.default_rng(2).normal(size=scores.shape)
    with jax.enable_x64(True):

        def loss(s):
            return (DENSE_NORMALIZERS[name](s, jnp.asarray(mask), AttentionConfig()) * cotangent).sum()

        gradient = np.array(jax.grad(loss)(jnp.asarray(scores)))
        for index in np.ndindex(ROWS, KEYS):
            step = np.zeros_like(scores)
            step[index] = 1e-6
            numeric = (loss(jnp.asarray(scores + step)) - loss(jnp.asarray(scores - step))) / 2e-6
            np.testing.assert_allclose(gradient[index], numeric, atol=1e-6)
    np.testing.assert_array_equal(gradient[1], 0.0)


@pytest.mark.parametrize("name", DENSE_NORMALIZERS)
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_extreme_scores_stay_finite(name, shift):
    scores, mask = scores_and_mask(3)
    value, gradient = jax.value_and_grad(lambda s: DENSE_NORMALIZERS[name](s, mask, AttentionConfig()).sum())(
        jnp.asarray(scores + shift, jnp.float32)
    )
    chex.assert_tree_all_finite((value, gradient))


def test_a_given_gamma_is_used_as_it_is():
    config = AttentionConfig(clip_gamma=-0.25, clip_zeta=1.1)
    scores = jnp.array([[0.0, 1.0, 3.0]])
    p = softmax(scores, jnp.ones_like(scores, bool))
    expected = np.clip(1.35 * np.array(p) - 0.25, 0, 1)
    np.testing.assert_allclose(
        DENSE_NORMALIZERS["clipped"](scores, jnp.ones_like(scores, bool), config), expected, atol=1e-6
    )


@pytest.mark.parametrize("null", [-np.inf, 0.0, "by head", "by query"])
def test_null_softmax_is_the_definition_also_of_empty_rows(null):
    """A key more, of score b and value zero: heads H = 2, rows as queries."""
    scores, mask = scores_and_mask(4)
    heads = 2
    scores, mask = np.stack([scores, scores[::-1]])[None], np.stack([mask, mask[::-1]])[None]
    logits = {"by head": np.array([0.7, -1.2]), "by query": np.linspace(-3, 3, heads * ROWS).reshape(1, heads, ROWS)}
    b = logits.get(null, null)
    b = np.broadcast_to(b[:, None] if null == "by head" else b, (1, heads, ROWS))
    with jax.enable_x64(True):
        got = [np.array(x) for x in null_softmax(jnp.asarray(scores), jnp.asarray(mask), jnp.asarray(b))]
    e = np.where(mask, np.exp(scores), 0.0)
    total = e.sum(-1) + np.exp(b)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.nan_to_num(e / total[..., None]), np.nan_to_num(np.exp(b) / total), np.log(total)
    for x, wanted in zip(got, expected):
        np.testing.assert_allclose(x, wanted, atol=1e-12)


def test_normalizers_with_a_null_are_those_that_leave_mass_over():
    assert set(WITH_NULL) == set(NULL_LOGITS) - {"softmax"} | {"clipped", "softpick"}


def test_the_config_names_are_the_tables():
    names = set(typing.get_args(field_type(AttentionConfig, "normalizer")))
    assert names == set(NULL_LOGITS) | set(DENSE_NORMALIZERS)
