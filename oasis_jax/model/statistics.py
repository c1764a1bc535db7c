"""What a forward pass tells about itself: its second result, never a side effect.

The tuples refer to arrays the forward pass makes anyway or cheaply could; under `jax.jit` whatever the caller
does not use is not computed.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oasis_jax.config import AttentionConfig


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A config among arrays: a pytree node without leaves, so that statistics can leave `jax.jit` with it."""

    config: AttentionConfig


class AttentionStatistics(NamedTuple):
    """One attention layer. N query heads, K key heads, H head size; masses in float32 or better."""

    query: Float[Array, "B T N H"]  # after QK-norm and rotary positions
    key: Float[Array, "B S K H"]  # S = T but for cached keys, which come first, and keys of another sequence
    value: Float[Array, "B S K H"]
    head_output: Float[Array, "B T N H"]  # before the gate and the output projection
    null_mass: Float[Array, "B N T"]
    first_token_mass: Float[Array, "B N T"]  # probability each query gives to the first key of its own document
    lse: Float[Array, "B N T"] | None  # log(exp(b) + sum exp s); None for normalizers without it
    static: Static | None = None  # how the probabilities follow from query and key; None: not known


class RouterStatistics(NamedTuple):
    """One depth router over L sources."""

    weights: Float[Array, "B T L"]
    null_mass: Float[Array, "B T"]
    beta: Float[Array, ""] | None  # strength of the inter-layer null signal; None without coupling


class Statistics(NamedTuple):
    """A whole decoder.

    taps: "attention_norm", "attention_output" (after the output projection), "mlp_norm", "mlp_output" and
      "layer_output" (the stream that the next layer or the final norm reads) hold one [B, T, D] a layer,
      "final_norm" holds one.
    """

    attention: list[AttentionStatistics]
    routers: dict[str, RouterStatistics]
    taps: dict[str, list[Float[Array, "B T D"]]]


def layer_telemetry(attention: AttentionStatistics) -> dict[str, Float[Array, ""]]:
    """The scalars that one attention layer gives to the training log: means over batch, heads and tokens."""
    return {name: getattr(attention, name).mean() for name in ("null_mass", "first_token_mass")}


def telemetry(
    layers: Mapping[str, Float[Array, " L"]], betas: Mapping[str, Float[Array, ""]]
) -> dict[str, Float[Array, ""]]:
    """The scalars of the training log.

    Args:
      layers: `layer_telemetry` of all layers.
      betas: strength of the inter-layer null signal by router; empty without coupling.

    Returns:
      "null_mass", "first_token_mass" and, with coupling, "beta"; each also per layer or router ("null_mass/layer0").
    """
    scalars = {}
    for name, values in layers.items():
        scalars |= {name: values.mean()} | {f"{name}/layer{i}": values[i] for i in range(len(values))}
    if betas:
        scalars["beta"] = jnp.stack(list(betas.values())).mean()
        scalars |= {f"beta/{name}": value for name, value in betas.items()}
    return scalars
