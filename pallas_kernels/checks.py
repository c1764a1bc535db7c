"""Checks of arguments that both operators share."""

import numbers

import jax
import numpy as np


def known_number(name: str, x) -> float:
    """A finite number that is known when the call is traced, Python's, numpy's or an array of one, as a Python float.

    Raises:
      ValueError: it is something else.
    """
    if isinstance(x, jax.core.Tracer):
        raise ValueError(f"{name}: must be known when the call is traced, got a traced {x.dtype} of shape {x.shape}")
    known = isinstance(x, numbers.Real) or (isinstance(x, np.ndarray | jax.Array) and x.shape == ())
    if isinstance(x, bool | np.bool_) or not known or not np.isrealobj(x) or not np.isfinite(float(x)):
        raise ValueError(f"{name}: must be a finite number, got {x!r}")
    return float(x)
