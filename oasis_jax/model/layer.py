"""The two sublayers of a layer, written once for every executor: attention and MLP, each behind its norm."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from oasis_jax.config import ModelConfig
from oasis_jax.model.attention import Attention, attention
from oasis_jax.model.context import Context
from oasis_jax.model.mlp import MLP, mlp
from oasis_jax.model.norms import Norm, norm, rms_norm
from oasis_jax.model.parameters import Parameters
from oasis_jax.model.statistics import AttentionStatistics

Stream = Float[Array, "B T D"]
LayerParameters = Mapping[
    str, Parameters
]  # attention_norm, attention, mlp_norm, mlp; a norm without parameters is absent


class Sublayer(NamedTuple):
    """What a sublayer made: its output, the output of its norm, and the statistics of its attention (None: an MLP)."""

    output: Stream
    normed: Stream
    statistics: AttentionStatistics | None


def attend(
    layer: LayerParameters, config: ModelConfig, x: Stream | tuple[Stream, Stream, Stream], context: Context
) -> Sublayer:
    """The attention sublayer of the stream x, or of the streams that queries, keys and values are made of."""
    run = partial(norm, layer.get("attention_norm", {}), config)
    normed, *apart = (context.numerics.norm(run, stream) for stream in (x if isinstance(x, tuple) else (x,)))
    output, statistics = attention(layer["attention"], config, normed, context, own_kv=tuple(apart) or None)
    return Sublayer(_as_source(config, output, context), normed, statistics)


def feed(layer: LayerParameters, config: ModelConfig, x: Stream, context: Context) -> Sublayer:
    """The MLP sublayer of the stream x."""
    normed = context.numerics.norm(partial(norm, layer.get("mlp_norm", {}), config), x)
    output = mlp(layer["mlp"], config, normed, context)
    return Sublayer(_as_source(config, output, context), normed, None)


SUBLAYERS = {"attention": attend, "mlp": feed}
PARTS = {"attention": ("attention_norm", "attention"), "mlp": ("mlp_norm", "mlp")}  # of a layer's parameters


def _as_source(config: ModelConfig, output: Stream, context: Context) -> Stream:
    if config.residual_multiplier != 1.0:
        output = output * config.residual_multiplier
    return context.constrain(output, "batch", "stream", None)


def null_evidence(statistics: AttentionStatistics, context: Context) -> Float[Array, "B T"]:
    """psi, the null evidence of a layer's sources: the mean over heads of its attention's null mass."""
    return context.constrain(statistics.null_mass.mean(axis=1), "batch", "stream")


def new_source(
    config: ModelConfig,
    stream: Stream,
    output: Stream,
    psi: Float[Array, "B T"],
    block: tuple[Stream, Float[Array, "B T"], int | Int[Array, ""]] | None,
    tap: Callable[[Stream], Stream] = lambda x: x,
) -> tuple[Stream, Float[Array, "B T"]]:
    """The source that a sublayer makes, and its null evidence.

    Args:
      stream, output: what the sublayer read and made.
      psi: the null evidence of its layer.
      block: of a block that it is added to, the sum so far, its mean evidence and the number of its members.
      tap: sees every sum.
    """
    if config.wiring != "delta":
        return tap(_clip(config, stream + output)), psi
    if config.output_norm:
        output = rms_norm(output, jnp.ones(output.shape[-1:], jnp.float32), config.norm_epsilon)
    output = _clip(config, output)
    if block is None:
        return output, psi
    running, mean, members = block
    return tap(running + output), (mean * members + psi) / (members + 1)


def _clip(config: ModelConfig, source: Stream) -> Stream:
    """Bounds a new source to +-tau where the config asks for it."""
    tau = config.residual_clip
    return jnp.clip(source, -tau, tau) if tau else source


class Layer(nnx.Module):
    """One attention and one MLP, each with its norm, as an NNX module that holds their parameters."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = Norm(config, config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = Norm(config, config.width, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)
