"""What a sink does to values and stream: value drain, residual peak, head outputs (Guo et al., arXiv 2410.13835)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation.bootstrap import Estimate, per_sequence
from oasis_jax.evaluation.evaluator import Evaluator, LayerReading, Rows, Tokens, Value

_FIRST = "the mean over a sequence's documents' first tokens over that of the other tokens"
_VALUE = f"norm ||v|| of the values: {_FIRST}, every layer and key head"
_PEAK = f"norm ||h||: {_FIRST}, every layer's output"
_HEAD = "norm of each head's output, before the gate and the output projection"
_GUO = "Guo et al., arXiv 2410.13835"
_ATTENTION, _TAPS = "models that give the statistics of their attention", "models that give their layers' outputs"


def _of(tensor: str, average: str, applies_to: str) -> dict[str, str]:
    return {"tensor": tensor, "average": average, "source": _GUO, "applies_to": applies_to}


DEFINITIONS = {
    "value_drain": _of(_VALUE, "mean over sequences, layers and key heads", _ATTENTION),
    "value_drain_by_head": _of(_VALUE, "mean over sequences; layer x key head", _ATTENTION),
    "residual_peak": _of(_PEAK, "mean over sequences and layers", _TAPS),
    "residual_peak_by_layer": _of(_PEAK, "mean over sequences; one value a layer", _TAPS),
    "head_output_norm": _of(_HEAD, "mean over tokens, sequences, layers and heads", _ATTENTION),
    "head_output_norm_by_head": _of(_HEAD, "mean over tokens and sequences; layer x head", _ATTENTION),
}


def norm(x: Float[Array, "*rows D"]) -> Float[Array, "*rows"]:
    """Over the last axis, in float32 or better."""
    return jnp.sqrt(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))).sum(-1))


def _first_over_others(norms: Float[Array, "B T ..."], tokens: Tokens) -> Float[Array, "B ..."]:
    first = (tokens.place == 0).reshape(-1, tokens.length, *(1,) * (norms.ndim - 2))
    others = norms.mean(1, where=~first)
    return norms.mean(1, where=first) / jnp.maximum(others, jnp.finfo(others.dtype).tiny)


def read(reading: LayerReading) -> Rows:
    """value_drain [B, K], residual_peak [B], head_output_norm [B, N]."""
    rows, attention, stream = {}, reading.attention, reading.statistics.layer_output
    if reading.tokens.length < 2:
        return {}
    if attention is not None:
        rows["value_drain"] = _first_over_others(norm(attention.value), reading.tokens)
        rows["head_output_norm"] = norm(attention.head_output).mean(1)
    if stream is not None:
        rows["residual_peak"] = _first_over_others(norm(stream), reading.tokens)
    return rows


def finish(rows: dict[str, np.ndarray], config: ModelConfig | None) -> dict[str, Value | Estimate]:
    """Means over sequences."""
    del config
    found = {}
    for name, values in rows.items():
        by = "by_layer" if values.ndim == 2 else "by_head"
        found |= {name: per_sequence(values.reshape(len(values), -1).mean(-1)), f"{name}_{by}": values.mean(0).tolist()}
    return found


VALUES = Evaluator(layer=read, finish=finish, definitions=DEFINITIONS)
