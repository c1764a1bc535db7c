"""The wirings that route over a history, as one loop over layers whose sources lie in one append-only array.

For the cumulative wiring, for blocks, and for queries that each token projects: those are known only when their newest
source is, so nothing can be scored beforehand as `pallas_kernels.routed_stack` does. One custom derivative spans the
whole loop. Forward keeps the sources and, of blocks, what each layer adds to; no more. Backward, a layer is computed
again from them, its gradients are added in place to one more array like the sources, and the gradient of a source is
complete when the layer that made it is reached. Gradients are summed in the dtype of the sources, as by JAX without a
loop.

Step s of a loop, a sublayer and the router after it, writes source `slot(s)` and reads those up to it:

    cumulative   layer l writes its candidates to the slots l+1 and l+2; its stream then takes slot l+1
    delta        sublayer s writes slot s+1; with blocks, the running block is added to the slot it has
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from oasis_jax.config import ModelConfig
from oasis_jax.model.attention import Constrain
from oasis_jax.model.router import coupling_strength, query_arguments, route_options
from oasis_jax.model.wiring import clip
from pallas_kernels import DepthRoute, add_route_gradients, depth_route
from pallas_kernels.fusion import written_once

Stream = Float[Array, "B T D"]
# (parameters, segment_ids, h, psi) -> (output, psi), with psi [B, T] the null evidence of the layer's attention.
Sublayer = Callable[[Any, Any, Stream, Array], tuple[Stream, Array]]


class Loop(NamedTuple):
    """What a loop is compiled for: the two sublayers of a layer, config and `constrain`."""

    sublayers: tuple[Sublayer, Sublayer]
    config: ModelConfig
    constrain: Constrain

    @property
    def cumulative(self) -> bool:
        return self.config.wiring == "cumulative"

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self.config.num_layers + 2 if self.cumulative else (self.config.blocks or 2 * self.config.num_layers) + 1

    def place(self, layer: Int[Array, ""], kind: int) -> tuple[Array, Array]:
        """(the slot that a sublayer writes, how many sublayers its block has already)."""
        if self.cumulative:
            return layer + 1 + kind, jnp.zeros((), jnp.int32)
        sublayer, blocks = 2 * layer + kind, self.capacity - 1
        size = 2 * self.config.num_layers // blocks
        block = jnp.minimum(sublayer // size, blocks - 1)
        return block + 1, sublayer - block * size


class History(NamedTuple):
    """Sources [S, B, T, D] and their evidence [S, B, T]; or the gradients of both."""

    sources: Float[Array, "S B T D"]
    evidence: Float[Array, "S B T"]

    def get(self, slot) -> tuple[Stream, Array]:
        """A copy of a slot, which may then be overwritten."""
        return written_once(self._slot(slot))

    def take(self, loop: "Loop", slot) -> tuple[tuple[Stream, Array], "History"]:
        """A copy of a slot, and the rest with zeros in its place."""
        taken, zeros = written_once(
            (self._slot(slot), jax.tree.map(jnp.zeros_like, self._slot(slot)))
        )  # first read, then written
        return taken, self.put(loop, slot, *zeros)

    def _slot(self, slot) -> tuple[Stream, Array]:
        return tuple(lax.dynamic_index_in_dim(x, slot, keepdims=False) for x in self)

    def put(self, loop: Loop, slot, source: Stream, evidence: Array) -> "History":
        put = lambda x, new: lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), slot, 0)
        sources = loop.constrain(put(self.sources, source), (None, "batch", "stream", None))
        return History(sources, loop.constrain(put(self.evidence, evidence), (None, "batch", "stream")))

    @staticmethod
    def zeros(loop: Loop, like: Stream) -> "History":
        evidence = jnp.zeros((loop.capacity, *like.shape[:2]), jnp.promote_types(like.dtype, jnp.float32))
        return History(jnp.zeros((loop.capacity, *like.shape), like.dtype), evidence)


def history_stack(
    loop: Loop, parts: tuple[Any, Any], routers: Any, segment_ids: Int[Array, "B T"] | None, embedding: Stream
) -> Stream:
    """The stream after all layers; equals that of `stack.cumulative` or `stack.delta`.

    Args:
      loop: see Loop.
      parts: the parameters of all layers' first and second sublayers, stacked [L, ...].
      routers: the parameters of the routers, stacked [2 L, ...].
      segment_ids: given to every sublayer.
      embedding: the first source.
    """
    pairs = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), routers)
    return _stack(loop, (parts, pairs), segment_ids, embedding)


def _make(loop: Loop, kind: int, own, segment_ids, h, psi, before, members):
    """(source, its evidence, psi) that a sublayer makes; before: source and evidence of its block so far."""
    output, psi = loop.sublayers[kind](own, segment_ids, h, psi)
    if loop.cumulative:
        return clip(loop.config, h + output), psi, psi
    if not loop.config.blocks:
        return output, psi, psi
    running, mean = (jnp.where(members > 0, x, 0) for x in before)
    return running + output, (mean * members + psi) / (members + 1), psi


def _before(loop: Loop, history: History, slot):
    """What a slot holds of the block that a sublayer is added to."""
    return history.get(slot) if loop.config.blocks else None


def _arguments(loop: Loop, slot, router, source) -> dict[str, Array]:
    """What a router's parameters and its newest source give to `depth_route`."""
    arguments = query_arguments(router, loop.config, source, slot + 1, loop.capacity)
    return arguments | (dict(coupling=coupling_strength(router["beta_raw"])) if loop.config.coupling else {})


def _rest(loop: Loop, slot, history: History) -> dict[str, Any]:
    """The other arguments of `depth_route` beside the sources."""
    return dict(num_sources=slot + 1, **route_options(loop.config, loop.constrain)) | (
        dict(null_evidence=history.evidence) if loop.config.coupling else {}
    )


def _run(loop: Loop, stacked, segment_ids, embedding) -> tuple[Stream, History, Any]:
    """(stream, history, what the backward pass needs beside it: by layer, the block it goes on with)."""

    def layer(carry, xs):
        h, history = carry
        index, (parts, pairs) = xs
        kept = history.get(loop.place(index, 0)[0]) if loop.config.blocks else ()
        psi = jnp.zeros_like(history.evidence[0])
        for kind in range(2):
            slot, members = loop.place(index, kind)
            source, evidence, psi = _make(
                loop, kind, parts[kind], segment_ids, h, psi, _before(loop, history, slot), members
            )
            history = history.put(loop, slot, source, evidence)
            router = jax.tree.map(lambda x, kind=kind: x[kind], pairs)
            h = depth_route(
                history.sources, **_arguments(loop, slot, router, source), **_rest(loop, slot, history)
            ).output
        if loop.cumulative:
            history = history.put(loop, index + 1, h, psi)
        return (h, history), kept

    history = History.zeros(loop, embedding).put(loop, 0, embedding, jnp.zeros(embedding.shape[:2]))
    (h, history), kept = lax.scan(layer, (embedding, history), (jnp.arange(loop.config.num_layers), stacked))
    return h, history, kept


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stack(loop, stacked, segment_ids, embedding):
    return _run(loop, stacked, segment_ids, embedding)[0]


def _stack_forward(loop, stacked, segment_ids, embedding):
    stream, history, kept = _run(loop, stacked, segment_ids, embedding)
    return stream, (stacked, segment_ids, history, kept)


class _Step(NamedTuple):
    """A step of a layer, computed again: what it made and how its gradients are pulled back."""

    slot: Int[Array, ""]
    source: Stream
    evidence: Array
    pull_made: Callable
    arguments: dict[str, Array]
    pull_arguments: Callable
    result: DepthRoute


def _again(loop: Loop, segment_ids, index, parts, pairs, h, history: History) -> tuple[list[_Step], History]:
    """A layer's steps from the stream it reads."""
    steps, psi = [], jnp.zeros_like(history.evidence[0])
    for kind in range(2):
        slot, members = loop.place(index, kind)

        def make(own, h, psi, before, kind=kind, members=members):
            return _make(loop, kind, own, segment_ids, h, psi, before, members)

        (source, evidence, psi), pull_made = jax.vjp(make, parts[kind], h, psi, _before(loop, history, slot))
        history = history.put(loop, slot, source, evidence)
        router = jax.tree.map(lambda x, kind=kind: x[kind], pairs)
        arguments, pull_arguments = jax.vjp(partial(_arguments, loop, slot), router, source)
        result = depth_route(history.sources, **arguments, **_rest(loop, slot, history))
        steps.append(_Step(slot, source, evidence, pull_made, arguments, pull_arguments, result))
        h = result.output
    return steps, history


def _route_again(loop: Loop, index, router, history: History) -> Stream:
    """The stream that a layer of the delta wiring reads, made again from the sources before the layer."""
    slot = loop.place(index - 1, 1)[0]
    h = depth_route(
        history.sources, **_arguments(loop, slot, router, history.get(slot)[0]), **_rest(loop, slot, history)
    ).output
    return jnp.where(index == 0, history.get(0)[0], h)


def _stack_backward(loop, saved, d_stream):
    stacked, segment_ids, history, kept = saved

    def layer(carry, xs):
        d_h, history, gradients = (
            carry  # of the stream after the layer by way of the next sublayer; of all sources by way of later layers
        )
        index, (parts, pairs), router, kept = xs
        if loop.config.blocks:
            history = history.put(loop, loop.place(index, 0)[0], *kept)
        h = history.get(index)[0] if loop.cumulative else _route_again(loop, index, router, history)
        steps, history = _again(loop, segment_ids, index, parts, pairs, h, history)
        d_psi = jnp.zeros_like(steps[0].evidence)
        if loop.cumulative:
            (d_source, d_psi), gradients = gradients.take(loop, index + 1)
            d_h = d_h + d_source
        d_parts, d_routers = [], []
        for step in reversed(steps):
            if loop.config.blocks:  # a later sublayer of the block was added to the slot
                history = history.put(loop, step.slot, step.source, step.evidence)
            d_part, d_router, d_h, d_psi, gradients = _pull(loop, step, history, gradients, d_h, d_psi)
            d_parts, d_routers = [d_part, *d_parts], [d_router, *d_routers]
        return (d_h, history, gradients), (tuple(d_parts), jax.tree.map(lambda *x: jnp.stack(x), *d_routers))

    carry = (d_stream, history, History.zeros(loop, d_stream))
    # The router before each layer; the first layer has none. Streams of the cumulative wiring are sources, and not
    # routed again.
    before = None if loop.cumulative else jax.tree.map(lambda x: jnp.roll(x[:, 1], 1, axis=0), stacked[1])
    steps = (jnp.arange(loop.config.num_layers), stacked, before, kept)
    (d_h, _, gradients), d_stacked = lax.scan(layer, carry, steps, reverse=True)
    return d_stacked, None, d_h + gradients.sources[0]


def _pull(loop: Loop, step: _Step, history: History, gradients: History, d_h, d_psi):
    """Takes a step's gradients out of those of its router's output and of its source."""
    routed = add_route_gradients(
        gradients.sources, d_h, step.result, history.sources, **step.arguments, **_rest(loop, step.slot, history)
    )
    evidence = gradients.evidence if routed.null_evidence is None else gradients.evidence + routed.null_evidence
    gradients = History(routed.sources, evidence)
    d_router, d_newest = step.pull_arguments({name: getattr(routed, name) for name in step.arguments})
    (d_source, d_evidence), gradients = gradients.take(loop, step.slot)
    d_made = (d_source + d_newest, d_evidence.astype(step.evidence.dtype), d_psi.astype(step.evidence.dtype))
    d_part, d_h, d_psi, d_before = step.pull_made(d_made)
    return d_part, d_router, d_h, d_psi, gradients.put(loop, step.slot, *d_before) if loop.config.blocks else gradients


_stack.defvjp(_stack_forward, _stack_backward)
