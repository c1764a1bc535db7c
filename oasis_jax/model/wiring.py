"""How sublayers are connected over depth: the schedule of a config, the one place that knows a wiring's geometry.

A sublayer reads the stream h and makes a source, f(norm(h)) or its sum with h. Sources lie in slots; slot 0 holds the
embedding. After a sublayer a router reads the slots up to the newest one, and its mixture is the next stream. The
wirings:

    residual     h <- h + f(norm(h)); no slots, no routers
    cumulative   (OASIS, arXiv 2605.17887) layer l writes its candidates h + f(norm(h)) to the slots l+1 and l+2, and
                 its last stream to slot l+1
    delta        (AttnRes, arXiv 2603.15031) sublayer s writes f(norm(h)) to slot s+1 or, with blocks, adds it to its
    block's slot
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from oasis_jax.config import ModelConfig

KINDS = ("attention", "mlp")
PROJECTIONS = ("query", "key", "value")  # of an attention whose inputs are routed apart (router=qkv, Inkling-2)


class Source(NamedTuple):
    """What a slot holds when a router reads it: its name, and the layers whose attention it stems from."""

    name: str
    layers: tuple[int, ...]


class Step(NamedTuple):
    """One sublayer and the router after it, or the three of an attention whose queries, keys and values read apart.

    Attributes:
      index: of the sublayer.
      layer, kind, name: "layer3.mlp" is the MLP of layer 3.
      slot: where the source goes; without a router 0, the stream.
      members: how many sublayers of its block the slot holds already.
      routers: names of those that make the next stream; (): the source is the next stream.
      first_router: the index of the first of them among all routers.
      sources: what a router reads: the slots 0 .. slot, oldest first.
      current: how many of the newest sources were made by the router's own layer or, in the delta wiring, newest
        sublayer.
      stream_slot: where the next stream goes too, in place of what that slot and later ones held; None: nowhere.
    """

    index: int
    layer: int
    kind: str
    name: str
    slot: int = 0
    members: int = 0
    routers: tuple[str, ...] = ()
    first_router: int = 0
    sources: tuple[Source, ...] = ()
    current: int = 0
    stream_slot: int | None = None


class Schedule(NamedTuple):
    """The steps of a model in order, and how many slots its sources need."""

    steps: tuple[Step, ...]
    num_slots: int

    @property
    def sublayers(self) -> list[str]:
        """Names of the sublayers, in order: "layer0.attention", "layer0.mlp", ..."""
        return [step.name for step in self.steps]

    @property
    def routers(self) -> list[str]:
        """Names of the routers, in order of use."""
        return [router for step in self.steps for router in step.routers]

    @property
    def columns(self) -> list[str]:
        """Names of all sources that some router reads, oldest first: the columns of a router x source table."""
        names = dict.fromkeys(source.name for step in self.steps for source in step.sources)
        own = [name for name in names if name.startswith("own ")]
        return [name for name in names if name not in own] + own


EMBEDDING = Source("embedding", ())


def _residual(config: ModelConfig, steps: list[Step]) -> Schedule:
    del config
    return Schedule(tuple(steps), 1)


def _cumulative(config: ModelConfig, steps: list[Step]) -> Schedule:
    found = []
    for step in steps:
        kind, layer = KINDS.index(step.kind), step.layer
        history = [EMBEDDING, *(Source(f"layer{i}", (i,)) for i in range(layer))]
        own = [Source(f"own {name}", (layer,)) for name in KINDS[: kind + 1]]
        found.append(
            step._replace(
                slot=layer + 1 + kind,
                routers=(step.name,),
                first_router=step.index,
                sources=(*history, *own),
                current=kind + 1,
                stream_slot=layer + 1 if kind else None,
            )
        )
    return Schedule(tuple(found), config.num_layers + 2)


def block_sizes(sublayers: int, blocks: int) -> list[int]:
    """How many sublayers each block sums: sizes differ by at most one, the larger ones come first."""
    size, larger = divmod(sublayers, blocks)
    return [size + (block < larger) for block in range(blocks)]


def _readers(config: ModelConfig, steps: list[Step], index: int) -> tuple[str, ...]:
    """The routers that make what a sublayer reads, or the final norm after the last."""
    if index == len(steps):
        return ("final",)
    step = steps[index]
    apart = config.router == "qkv" and step.kind == "attention"
    return tuple(f"{step.name}.{part}" for part in PROJECTIONS) if apart else (step.name,)


def _delta(config: ModelConfig, steps: list[Step]) -> Schedule:
    sizes = block_sizes(len(steps), config.blocks or len(steps))
    place = [(block, member) for block, size in enumerate(sizes) for member in range(size)]
    sources, found, count = [EMBEDDING], [], 0
    for step, (block, member) in zip(steps, place):
        routers = _readers(config, steps, step.index + 1)
        name = f"block{block + 1}" if config.blocks else step.name
        earlier = sources.pop().layers if member else ()
        sources.append(Source(name, tuple(dict.fromkeys((*earlier, step.layer)))))
        where = dict(slot=block + 1, members=member, sources=tuple(sources), current=1)
        found.append(step._replace(routers=routers, first_router=count, **where))
        count += len(routers)
    return Schedule(tuple(found), len(sizes) + 1)


WIRINGS: dict[str, Callable[[ModelConfig, list[Step]], Schedule]] = {
    "residual": _residual,
    "cumulative": _cumulative,
    "delta": _delta,
}


@functools.cache
def schedule(config: ModelConfig) -> Schedule:
    """Which sublayer reads which sources, writes which slot, with which router: data for executors, tables and
    measures.
    """
    names = [(layer, kind) for layer in range(config.num_layers) for kind in KINDS]
    steps = [Step(i, layer, kind, f"layer{layer}.{kind}") for i, (layer, kind) in enumerate(names)]
    return WIRINGS[config.wiring](config, steps)
