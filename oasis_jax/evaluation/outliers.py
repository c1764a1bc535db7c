"""Outliers of the activations: infinity norm and kurtosis at every tap (Bondarenko et al., arXiv 2306.12929, section 3)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation.evaluator import Evaluator, Reading, Rows, Value

_SOURCE = "Bondarenko et al., arXiv 2306.12929"
_TAPS = "all taps: norm outputs, attention outputs after the output projection, MLP outputs, layer outputs, final norm output"
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


def inf_norm(x: Float[Array, "B T D"]) -> Float[Array, " B"]:
    """max |x| of each sequence."""
    return jnp.abs(x).max(axis=(1, 2))


def kurtosis(x: Float[Array, "B T D"]) -> Float[Array, " B"]:
    """mean((x - mean)^4) / (std^4 + 1e-6) of each sequence flattened to [T*D]; std with ddof=1, not excess."""
    flat = x.reshape(x.shape[0], -1).astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = flat - flat.mean(-1, keepdims=True)
    variance = (centred**2).sum(-1) / (flat.shape[-1] - 1)
    return (centred**4).mean(-1) / (variance**2 + 1e-6)


def read(reading: Reading) -> Rows:
    """ "<measure>/<kind of tap>" -> [B, number of taps of that kind]."""
    rows = {}
    for kind, taps in reading.statistics.taps.items():
        rows[f"inf_norm/{kind}"] = jnp.stack([inf_norm(x) for x in taps], -1)
        rows[f"kurtosis/{kind}"] = jnp.stack([kurtosis(x) for x in taps], -1)
    return rows


def finish(rows: dict[str, np.ndarray], config: ModelConfig) -> dict[str, Value]:
    """Mean over sequences first, then over taps."""
    del config
    by_tap = {"inf_norm": {}, "kurtosis": {}}
    for name, values in rows.items():
        measure, kind = name.split("/")
        by_tap[measure][kind] = values.mean(0).tolist()
    norms, kurtoses = by_tap["inf_norm"], by_tap["kurtosis"]
    every_norm, every_kurtosis = ([value for taps in kinds.values() for value in taps] for kinds in (norms, kurtoses))
    return {
        "max_inf_norm": max(every_norm),
        "max_ffn_inf_norm": max(norms["mlp_output"]),
        "max_layer_inf_norm": max(norms["layer_output"]),
        "avg_kurtosis": float(np.mean(every_kurtosis)),
        "max_kurtosis": max(every_kurtosis),
        "inf_norm_by_tap": norms,
        "kurtosis_by_tap": kurtoses,
    }


OUTLIERS = Evaluator(read, finish, DEFINITIONS)
