"""The executor that runs a schedule step by step: for statistics, measures, quantization, interventions, and
training on CPUs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from oasis_jax.config import ModelConfig
from oasis_jax.model.context import Context
from oasis_jax.model.layer import SUBLAYERS, Stream, Sublayer, new_source, null_evidence
from oasis_jax.model.layout import part
from oasis_jax.model.numerics import FLOAT
from oasis_jax.model.remat import rematerialized
from oasis_jax.model.router import route
from oasis_jax.model.statistics import AttentionStatistics, RouterStatistics
from oasis_jax.model.wiring import Step, schedule


class LayerStatistics(NamedTuple):
    """What one layer tells about itself; all but the attention's are [B, T, D].

    layer_output is the stream that the next layer, or the final norm, reads.
    """

    attention: AttentionStatistics
    attention_norm: Stream
    attention_output: Stream
    mlp_norm: Stream
    mlp_output: Stream
    layer_output: Stream


class Unrolled(NamedTuple):
    """The stream that the final norm reads, and what on_layer and on_router made of layers and, by name, routers."""

    stream: Stream
    layers: list[Any]
    routers: dict[str, Any]


def _whole(_, statistics):
    return statistics


def run_unrolled(
    params: Mapping[str, Any],
    config: ModelConfig,
    embedding: Stream,
    context: Context,
    *,
    on_layer: Callable[[int, LayerStatistics], Any] = _whole,
    on_router: Callable[[str, RouterStatistics], Any] = _whole,
) -> Unrolled:
    """Runs all layers.

    Args:
      params: with "layers" and "routers", stacked or layer by layer.
      config: any wiring and router.
      embedding: what the first layer reads.
      context: see Context.
      on_layer: (index, statistics) -> what is wanted of them. It is called as soon as a layer is done, and what it does
        not return is not held any longer.
      on_router: (name, statistics) -> likewise.
    """
    sources, evidence = [embedding], [jnp.zeros(embedding.shape[:2], jnp.float32)]
    stream, psi, made = embedding, evidence[0], []
    layers, routers = [], {}
    for step in schedule(config).steps:
        sublayer = _sublayer(params, config, step, stream, context)
        if sublayer.statistics is not None:
            psi, made = null_evidence(sublayer.statistics, context), []
        made.append(sublayer)
        block = (sources[step.slot], evidence[step.slot], step.members) if step.members else None
        tap = partial(context.within(step.name).numerics.tap, "residual_sum")
        source, source_psi = new_source(config, stream, sublayer.output, psi, block, tap)
        if step.router:
            sources, evidence = [*sources[: step.slot], source], [*evidence[: step.slot], source_psi]
            own, scoped = part(params["routers"], step.index), context.within(f"{step.router}.router")
            stream, statistics = route(own, config, sources, evidence, scoped)
            routers[step.router] = on_router(step.router, statistics)
        else:
            stream = source
        if step.kind == "mlp":
            seen = on_layer(step.layer, _layer_statistics(*made, stream))
            if (
                on_layer is not _whole
            ):  # reduced before the next layer begins: a compiler may put it off and hold all layers
                stream, seen = jax.lax.optimization_barrier((stream, seen))
            layers.append(seen)
        if step.stream_slot is not None:
            sources, evidence = [*sources[: step.stream_slot], stream], [*evidence[: step.stream_slot], psi]
    return Unrolled(stream, layers, routers)


def _sublayer(params, config: ModelConfig, step: Step, stream: Stream, context: Context) -> Sublayer:
    """One sublayer, rematerialized where the config asks for it."""
    run = partial(_call, SUBLAYERS[step.kind], config.layer(step.layer))
    if (
        context.numerics is FLOAT
    ):  # a numerics that records could not carry what it saw out of a rematerialized function
        run = rematerialized(run, config.remat)
    return run(part(params["layers"], step.layer), stream, context.of_layer(step.layer).within(step.name))


def _call(sublayer: Callable, config: ModelConfig, layer, stream: Stream, context: Context) -> Sublayer:
    return sublayer(layer, config, stream, context)


def _layer_statistics(attention: Sublayer, mlp: Sublayer, stream: Stream) -> LayerStatistics:
    return LayerStatistics(attention.statistics, attention.normed, attention.output, mlp.normed, mlp.output, stream)
