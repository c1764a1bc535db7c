"""Massive activations: a few huge numbers at fixed channels of the stream (Sun et al., arXiv 2402.17762)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation import bootstrap
from oasis_jax.evaluation.bootstrap import Estimate, per_sequence
from oasis_jax.evaluation.evaluator import Evaluator, LayerReading, Rows, Value
from oasis_jax.evaluation.measures.order_statistics import median

MAGNITUDE = 100.0
RATIO = 1000.0  # over the median magnitude of the sequence's layer output

_MASSIVE = (
    f"elements h of each layer's output [T, D] with |h| > {MAGNITUDE:g} and |h| >= {RATIO:g} x median |h| "
    "of the sequence"
)
_SOURCE, _TAPS = "Sun et al., arXiv 2402.17762", "models that give their layers' outputs"
DEFINITIONS = {
    "massive_activations": {
        "tensor": _MASSIVE,
        "average": "number a sequence, mean over sequences, largest over layers",
        "source": _SOURCE,
        "applies_to": _TAPS,
    },
    "massive_activations_by_layer": {
        "tensor": _MASSIVE,
        "average": "number a sequence, mean over sequences; one value a layer",
        "source": _SOURCE,
        "applies_to": _TAPS,
    },
    "massive_activation_places": {
        "tensor": _MASSIVE,
        "average": "none; per layer that has any: how many of all sequences lie at which position of their "
        "document and channel, the "
        "most frequent 8 of each",
        "source": _SOURCE,
        "applies_to": _TAPS,
    },
    "largest_activation_by_layer": {
        "tensor": "element of each layer's output [T, D] with the largest |h|",
        "average": "none; the largest of all sequences with its value, position, channel and ratio to its "
        "sequence's median |h|",
        "source": _SOURCE,
        "applies_to": _TAPS,
    },
    "largest_activation_ratio": {
        "tensor": "max |h| / median |h| of each layer's output [T, D]",
        "average": "mean over sequences, largest over layers",
        "source": _SOURCE,
        "applies_to": _TAPS,
    },
}


def read(reading: LayerReading) -> Rows:
    """The largest element [B], the number of massive ones [B], and these by position [B, T] and channel [B, D]."""
    h, tokens = reading.statistics.layer_output, reading.tokens
    if h is None:
        return {}
    wide = h.astype(jnp.promote_types(h.dtype, jnp.float32))
    size = jnp.abs(wide)
    middle = median(size, (1, 2))
    largest = size.max(2)  # by token first: positions may be split over devices
    token = largest.argmax(1)
    at_token = jnp.take_along_axis(wide, token[:, None, None], 1)[:, 0]
    channel = jnp.abs(at_token).argmax(1)
    place = jnp.broadcast_to(tokens.place, largest.shape)
    massive = (size > MAGNITUDE) & (size >= RATIO * middle[:, None, None])
    return {
        "value": jnp.take_along_axis(at_token, channel[:, None], 1)[:, 0],
        "position": jnp.take_along_axis(place, token[:, None], 1)[:, 0],
        "channel": channel,
        "median": middle,
        "count": massive.sum((1, 2)),
        "total_at_position": tokens.by_place(massive.sum(2)),
        "total_at_channel": massive.sum(1),
    }


def _places(counts: Float[np.ndarray, " places"]) -> dict[str, int]:
    order = np.argsort(-counts, kind="stable")[:8]
    return {str(place): int(counts[place]) for place in order if counts[place]}


def finish(rows: dict[str, np.ndarray], config: ModelConfig | None) -> dict[str, Value | Estimate]:
    """Counts per sequence first, then the mean over sequences."""
    del config
    counts, tiny = rows["count"], np.finfo(np.float32).tiny
    ratios = np.abs(rows["value"]) / np.maximum(rows["median"], tiny)
    largest = []
    for layer, sequence in enumerate(np.abs(rows["value"]).argmax(0)):
        place = {name: int(rows[name][sequence, layer]) for name in ("position", "channel")}
        value, ratio = float(rows["value"][sequence, layer]), float(ratios[sequence, layer])
        largest.append({"layer": layer, "value": value, **place, "ratio_to_median": ratio})
    places = [
        {
            "layer": int(layer),
            "positions": _places(rows["total_at_position"][:, layer].sum(0)),
            "channels": _places(rows["total_at_channel"][:, layer].sum(0)),
        }
        for layer in np.flatnonzero(counts.any(0))
    ]
    return {
        "massive_activations": per_sequence(counts, bootstrap.largest),
        "massive_activations_by_layer": counts.mean(0).tolist(),
        "massive_activation_places": places,
        "largest_activation_by_layer": largest,
        "largest_activation_ratio": per_sequence(ratios, bootstrap.largest),
    }


MASSIVE = Evaluator(layer=read, finish=finish, definitions=DEFINITIONS)
