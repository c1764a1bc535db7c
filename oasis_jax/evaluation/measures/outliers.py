"""Outliers of the activations: infinity norm and kurtosis at every tap (Bondarenko et al., arXiv 2306.12929, section
3).
"""

import math
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation import bootstrap
from oasis_jax.evaluation.bootstrap import Estimate, per_sequence
from oasis_jax.evaluation.evaluator import Evaluator, FinalReading, LayerReading, Rows, Value

TAPS = ("attention_norm", "attention_output", "mlp_norm", "mlp_output", "layer_output")  # of a layer

_SOURCE = "Bondarenko et al., arXiv 2306.12929"
_TAPS = (
    "all taps: norm outputs, attention outputs after the output projection, MLP outputs, layer outputs, "
    "final norm output"
)
_NORM = "max |x| of each sequence, mean over sequences, largest over the tensors named"
_FORM = "mean((x - mean)^4) / (std^4 + 1e-6) (not excess, std with ddof 1)"
_KURTOSIS = f"kurtosis {_FORM} of each sequence flattened to [T*D], mean over sequences"
DEFINITIONS = {
    "max_inf_norm": {"tensor": _TAPS, "average": _NORM, "source": _SOURCE},
    "max_ffn_inf_norm": {"tensor": "MLP outputs of all layers", "average": _NORM, "source": _SOURCE},
    "max_layer_inf_norm": {"tensor": "outputs of all layers", "average": _NORM, "source": _SOURCE},
    "avg_kurtosis": {"tensor": _TAPS, "average": f"{_KURTOSIS}, mean over taps", "source": _SOURCE},
    "max_kurtosis": {"tensor": _TAPS, "average": f"{_KURTOSIS}, largest over taps", "source": _SOURCE},
    "inf_norm_by_tap": {
        "tensor": _TAPS,
        "average": "max |x| of each sequence, mean over sequences; kind of tap -> layers",
        "source": _SOURCE,
    },
    "kurtosis_by_tap": {"tensor": _TAPS, "average": f"{_KURTOSIS}; kind of tap -> layers", "source": _SOURCE},
}
_TOKEN_KURTOSIS = f"kurtosis {_FORM} of each token's D channels, mean over tokens and sequences"
TOKEN_DEFINITIONS = {
    "avg_token_kurtosis": {"tensor": _TAPS, "average": f"{_TOKEN_KURTOSIS}, mean over taps", "source": _SOURCE},
    "max_token_kurtosis": {"tensor": _TAPS, "average": f"{_TOKEN_KURTOSIS}, largest over taps", "source": _SOURCE},
    "token_kurtosis_by_tap": {
        "tensor": _TAPS,
        "average": f"{_TOKEN_KURTOSIS}; kind of tap -> layers",
        "source": _SOURCE,
    },
}


def inf_norm(x: Float[Array, "B T D"]) -> Float[Array, " B"]:
    """max |x| of each sequence."""
    return jnp.abs(x).max(axis=(1, 2))


def _kurtosis(x: Float[Array, "B T D"], axes: tuple[int, ...]) -> Float[Array, "B ..."]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.square(wide - wide.mean(axes, keepdims=True))
    count = math.prod(x.shape[axis] for axis in axes)
    variance = squares.sum(axes, keepdims=True) / (count - 1)
    # In units of std^2: the fourth power of 1e10 is beyond float32.
    units = squares / jnp.where(variance == 0, 1.0, variance)
    return (jnp.square(units) / (1 + 1e-6 / jnp.square(variance))).mean(axes)


def kurtosis(x: Float[Array, "B T D"]) -> Float[Array, " B"]:
    """mean((x - mean)^4) / (std^4 + 1e-6) of each sequence's T*D values; std with ddof=1, not excess."""
    return _kurtosis(x, (1, 2))


def token_kurtosis(x: Float[Array, "B T D"]) -> Float[Array, " B"]:
    """The same of each token's channels, mean over the tokens of each sequence."""
    return _kurtosis(x, (2,)).mean(-1)


def _of_taps(reading: LayerReading, measure: Callable[[Array], Array]) -> Rows:
    taps = {kind: getattr(reading.statistics, kind) for kind in TAPS}
    return {kind: measure(x) for kind, x in taps.items() if x is not None}


def _of_final(reading: FinalReading, measure: Callable[[Array], Array]) -> Rows:
    return {} if reading.final is None else {"final_norm": measure(reading.final)[:, None]}


def _both(of: Callable, reading: LayerReading | FinalReading) -> Rows:
    """ "<measure>/<kind of tap>" -> [B], of the final norm [B, 1]."""
    measures = {"inf_norm": inf_norm, "kurtosis": kurtosis}
    return {f"{name}/{kind}": x for name, measure in measures.items() for kind, x in of(reading, measure).items()}


def finish(rows: dict[str, np.ndarray], config: ModelConfig | None) -> dict[str, Value | Estimate]:
    """Mean over sequences first, then over taps."""
    del config
    by_tap = {"inf_norm": {}, "kurtosis": {}}
    for name, values in rows.items():
        measure, kind = name.split("/")
        by_tap[measure][kind] = values
    norms, kurtoses = by_tap["inf_norm"], by_tap["kurtosis"]
    every_norm, every_kurtosis = (np.concatenate(list(kinds.values()), -1) for kinds in (norms, kurtoses))
    found = {
        "max_inf_norm": per_sequence(every_norm, bootstrap.largest),
        "avg_kurtosis": per_sequence(every_kurtosis, bootstrap.mean),
        "max_kurtosis": per_sequence(every_kurtosis, bootstrap.largest),
        "inf_norm_by_tap": _by_tap(norms),
        "kurtosis_by_tap": _by_tap(kurtoses),
    }
    for name, kind in (("max_ffn_inf_norm", "mlp_output"), ("max_layer_inf_norm", "layer_output")):
        found |= {name: per_sequence(norms[kind], bootstrap.largest)} if kind in norms else {}
    return found


def _by_tap(kinds: dict[str, np.ndarray]) -> dict[str, list[float]]:
    return {kind: values.mean(0).tolist() for kind, values in kinds.items()}


def finish_tokens(rows: dict[str, np.ndarray], config: ModelConfig | None) -> dict[str, Value | Estimate]:
    """As `finish`."""
    del config
    every = np.concatenate(list(rows.values()), -1)
    return {
        "avg_token_kurtosis": per_sequence(every, bootstrap.mean),
        "max_token_kurtosis": per_sequence(every, bootstrap.largest),
        "token_kurtosis_by_tap": _by_tap(rows),
    }


OUTLIERS = Evaluator(
    layer=partial(_both, _of_taps), final=partial(_both, _of_final), finish=finish, definitions=DEFINITIONS
)
TOKEN_KURTOSIS = Evaluator(
    layer=partial(_of_taps, measure=token_kurtosis),
    final=partial(_of_final, measure=token_kurtosis),
    finish=finish_tokens,
    definitions=TOKEN_DEFINITIONS,
)
