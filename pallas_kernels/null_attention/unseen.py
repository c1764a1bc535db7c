"""Keys that no query sees, for kernels: a tile that holds some multiplies them with a probability of zero, and 0 * NaN
is NaN.

With as many queries as keys and one document, or one array of segment ids, every key is seen by the query at its place,
and nothing is done. A window against more keys leaves the first ones out: they are cut off. A pair of segment ids may
hide any key: those are set to zero, which reads and writes keys and values once.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from pallas_kernels.null_attention.base import AttentionInputs, allowed_keys
from pallas_kernels.sharding import zigzag


def without_unseen(inputs: AttentionInputs) -> AttentionInputs:
    """The same call, by segments and window only, with no key or value in it that no query may see."""
    inputs = _cut(inputs)
    segments = inputs.masks.segments
    if segments is None or segments[0] is segments[1]:
        return inputs
    seen = _seen(inputs)[:, :, None, None]
    key, value = (jnp.where(seen, x, jnp.zeros((), x.dtype)) for x in (inputs.key, inputs.value))
    return inputs._replace(key=key, value=value)


def _cut(inputs: AttentionInputs) -> AttentionInputs:
    """Without the keys before the first query's window; the last query stays on the last key."""
    (length, keys), window = (inputs.query.shape[1], inputs.key.shape[1]), inputs.options.window
    if window is None or keys <= length + window - 1:
        return inputs
    first, segments = keys - length - window + 1, inputs.masks.segments
    if segments is not None:
        segments = segments[0], segments[1][:, first:]
    return inputs._replace(
        key=inputs.key[:, first:], value=inputs.value[:, first:], masks=inputs.masks._replace(segments=segments)
    )


def _seen(inputs: AttentionInputs) -> Bool[Array, "B S"]:
    """Whether some query may see a key."""
    (length, keys), options = (inputs.query.shape[1], inputs.key.shape[1]), inputs.options
    rows, columns = jnp.arange(length) + keys - length, jnp.arange(keys)
    sharding = options.sharding
    if sharding is not None and sharding.sequence and sharding.layout == "zigzag":
        rows, columns = (zigzag(x, sharding.ways("sequence"), axis=0) for x in (rows, columns))
    allowed = allowed_keys(rows, columns, inputs.masks.segments, causal=options.causal, window=options.window)
    return allowed.any(axis=1)
