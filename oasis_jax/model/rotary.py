"""Rotary positions (Su et al., arXiv 2104.09864) and how their frequencies are changed for longer texts.

Channel i of the first half of the turning channels turns with channel i of the second. A new kind of scaling is one
function and one line in `SCALINGS`.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oasis_jax.config import AttentionConfig, RopeScaling

Frequencies = Float[Array, " F"]


def _linear(frequency: Frequencies, scaling: RopeScaling, theta: float, longest: Array) -> Frequencies:
    """Position interpolation (Chen et al., arXiv 2306.15595)."""
    del theta, longest
    return frequency / scaling.factor


def _llama3(frequency: Frequencies, scaling: RopeScaling, theta: float, longest: Array) -> Frequencies:
    """Llama 3.1: slow channels are divided, fast ones stay, and what lies between is mixed by the turns they make."""
    del theta, longest
    turns = scaling.original_length * frequency / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    stays = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - stays) * frequency / scaling.factor + stays * frequency


def _yarn(frequency: Frequencies, scaling: RopeScaling, theta: float, longest: Array) -> Frequencies:
    """YaRN (Peng et al., arXiv 2309.00071): the same by a ramp over the channels."""
    del longest
    size = 2 * frequency.shape[0]

    def channel(turns: float) -> float:
        return size * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = jnp.clip((jnp.arange(size // 2) - low) / max(high - low, 1e-3), 0.0, 1.0).astype(frequency.dtype)
    return ramp * frequency / scaling.factor + (1 - ramp) * frequency


def _longrope(frequency: Frequencies, scaling: RopeScaling, theta: float, longest: Array) -> Frequencies:
    """LongRoPE (Ding et al., arXiv 2402.13753): a factor a channel, another list as soon as one position is
    beyond the original.
    """
    del theta
    short, long = (jnp.asarray(x, frequency.dtype) for x in (scaling.short_factors, scaling.long_factors))
    return frequency / jnp.where(longest + 1 > scaling.original_length, long, short)


SCALINGS: dict[str, Callable[[Frequencies, RopeScaling, float, Array], Frequencies]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def attention_factor(scaling: RopeScaling) -> float:
    """What cosine and sine are multiplied by: given, or as YaRN and LongRoPE derive it from factor and
    original length.
    """
    if scaling.attention_factor:
        return scaling.attention_factor
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1.0
    if scaling.kind == "longrope":
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_length))
    return 1.0


def rotary_angles(
    config: AttentionConfig, positions: Int[Array, "#B T"], dtype
) -> tuple[Float[Array, "#B T 1 F"], Float[Array, "#B T 1 F"]]:
    """Cosine and sine of each position and frequency, in float32 or better whatever the model's dtype."""
    half, scaling = config.rotary_size // 2, config.rope_scaling
    wide = jnp.promote_types(dtype, jnp.float32)
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=wide) / half)
    factor = 1.0
    if scaling is not None:
        frequency = SCALINGS[scaling.kind](frequency, scaling, config.rope_theta, positions.max())
        factor = attention_factor(scaling)
    angle = positions[..., None, None].astype(wide) * frequency
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """x with its first 2 F channels turned, the rest as it is."""
    half = cos.shape[-1]
    wide = x.astype(cos.dtype)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
