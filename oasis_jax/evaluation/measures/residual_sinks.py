"""Residual sinks: channels of the stream that are large for every token, and how the norms answer (Unified
View, arXiv 2601.22966).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation import bootstrap
from oasis_jax.evaluation.bootstrap import Estimate, per_sequence
from oasis_jax.evaluation.evaluator import Evaluator, FinalReading, LayerReading, Rows, Value

_H = "each layer's output h [T, D]"
_D = "the sink channel d, that with the largest mean |h_j| over all sequences"
_SOURCE = "Unified View, arXiv 2601.22966"
_TAPS = "models that give their layers' outputs"


def _of(tensor: str, average: str, applies_to: str = _TAPS) -> dict[str, str]:
    return {"tensor": tensor, "average": average, "source": _SOURCE, "applies_to": applies_to}


DEFINITIONS = {
    "residual_sink_ratio": _of(
        f"{_H}: mean |h_j| of each channel j",
        "mean over tokens and sequences, largest over median channel, largest over layers",
    ),
    "residual_sink_ratio_by_layer": _of(
        f"{_H}: mean |h_j| of each channel j",
        "mean over tokens and sequences, largest over median channel; one value a layer",
    ),
    "residual_sink_channel_by_layer": _of(f"{_H}: {_D}", "none; one channel a layer"),
    "residual_sink_share_by_layer": _of(
        f"{_H}: tokens whose largest |h_j| lies at {_D}", "share of all tokens; one value a layer"
    ),
    "residual_sink_share": _of(
        f"{_H}: tokens whose largest |h_j| lies at {_D}", "share of all tokens, largest over layers"
    ),
    "residual_sink_norm_share": _of(
        f"{_H}: r = |h_d| / ||h|| at {_D}", "mean over tokens and sequences, largest over layers"
    ),
    "residual_sink_norm_share_by_layer": _of(
        f"{_H}: r = |h_d| / ||h|| at {_D}", "mean over tokens and sequences; one value a layer"
    ),
    "norm_gain_at_sink": _of(
        "gain of the norm that reads each layer's output, |gain_d| / median |gain_j| at the layer's sink channel",
        "none; one value a layer",
        "models of this library whose norm has a gain",
    ),
}


def read(reading: LayerReading) -> Rows:
    """Per channel, means over tokens [B, D]."""
    h = reading.statistics.layer_output
    if h is None:
        return {}
    size = jnp.abs(h.astype(jnp.promote_types(h.dtype, jnp.float32)))
    inverse = 1 / jnp.maximum(jnp.sqrt(jnp.square(size).sum(-1)), jnp.finfo(jnp.float32).tiny)
    at = size.argmax(-1)[..., None] == jnp.arange(h.shape[-1])
    return {
        "size": size.mean(1),
        "norm_share": (size * inverse[..., None]).mean(1),
        "argmax": at.mean(1),
    }


def read_gains(reading: FinalReading) -> Rows:
    """The gains of the norms that read the layers' outputs [B, L, D], the same for all sequences."""
    if reading.gains is None:
        return {}
    return {"gain": jnp.broadcast_to(reading.gains, (len(reading.tokens.batch["inputs"]), *reading.gains.shape))}


def finish(rows: dict[str, np.ndarray], config: ModelConfig | None) -> dict[str, Value | Estimate]:
    """The sink channel is found over all sequences and then kept; only the ratio of largest to median finds
    its own in every draw.
    """
    del config
    sizes = rows["size"]
    channels = sizes.mean(0).argmax(-1)  # [L]

    def at_sink(values: Float[np.ndarray, "S L D"]) -> Float[np.ndarray, "S L"]:
        return np.take_along_axis(values, channels[None, :, None], 2)[..., 0]

    def ratios(means: Float[np.ndarray, "*draws K"]) -> Float[np.ndarray, "*draws"]:
        by_layer = means.reshape(*means.shape[:-1], *sizes.shape[1:])
        return (by_layer.max(-1) / np.median(by_layer, -1)).max(-1)

    mean = sizes.mean(0)
    found = {
        "residual_sink_ratio": per_sequence(sizes, ratios),
        "residual_sink_ratio_by_layer": (mean.max(-1) / np.median(mean, -1)).tolist(),
        "residual_sink_channel_by_layer": channels.tolist(),
        "residual_sink_share": per_sequence(at_sink(rows["argmax"]), bootstrap.largest),
        "residual_sink_share_by_layer": at_sink(rows["argmax"]).mean(0).tolist(),
        "residual_sink_norm_share": per_sequence(at_sink(rows["norm_share"]), bootstrap.largest),
        "residual_sink_norm_share_by_layer": at_sink(rows["norm_share"]).mean(0).tolist(),
    }
    if "gain" in rows:
        gain = np.abs(rows["gain"][0])
        found["norm_gain_at_sink"] = (gain[np.arange(len(gain)), channels] / np.median(gain, -1)).tolist()
    return found


RESIDUAL_SINKS = Evaluator(layer=read, final=read_gains, finish=finish, definitions=DEFINITIONS)
