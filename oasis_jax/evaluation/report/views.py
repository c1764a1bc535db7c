"""What a report shows of one batch and no measure reduces: how large activations are, and which tokens carry the
attention.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from oasis_jax.data import Tokenizer
from oasis_jax.evaluation.evaluator import Batch, of_model
from oasis_jax.evaluation.measures.probabilities import has_null

TOKENS = 320  # of the first held-out sequence that the token view shows
# Edges of the bins of |x| / root mean square; everything below the first or above the last counts in the outermost
# bins.
EDGES = tuple(float(2 ** (i / 2)) for i in range(-12, 21))

DEFINITIONS = {
    "histograms": {
        "tensor": "|x| / (root mean square of x), every layer's attention output, MLP output and layer output",
        "average": "share of the values of one batch in each bin, over layers; kind of tap -> bins, whose edges "
        "are given",
    },
    "tokens": {
        "tensor": "received: a_k, mean over the queries i >= k of p_i(k); null: omega of the token's own query",
        "average": "mean over layers and heads of the first held-out sequence; one value a token",
    },
}


def histogram(taps: Sequence[Float[Array, "B T D"]]) -> Float[Array, " bins"]:
    """Share of |x| / rms in each bin, every tensor divided by its own rms, over all of them."""
    inner = jnp.asarray(EDGES[1:-1])
    counts = []
    for x in taps:
        size = jnp.abs(x.astype(jnp.float32))
        size = size / jnp.maximum(jnp.sqrt(jnp.square(size).mean()), jnp.finfo(jnp.float32).tiny)
        below = jnp.stack([(size < edge).mean() for edge in inner])
        counts.append(jnp.diff(below, prepend=0.0, append=1.0))
    return jnp.stack(counts).mean(0)


@functools.partial(jax.jit, static_argnames=("read_model",))
def _look(read_model, state, batch) -> dict[str, dict[str, Array]]:
    reading = read_model(state, batch)
    taps = reading.statistics.taps
    found = {
        "histograms": {kind: histogram(taps[kind]) for kind in ("attention_output", "mlp_output", "layer_output")},
        "tokens": {},
    }
    if reading.probabilities is not None:
        length = reading.outputs.shape[1]
        sums = jnp.stack([layer.column_sums[0] for layer in reading.probabilities]).mean((0, 1))
        found["tokens"]["received"] = sums / (length - jnp.arange(length))
        if has_null(reading.attention):
            found["tokens"]["null"] = jnp.stack([layer.null_mass[0] for layer in reading.attention]).mean((0, 1))
    return found


def spelled(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Each token as text: "" for one that stands for no text; bytes that are no text alone as U+FFFD."""
    return [tokenizer.decode([int(i)]).decode("utf-8", "replace") for i in ids]


def look(model: nnx.Module, batch: Batch, tokenizer: Tokenizer | None) -> dict:
    """One forward pass over a batch of B sequences, of which the first is the one shown.

    Args:
      model: an `oasis_jax.model.decoder.Decoder`.
      batch: as for `evaluate_model`.
      tokenizer: None for a model of vectors, which has no token view.

    Returns:
      {"edges", "histograms": kind of tap -> shares, "tokens": {"text", "received", "null"} or None, "samples",
      "definitions"}; "null" is None where the normalizer has no null.
    """
    read_model, state, _ = of_model(model)
    found: Mapping = jax.device_get(_look(read_model, state, dict(batch)))
    tokens = None
    if tokenizer is not None and found["tokens"]:
        values = {name: np.asarray(found["tokens"][name], float)[:TOKENS].tolist() for name in found["tokens"]}
        tokens = {"text": spelled(np.asarray(batch["inputs"])[0, :TOKENS], tokenizer), "null": None} | values
    histograms = {kind: np.asarray(shares, float).tolist() for kind, shares in found["histograms"].items()}
    return {
        "edges": list(EDGES),
        "histograms": histograms,
        "tokens": tokens,
        "samples": {"sequences": len(batch["inputs"])},
        "definitions": DEFINITIONS,
    }
