"""What a report shows of one batch and no measure reduces: how large activations are, and which tokens carry the
attention.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.data import Tokenizer
from oasis_jax.evaluation.evaluator import Batch, Evaluator, LayerReading, Rows
from oasis_jax.evaluation.passes import DecoderPass, collect
from oasis_jax.model.masks import allowed_keys, scores
from oasis_jax.model.normalizers import DENSE_NORMALIZERS
from oasis_jax.placement import Placement

TOKENS = 320  # of the first held-out sequence that the token view shows
MAP_TOKENS = 48  # of it in the picture of one head
KINDS = ("attention_output", "mlp_output", "layer_output")  # of taps, in the histograms
# Edges of the bins of |x| / root mean square; everything below the first or above the last counts in the outermost
# bins.
EDGES = tuple(float(2 ** (i / 2)) for i in range(-12, 21))

DEFINITIONS = {
    "histograms": {
        "tensor": "|x| / (root mean square of x over the sequence), every layer's attention output, MLP output and "
        "layer output",
        "average": "share of a sequence's values in each bin, mean over the sequences of one batch and layers; "
        "kind of tap -> "
        "bins, whose edges are given",
    },
    "tokens": {
        "tensor": "received: a_k, mean over the queries i >= k of p_i(k); null: omega of the token's own query",
        "average": "mean over layers and heads of the first held-out sequence; one value a token",
    },
    "head": {
        "tensor": "p_i(j) of one head, and omega_i in the last column; of the first held-out sequence",
        "average": "none; the head with the largest mean first-token mass over the sequence, of all layers",
    },
}


def histogram(x: Float[Array, "B T D"]) -> Float[Array, "B bins"]:
    """Of each sequence, the share of |x| / rms in each bin."""
    size = jnp.abs(x.astype(jnp.float32))
    rms = jnp.sqrt(jnp.square(size).mean((1, 2), keepdims=True))
    size = size / jnp.maximum(rms, jnp.finfo(jnp.float32).tiny)
    below = jnp.stack([(size < edge).mean((1, 2)) for edge in EDGES[1:-1]], 1)
    return jnp.diff(below, axis=1, prepend=0.0, append=1.0)


def read(reading: LayerReading) -> Rows:
    """Per kind of tap its histogram [B, bins]; what tokens receive, and their null mass [B, T]."""
    rows = {kind: histogram(getattr(reading.statistics, kind)) for kind in KINDS}
    tokens, p = reading.tokens, reading.probabilities
    if p is not None:
        received = p.column_sums.mean(1) / (tokens.document_length - tokens.place)
        rows["received"] = tokens.in_order(received)
        if tokens.has_null:
            rows["null"] = tokens.in_order(reading.attention.null_mass.mean(1))

    return rows | _strongest_head(reading)


def _strongest_head(reading: LayerReading) -> Rows:
    """Of every sequence the head that rests most on the first token: its number [B], its mean mass [B], and the start
    of its rows with the null behind them [B, t, t + 1]; nothing where it is not known how rows are made, or where a
    sequence is split over devices.
    """
    layer, context = reading.attention, reading.tokens.context
    if layer is None or layer.static is None or context.placement.ways("length") > 1:
        return {}
    config, count = layer.static.config, min(MAP_TOKENS, layer.query.shape[1])
    order = context.order(layer.query.shape[1])
    segments = context.segment_ids
    ids = {} if segments is None else dict(query_segments=segments[:, :count], key_segments=segments)
    allowed = allowed_keys(order[:, :count], order, window=config.window, **ids)
    logits = scores(layer.query[:, :count], layer.key, config)
    if config.normalizer in DENSE_NORMALIZERS:
        p = DENSE_NORMALIZERS[config.normalizer](logits, allowed, config)
    else:
        p = jnp.where(allowed, jnp.exp(logits - layer.lse[:, :, :count, None]), 0.0)
    rows = jnp.concatenate([p[..., :count], layer.null_mass[:, :, :count, None]], -1)
    mass = layer.first_token_mass.mean(-1)
    head = mass.argmax(1)
    chosen = jnp.take_along_axis(rows, head[:, None, None, None], 1)[:, 0]
    return {"head": head, "head_mass": mass.max(1), "head_rows": chosen}


VIEW = Evaluator(layer=read)


def spelled(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Each token as text: "" for one that stands for no text; bytes that are no text alone as U+FFFD."""
    return [tokenizer.decode([int(i)]).decode("utf-8", "replace") for i in ids]


def look(params: Mapping, config: ModelConfig, placement: Placement, batch: Batch, tokenizer: Tokenizer | None) -> dict:
    """One forward pass over a batch of B sequences, of which the first is the one shown.

    Args:
      params, config, placement: see `oasis_jax.evaluation.evaluate`.
      batch: one of its batches.
      tokenizer: None for a model of vectors, which has no token view.

    Returns:
      {"edges", "histograms": kind of tap -> shares, "tokens": {"text", "received", "null"} or None, "head": {"layer",
      "head", "rows"} or None, "samples", "definitions"}; "null" is None where the normalizer has no null.
    """
    (rows,), _ = collect(DecoderPass(config, placement), params, [batch], (VIEW,))
    tokens = None
    if tokenizer is not None and "received" in rows:
        values = {name: rows[name][0].mean(0)[:TOKENS].tolist() for name in ("received", "null") if name in rows}
        tokens = {"text": spelled(batch["inputs"][0, :TOKENS], tokenizer), "null": None} | values
    histograms = {kind: rows[kind].mean((0, 1)).tolist() for kind in KINDS}
    return {
        "edges": list(EDGES),
        "histograms": histograms,
        "tokens": tokens,
        "head": _shown_head(rows),
        "samples": {"sequences": len(batch["inputs"])},
        "definitions": DEFINITIONS,
    }


def _shown_head(rows: Rows) -> dict | None:
    """Of all layers the head with the largest mass, of the first sequence."""
    if "head_rows" not in rows:
        return None
    layer = int(rows["head_mass"][0].argmax())
    shown = rows["head_rows"][0, layer].astype(float).round(5)
    return {"layer": layer, "head": int(rows["head"][0, layer]), "rows": shown.tolist()}
