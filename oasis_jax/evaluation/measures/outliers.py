"""Outliers of the activations: infinity norm and kurtosis at every tap (Bondarenko et al., arXiv 2306.12929, section
3).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation import bootstrap
from oasis_jax.evaluation.bootstrap import Estimate, per_sequence
from oasis_jax.evaluation.evaluator import Evaluator, Reading, Rows, Value

_SOURCE = "Bondarenko et al., arXiv 2306.12929"
_TAPS = (
    "all taps: norm outputs, attention outputs after the output projection, MLP outputs, layer outputs, "
    "final norm output"
)
_NORM = "max |x| of each sequence, mean over sequences, largest over the tensors named"
_KURTOSIS = "kurtosis (not excess, ddof 1) of each sequence flattened to [T*D], mean over sequences"
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
_TOKEN_KURTOSIS = "kurtosis (not excess, ddof 1) of each token's D channels, mean over tokens and sequences"
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


def _kurtosis(x: Float[Array, "*rows K"]) -> Float[Array, "*rows"]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.square(wide - wide.mean(-1, keepdims=True))
    variance = squares.sum(-1) / (x.shape[-1] - 1)
    return jnp.square(squares).mean(-1) / (variance**2 + 1e-6)


def kurtosis(x: Float[Array, "B T D"]) -> Float[Array, " B"]:
    """mean((x - mean)^4) / (std^4 + 1e-6) of each sequence flattened to [T*D]; std with ddof=1, not excess."""
    return _kurtosis(x.reshape(x.shape[0], -1))


def token_kurtosis(x: Float[Array, "B T D"]) -> Float[Array, " B"]:
    """The same of each token's channels, mean over the tokens of each sequence."""
    return _kurtosis(x).mean(-1)


def read(reading: Reading) -> Rows | None:
    """ "<measure>/<kind of tap>" -> [B, number of taps of that kind]."""
    rows = {}
    for kind, taps in reading.statistics.taps.items():
        rows[f"inf_norm/{kind}"] = jnp.stack([inf_norm(x) for x in taps], -1)
        rows[f"kurtosis/{kind}"] = jnp.stack([kurtosis(x) for x in taps], -1)
    return rows or None


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


def read_tokens(reading: Reading) -> Rows | None:
    """Kind of tap -> per-token kurtosis [B, number of taps of that kind]."""
    return {
        kind: jnp.stack([token_kurtosis(x) for x in taps], -1) for kind, taps in reading.statistics.taps.items()
    } or None


def finish_tokens(rows: dict[str, np.ndarray], config: ModelConfig | None) -> dict[str, Value | Estimate]:
    """As `finish`."""
    del config
    every = np.concatenate(list(rows.values()), -1)
    return {
        "avg_token_kurtosis": per_sequence(every, bootstrap.mean),
        "max_token_kurtosis": per_sequence(every, bootstrap.largest),
        "token_kurtosis_by_tap": _by_tap(rows),
    }


OUTLIERS = Evaluator(read, finish, DEFINITIONS)
TOKEN_KURTOSIS = Evaluator(read_tokens, finish_tokens, TOKEN_DEFINITIONS)
