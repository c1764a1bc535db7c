"""Checks of arguments that both operators share."""

import numbers

import jax
import jax.numpy as jnp
import numpy as np


def as_array(name: str, x) -> jax.Array:
    """x as an array of JAX.

    Raises:
      ValueError: it is none.
    """
    try:
        if not isinstance(x, str | bytes):  # which numpy would read as a type
            return jnp.asarray(x)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name}: must be an array, got {described(x)}")


def described(x) -> str:
    """A value in one line of a message."""
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if shape:
        return f"{dtype} of shape {tuple(shape)}"
    return repr(x) if x is None or isinstance(x, str | numbers.Number | np.generic) else type(x).__name__


def known_number(name: str, x) -> float:
    """A finite number that is known when the call is traced, Python's, numpy's or an array of one, as a Python float.

    Raises:
      ValueError: it is something else.
    """
    if isinstance(x, jax.core.Tracer):
        raise ValueError(f"{name}: must be known when the call is traced, got a traced {x.dtype} of shape {x.shape}")
    known = isinstance(x, numbers.Real) or (isinstance(x, np.ndarray | jax.Array) and x.shape == ())
    if isinstance(x, bool | np.bool_) or not known or not np.isrealobj(x) or not np.isfinite(float(x)):
        raise ValueError(f"{name}: must be a finite number, got {described(x)}")
    return float(x)
