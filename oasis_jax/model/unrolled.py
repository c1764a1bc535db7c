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
from oasis_jax.model.layout import is_stacked, part, router_part
from oasis_jax.model.numerics import FLOAT
from oasis_jax.model.remat import rematerialized
from oasis_jax.model.router import route
from oasis_jax.model.statistics import AttentionStatistics, RouterStatistics
from oasis_jax.model.wiring import KINDS, Step, schedule


class LayerStatistics(NamedTuple):
    """What one layer tells about itself; all but the attention's are [B, T, D].

    layer_output is the stream that the next layer, or the final norm, reads; where queries, keys and values read
    streams of their own, that of the queries, and attention_norm likewise.
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
    on_layer: Callable[[int | None, LayerStatistics], Any] = _whole,
    on_router: Callable[[str, RouterStatistics], Any] = _whole,
    loop: bool = False,
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
      loop: layers between which no router lies may run as a loop, which compiles one of them for all; on_layer then
        returns arrays, and its index is None.
    """
    if loop and _loops(params, config, context):
        return _run_alike(params, config, embedding, context, on_layer)
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
        if step.routers:
            sources, evidence = [*sources[: step.slot], source], [*evidence[: step.slot], source_psi]
            read = []
            for index, name in enumerate(step.routers, step.first_router):
                own, scoped = router_part(params, index), context.within(f"{name}.router")
                mixture, statistics = route(own, config, sources, evidence, scoped)
                routers[name] = on_router(name, statistics)
                read.append(mixture)
            stream = read[0] if len(read) == 1 else tuple(read)
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


def _loops(params: Mapping[str, Any], config: ModelConfig, context: Context) -> bool:
    alike = config.num_layers > config.period and not schedule(config).routers
    return alike and is_stacked(params) and context.cache is None and context.numerics.loops


def _run_alike(params, config: ModelConfig, stream: Stream, context: Context, on_layer: Callable) -> Unrolled:
    """The layers of a model without routers as a loop over groups of `config.period` layers.

    One by one, an evaluation of 30 layers takes 19 s of a CPU core to trace and compile, as a loop 5 s
    (benchmarks/evaluation_compile.py, 2026-11-27).
    """
    period, count = config.period, config.num_layers // config.period
    scopes = [[f"layer{i}" for i in range(place, config.num_layers, period)] for place in range(period)]
    arrays = [context.numerics.layer_arrays(names) for names in scopes]
    groups = jax.tree.map(lambda x: x.reshape(count, period, *x.shape[1:]), dict(params["layers"]))

    def group(stream, of_group):
        layers, known = of_group
        found, seen = [], []
        for place in range(period):
            layer, own = config.layer(place), context.replace(numerics=context.numerics.in_layer(known[place]))
            made = []
            for kind in KINDS:
                scoped = own.within(kind)
                sublayer = SUBLAYERS[kind](jax.tree.map(lambda x, i=place: x[i], layers), layer, stream, scoped)
                tap = partial(scoped.numerics.tap, "residual_sum")
                stream, _ = new_source(config, stream, sublayer.output, None, None, tap)
                made.append(sublayer)
            found.append(on_layer(None, _layer_statistics(*made, stream)))
            seen.append(own.numerics.seen)
        return stream, (found, seen)

    stream, (found, seen) = jax.lax.scan(group, stream, (groups, arrays))
    for names, of_place in zip(scopes, seen):
        context.numerics.keep(names, of_place)
    layers = [jax.tree.map(lambda x, i=i: x[i // period], found[i % period]) for i in range(config.num_layers)]
    return Unrolled(stream, layers, {})


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
    stream = stream[0] if isinstance(stream, tuple) else stream
    return LayerStatistics(attention.statistics, attention.normed, attention.output, mlp.normed, mlp.output, stream)
