"""The executor that runs a schedule as one loop over layers, for training: memory linear in depth, a program of one
size.

The same functions and parameters as `oasis_jax.model.unrolled`, without its Statistics. Without routers it is a scan
over layers. With routers, the sources lie in one append-only array, and one custom derivative spans the whole loop:
differentiated by JAX, a scan that carries the history would store it once a layer. Forward stores the sources and, of
blocks, what each layer adds to; no more. Backward, a layer is recomputed from them, its gradients are added in place to
one more array like the sources, and the gradient of a source is complete when the layer that made it is reached.
Gradients are summed in the dtype of the sources, as by JAX without a loop.

A loop turns once for every group of layers that the config's pattern repeats.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.model.context import Context
from oasis_jax.model.depth_weights import DepthOperator, depth_operator, over_normalized
from oasis_jax.model.layer import PARTS, SUBLAYERS, Stream, new_source, null_evidence
from oasis_jax.model.remat import rematerialized
from oasis_jax.model.router import finish, query_arguments, route_options, router_beta
from oasis_jax.model.statistics import layer_telemetry
from oasis_jax.model.wiring import KINDS, schedule
from pallas_kernels import DepthRoute
from pallas_kernels.fusion import written_once

Psi = Float[Array, "B T"]
Streams = tuple[Stream, ...]  # what a sublayer reads: one, or those of queries, keys and values


class LoopOutput(NamedTuple):
    """The stream that the final norm reads, and the telemetry of each layer [L] where it was asked for."""

    stream: Stream
    layers: dict[str, Float[Array, " L"]]


def uses_loop(config: ModelConfig, platform: str) -> bool:
    """Whether training runs the layers as a loop on a platform ("cpu", "gpu", "tpu")."""
    # Masked reads of a whole buffer cost a CPU more than they save at the depths one trains there.
    return config.stack == "scan" or (config.stack == "auto" and platform != "cpu")


def follows_remat(config: ModelConfig) -> bool:
    """Whether `model.remat` changes what a loop over these layers stores; with routers it recomputes every layer
    anyway.
    """
    return config.wiring == "residual"


def run_loop(
    params: Mapping[str, Any], config: ModelConfig, embedding: Stream, context: Context, *, telemetry: bool = False
) -> LoopOutput:
    """Runs all layers; the stream equals that of `run_unrolled`.

    Args:
      params: stacked, with "layers" and "routers".
      config: any wiring and router.
      embedding: what the first layer reads.
      context: see Context.
      telemetry: also give each layer's `layer_telemetry`; then there is no derivative.
    """
    if context.cache is not None:
        raise UserError("context.cache: layers run as a loop have none; run them one by one")
    parts = tuple({name: params["layers"][name] for name in PARTS[kind] if name in params["layers"]} for kind in KINDS)
    if config.wiring == "residual":
        return _residual(config, parts, embedding, context, telemetry)
    stacked = parts, _by_layer(config, params.get("routers", {}))
    if telemetry:
        run = _run(config, stacked, context, embedding, telemetry=True)
        return LoopOutput(run.stream, run.telemetry)
    return LoopOutput(_routed(config, stacked, context, embedding), {})


def _counts(config: ModelConfig) -> list[int]:
    """How many routers follow an attention, and how many an MLP."""
    return [len(step.routers) for step in schedule(config).steps[:2]]


def _by_layer(config: ModelConfig, routers: Mapping[str, Array]) -> dict[str, Float[Array, "L K ..."]]:
    """Those after a layer's attention, then those after its MLP; the last one is repeated where other layers have
    more.
    """
    total = config.num_layers * sum(_counts(config))

    def split(x):
        missing = total - len(x)
        x = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
        return x.reshape(config.num_layers, -1, *x.shape[1:])

    return jax.tree.map(split, dict(routers))


def _of_kind(config: ModelConfig, kind: int, routers: Mapping[str, Array]) -> list[dict[str, Array]]:
    """Of a layer's routers [K, ...] those after a sublayer of this kind."""
    first, count = sum(_counts(config)[:kind]), _counts(config)[kind]
    return [jax.tree.map(lambda x, i=i: x[i], dict(routers)) for i in range(first, first + count)]


def _scan_layers(body: Callable, config: ModelConfig, carry, xs, *, reverse: bool = False):
    """body(config of the layer, carry, x) -> (carry, y) over all layers, a group of the repeating pattern a turn."""
    period = config.period

    def group(carry, xs):
        found = [None] * period
        for i in reversed(range(period)) if reverse else range(period):
            carry, found[i] = body(config.layer(i), carry, xs[i])
        return carry, found

    # One array for each layer of a group: of a pattern of one layer, all of it as it lies.
    groups = [jax.tree.map(lambda x, i=i: x[i::period], xs) for i in range(period)]
    carry, found = lax.scan(group, carry, groups, reverse=reverse)
    joined = lambda *y: y[0] if period == 1 else jnp.stack(y, axis=1).reshape(-1, *y[0].shape[1:])
    return carry, jax.tree.map(joined, *found)


def _sublayer(config: ModelConfig, kind: int, own, stream: Stream, psi: Psi, context: Context):
    """(output, psi of the layer, telemetry of an attention): an MLP carries its layer's evidence."""
    made = SUBLAYERS[KINDS[kind]](own, config, stream, context)
    if made.statistics is None:
        return made.output, psi, {}
    return made.output, null_evidence(made.statistics, context).astype(psi.dtype), layer_telemetry(made.statistics)


def _zero_evidence(like: Stream) -> Psi:
    return jnp.zeros(like.shape[:2], jnp.promote_types(like.dtype, jnp.float32))


def _residual(config: ModelConfig, parts, embedding: Stream, context: Context, telemetry: bool) -> LoopOutput:
    def layer(config: ModelConfig, stream: Stream, own, context: Context):
        psi, seen = _zero_evidence(stream), {}
        for kind in range(2):
            output, psi, found = _sublayer(config, kind, own[kind], stream, psi, context)
            stream, seen = new_source(config, stream, output, psi, None)[0], seen | found
        return stream, seen if telemetry else {}

    def body(config: ModelConfig, stream: Stream, own):
        return rematerialized(partial(layer, config), config.remat)(stream, own, context)

    return LoopOutput(*_scan_layers(body, config, embedding, parts))


class History(NamedTuple):
    """Sources [S, B, T, D] and their evidence [S, B, T]; or the gradients of both."""

    sources: Float[Array, "S B T D"]
    evidence: Float[Array, "S B T"]

    def get(self, slot) -> tuple[Stream, Psi]:
        """A copy of a slot, which may then be overwritten."""
        return written_once(self._slot(slot))

    def take(self, slot, context: Context) -> tuple[tuple[Stream, Psi], "History"]:
        """A copy of a slot, and the rest with zeros in its place."""
        # First read, then written.
        taken, zeros = written_once((self._slot(slot), jax.tree.map(jnp.zeros_like, self._slot(slot))))
        return taken, self.put(slot, *zeros, context)

    def _slot(self, slot) -> tuple[Stream, Psi]:
        return tuple(lax.dynamic_index_in_dim(x, slot, keepdims=False) for x in self)

    def put(self, slot, source: Stream, evidence: Psi, context: Context) -> "History":
        """With another source in a slot."""
        put = lambda x, new: lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), slot, 0)
        sources = context.constrain(put(self.sources, source), None, "batch", "stream", None)
        return History(sources, context.constrain(put(self.evidence, evidence), None, "batch", "stream"))

    @staticmethod
    def zeros(config: ModelConfig, like: Stream) -> "History":
        """As many slots as the schedule needs."""
        slots = schedule(config).num_slots
        evidence = jnp.zeros((slots, *like.shape[:2]), jnp.promote_types(like.dtype, jnp.float32))
        return History(jnp.zeros((slots, *like.shape), like.dtype), evidence)


class Place(NamedTuple):
    """The schedule of one layer as numbers: for both sublayers the slot and the members that it holds already."""

    slot: Int[Array, " 2"]
    members: Int[Array, " 2"]
    stream_slot: Int[Array, ""]  # where the next stream goes, in wirings that put it anywhere
    before: Int[Array, ""]  # the slot that the router before the layer read last; of the first layer the embedding's


def _places(config: ModelConfig) -> Place:
    steps = schedule(config).steps
    pairs = lambda values: jnp.asarray(values, jnp.int32).reshape(-1, 2)
    slots = pairs([step.slot for step in steps])
    streams = jnp.asarray([step.stream_slot or 0 for step in steps[1::2]], jnp.int32)
    before = jnp.asarray([0, *(step.slot for step in steps[1:-2:2])], jnp.int32)
    return Place(slots, pairs([step.members for step in steps]), streams, before)


def _streams_are_sources(config: ModelConfig) -> bool:
    """Whether the stream that a layer reads can be found among the sources."""
    return schedule(config).steps[-1].stream_slot is not None


def _make(config: ModelConfig, kind: int, own, streams: Streams, psi: Psi, block, members, context: Context):
    """(source, its evidence, psi, telemetry) of a sublayer; block: source and evidence of its block so far,
    () without blocks.
    """
    stream = streams if len(streams) > 1 else streams[0]
    output, psi, seen = _sublayer(config, kind, own, stream, psi, context)
    if block:
        block = (*(jnp.where(members > 0, x, 0) for x in block), members)
    source, evidence = new_source(config, stream, output, psi, block or None)
    return source, evidence, psi, seen


def _arguments(config: ModelConfig, slot, router, source: Stream) -> dict[str, Array]:
    """What a router's parameters and its newest source give to the depth operator."""
    arguments = query_arguments(router, config, source, slot + 1, schedule(config).num_slots)
    return arguments | (dict(coupling=router_beta(router, config)) if config.coupling else {})


def _options(config: ModelConfig, slot, history: History, context: Context) -> dict[str, Any]:
    """The other arguments of the depth operator beside the sources."""
    evidence = dict(null_evidence=history.evidence) if config.coupling else {}
    return dict(num_sources=slot + 1, **route_options(config, context)) | evidence


def _operator(config: ModelConfig) -> DepthOperator:
    operator = depth_operator(config.depth_normalizer)
    return over_normalized(operator) if config.router == "qkv" else operator


def _route(config: ModelConfig, slot, router, source: Stream, history: History, context: Context) -> Stream:
    arguments = _arguments(config, slot, router, source)
    mixture = _operator(config).route(history.sources, **arguments, **_options(config, slot, history, context)).output
    return finish(router, config, mixture, source, slot + 1)


class _Run(NamedTuple):
    """A forward pass: by layer the block that it goes on with, () without blocks, and its telemetry, where
    asked for.
    """

    stream: Stream
    history: History
    blocks: Any
    telemetry: dict[str, Array]


def _run(config: ModelConfig, stacked, context: Context, embedding: Stream, telemetry: bool = False) -> _Run:
    def layer(config: ModelConfig, carry, xs):
        streams, history = carry
        place, (parts, routers) = xs
        block = history.get(place.slot[0]) if config.blocks else ()
        psi, seen = _zero_evidence(streams[0]), {}
        for kind in range(2):
            slot = place.slot[kind]
            before = history.get(slot) if config.blocks else ()
            source, evidence, psi, found = _make(
                config, kind, parts[kind], streams, psi, before, place.members[kind], context
            )
            history, seen = history.put(slot, source, evidence, context), seen | found
            readers = _of_kind(config, kind, routers)
            streams = tuple(_route(config, slot, router, source, history, context) for router in readers)
        if _streams_are_sources(config):
            history = history.put(place.stream_slot, streams[0], psi, context)
        return (streams, history), (block, seen if telemetry else {})

    history = History.zeros(config, embedding).put(0, embedding, _zero_evidence(embedding), context)
    start = (embedding,) * _counts(config)[1], history
    (streams, history), (blocks, seen) = _scan_layers(layer, config, start, (_places(config), stacked))
    return _Run(streams[0], history, blocks, seen)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed(config: ModelConfig, stacked, context: Context, embedding: Stream) -> Stream:
    return _run(config, stacked, context, embedding).stream


def _routed_forward(config: ModelConfig, stacked, context: Context, embedding: Stream):
    run = _run(config, stacked, context, embedding)
    return run.stream, (stacked, context, run.history, run.blocks)


class _Reader(NamedTuple):
    """A router, recomputed: what it made and how its gradients are pulled back."""

    arguments: dict[str, Array]
    pull_arguments: Callable
    result: DepthRoute
    pull_finish: Callable


class _Recomputed(NamedTuple):
    """A sublayer and the routers after it, recomputed."""

    slot: Int[Array, ""]
    source: Stream
    evidence: Psi
    pull_made: Callable
    readers: list[_Reader]


def _recompute(
    config: ModelConfig, context: Context, place: Place, parts, routers, streams: Streams, history: History
) -> tuple[list[_Recomputed], History]:
    """A layer's steps from the streams it reads."""
    steps, psi = [], _zero_evidence(streams[0])
    for kind in range(2):
        slot, members = place.slot[kind], place.members[kind]

        def make(own, streams, psi, block, kind=kind, members=members):
            return _make(config, kind, own, streams, psi, block, members, context)[:3]

        block = history.get(slot) if config.blocks else ()
        (source, evidence, psi), pull_made = jax.vjp(make, parts[kind], streams, psi, block)
        history = history.put(slot, source, evidence, context)
        readers, read = [], []
        for router in _of_kind(config, kind, routers):
            arguments, pull_arguments = jax.vjp(partial(_arguments, config, slot), router, source)
            result = _operator(config).route(history.sources, **arguments, **_options(config, slot, history, context))
            finished = lambda router, *arrays, slot=slot: finish(router, config, *arrays, slot + 1)
            stream, pull_finish = jax.vjp(finished, router, result.output, source)
            read.append(stream)
            readers.append(_Reader(arguments, pull_arguments, result, pull_finish))
        streams = tuple(read)
        steps.append(_Recomputed(slot, source, evidence, pull_made, readers))
    return steps, history


def _streams_before(config: ModelConfig, context: Context, index, place: Place, routers, history: History) -> Streams:
    """The streams that a layer reads: found among the sources, or routed from those before the layer."""
    if _streams_are_sources(config):
        return (history.get(index)[0],)
    newest, embedding = history.get(place.before)[0], history.get(0)[0]
    each = [jax.tree.map(lambda x, i=i: x[i], routers) for i in range(_counts(config)[1])]
    read = [_route(config, place.before, router, newest, history, context) for router in each]
    return tuple(jnp.where(index == 0, embedding, stream) for stream in read)


def _routed_backward(config: ModelConfig, saved, d_stream: Stream):
    stacked, context, history, blocks = saved

    def layer(config: ModelConfig, carry, xs):
        # d_streams: of the streams after the layer by way of the next sublayer; gradients: of all sources by way of
        #   later layers.
        d_streams, history, gradients = carry
        index, place, (parts, routers), before, block = xs
        if config.blocks:
            history = history.put(place.slot[0], *block, context)
        streams = _streams_before(config, context, index, place, before, history)
        steps, history = _recompute(config, context, place, parts, routers, streams, history)
        d_psi = jnp.zeros_like(steps[0].evidence)
        if _streams_are_sources(config):
            (d_source, d_psi), gradients = gradients.take(place.stream_slot, context)
            d_streams = (d_streams[0] + d_source,)
        d_parts, d_routers = [], []
        for step in reversed(steps):
            if config.blocks:  # a later sublayer of the block was added to the slot
                history = history.put(step.slot, step.source, step.evidence, context)
            d_part, d_readers, d_streams, d_psi, gradients = _pull(
                config, context, step, history, gradients, d_streams, d_psi
            )
            d_parts, d_routers = [d_part, *d_parts], [*d_readers, *d_routers]
        return (d_streams, history, gradients), (tuple(d_parts), jax.tree.map(lambda *x: jnp.stack(x), *d_routers))

    d_streams = (d_stream, *(jnp.zeros_like(d_stream) for _ in range(_counts(config)[1] - 1)))
    carry = (d_streams, history, History.zeros(config, d_stream))
    # The routers before each layer, where its streams have to be routed once more; the first layer has none.
    own = lambda x: jnp.roll(x[:, _counts(config)[0] :], 1, axis=0)
    before = () if _streams_are_sources(config) else jax.tree.map(own, stacked[1])
    steps = (jnp.arange(config.num_layers), _places(config), stacked, before, blocks)
    (d_streams, _, gradients), d_stacked = _scan_layers(layer, config, carry, steps, reverse=True)
    return d_stacked, None, sum(d_streams) + gradients.sources[0]


def _pull(
    config: ModelConfig, context: Context, step: _Recomputed, history: History, gradients: History, d_streams, d_psi
):
    """Takes a step's gradients out of those of its routers' outputs and of its source."""
    options, d_routers, d_read = _options(config, step.slot, history, context), [], 0
    for reader, d_stream in zip(step.readers, d_streams):
        d_finish, d_output, d_last = reader.pull_finish(d_stream)
        add, arguments = _operator(config).add_gradients, reader.arguments
        routed = add(gradients.sources, d_output, reader.result, history.sources, **arguments, **options)
        evidence = gradients.evidence if routed.null_evidence is None else gradients.evidence + routed.null_evidence
        gradients = History(routed.sources, evidence)
        d_router, d_newest = reader.pull_arguments({name: getattr(routed, name) for name in arguments})
        d_routers.append(jax.tree.map(jnp.add, d_router, d_finish))
        d_read = d_read + d_newest + d_last
    (d_source, d_evidence), gradients = gradients.take(step.slot, context)
    d_made = (d_source + d_read, d_evidence.astype(step.evidence.dtype), d_psi.astype(step.evidence.dtype))
    d_part, d_streams, d_psi, d_block = step.pull_made(d_made)
    if config.blocks:
        gradients = gradients.put(step.slot, *d_block, context)
    return d_part, d_routers, d_streams, d_psi, gradients


_routed.defvjp(_routed_forward, _routed_backward)
