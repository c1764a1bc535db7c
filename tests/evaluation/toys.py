"""Tiny models, batches, and attention probabilities written out in numpy, for the tests of the measures."""

import functools

import jax
import numpy as np
from flax import nnx

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation import EVALUATORS, evaluate_model
from oasis_jax.model.decoder import Decoder
from oasis_jax.placement import UNSHARDED

BATCH, LENGTH, VOCAB = 3, 11, 29
NORMALIZERS = ("softmax", "softmax1", "learned_sink", "clipped", "entmax15", "sparsemax", "softpick")
# The expected values come from another compilation of the float32 model: its sums of up to 100 terms are in another
# order.
ROUNDING = 100 * float(np.finfo(np.float32).eps)
WITH_NULL = ("softmax1", "learned_sink", "clipped", "softpick")


def build(**fields) -> Decoder:
    """A tiny model with every parameter moved away from its start, so that nothing is uniform."""
    sizes = dict(num_layers=2, width=12, num_heads=6, num_kv_heads=3, head_dim=4, mlp_dim=10)
    sizes |= {"vocab_size": VOCAB} if fields.get("inputs", "tokens") == "tokens" else {"vector_dim": 5}
    model = Decoder(ModelConfig(**(sizes | fields)), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    random = np.random.default_rng(1)
    leaves = [leaf + (0.3 * random.standard_normal(leaf.shape)).astype(np.float32) for leaf in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


def placed(model: Decoder) -> tuple:
    """The first arguments of what measures a decoder."""
    return model.parameters(), model.config, UNSHARDED


def measure_family(name: str, model: Decoder, batches: list[dict]) -> dict:
    """One family of measures alone."""
    return evaluate_model(model, batches, {name: EVALUATORS[name]})


def token_batches(count: int = 2) -> list[dict]:
    random = np.random.default_rng(2)
    shape = (BATCH, LENGTH)
    return [
        {
            "inputs": random.integers(VOCAB, size=shape, dtype=np.int32),
            "targets": random.integers(VOCAB, size=shape, dtype=np.int32),
            "weights": (random.random(shape) > 0.2).astype(np.float32),
        }
        for _ in range(count)
    ]


@functools.partial(jax.jit, static_argnames="graphdef")
def _forward(graphdef, state, inputs):
    return nnx.merge(graphdef, state)(inputs)


def forward(model: Decoder, batches: list[dict]):
    """Outputs and statistics of all sequences at once, in numpy."""
    graphdef, state = nnx.split(model)
    return jax.tree.map(np.asarray, _forward(graphdef, state, np.concatenate([batch["inputs"] for batch in batches])))


# Probabilities from scores, one row at a time, in float64


def _threshold(function, low: float, high: float) -> float:
    """The root of a decreasing function, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 1 else (low, middle)
    return low


def probabilities(scores: np.ndarray, config: ModelConfig, null_logit: float, length: int) -> np.ndarray:
    """A row of attention probabilities over the allowed keys."""
    e = np.exp(scores)
    softmax = e / e.sum()
    if config.normalizer == "softmax":
        return softmax
    if config.normalizer in ("softmax1", "learned_sink"):
        return e / (np.exp(null_logit) + e.sum())
    if config.normalizer == "clipped":
        gamma = -config.clip_alpha / length
        return np.clip((config.clip_zeta - gamma) * softmax + gamma, 0, 1)
    if config.normalizer == "softpick":
        return np.maximum(e - 1, 0) / (np.abs(e - 1).sum() + 1e-6)
    power = {"sparsemax": 1, "entmax15": 2}[config.normalizer]
    z = scores / power
    tau = _threshold(lambda tau: (np.maximum(z - tau, 0) ** power).sum(), z.min() - 2, z.max())
    return np.maximum(z - tau, 0) ** power


def materialized(layer, config: ModelConfig, null_logits: np.ndarray) -> np.ndarray:
    """[B, N, T, T] attention probabilities from a layer's queries and keys."""
    query, key = layer.query.astype(np.float64), layer.key.astype(np.float64)
    batch, length, heads, size = query.shape
    p = np.zeros((batch, heads, length, length))
    for b, n, t in np.ndindex(batch, heads, length):
        scores = key[b, : t + 1, n * key.shape[2] // heads] @ query[b, t, n] / np.sqrt(size)
        p[b, n, t, : t + 1] = probabilities(scores, config, null_logits[n], length)
    return p


def all_probabilities(model: Decoder, statistics) -> np.ndarray:
    """[B, L, N, T, T]: those of every layer of a model."""
    p = []
    for layer, module in zip(statistics.attention, model.layers):
        learned = module.attention.parameters.get("null_logit", np.zeros(layer.query.shape[2]))
        p.append(materialized(layer, model.config, np.asarray(learned, np.float64)))
    return np.stack(p, 1)
