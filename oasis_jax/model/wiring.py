"""How sublayers are connected over depth: pure functions over callables, shared by the NNX and the Linen decoder.

A sublayer maps the stream h to its output f(norm(h)) and the null evidence of its layer's attention. A router maps
lists of sources and of evidence to the next stream. History and evidence are passed explicitly.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.model.numerics import FLOAT, Numerics
from oasis_jax.model.router import Evidence, Sources
from oasis_jax.model.statistics import RouterStatistics

Stream = Float[Array, "B T D"]
Sublayer = Callable[[Stream], tuple[Stream, Float[Array, "B T"]]]
Routers = dict[str, Callable[[Sources, Evidence], tuple[Stream, RouterStatistics]]]


class StackOutput(NamedTuple):
    """What a wiring returns: the stream that the final norm reads, the stream after each layer, each router's
    statistics.
    """

    stream: Stream
    layer_outputs: list[Stream]
    routers: dict[str, RouterStatistics]


def sublayer_names(config: ModelConfig) -> list[str]:
    """The sublayers in order: "layer0.attention", "layer0.mlp", "layer1.attention", ..."""
    return [f"layer{layer}.{kind}" for layer in range(config.num_layers) for kind in ("attention", "mlp")]


def router_names(config: ModelConfig) -> list[str]:
    """The routers of a wiring, in order of use. Nothing routes over a single source, so delta has none before
    its first sublayer.
    """
    names = sublayer_names(config)
    return {"residual": [], "cumulative": names, "delta": [*names[1:], "final"]}[config.wiring]


def clip(config: ModelConfig, source: Stream) -> Stream:
    """Bounds a new source to +-tau where the config asks for it."""
    tau = config.residual_clip
    return jnp.clip(source, -tau, tau) if tau else source


def _sum(config: ModelConfig, name: str, stream: Stream, output: Stream, numerics: Numerics) -> Stream:
    """The residual sum after the sublayer `name`."""
    return numerics.within(name).tap("residual_sum", clip(config, stream + output))


def residual(
    config: ModelConfig, embedding: Stream, sublayers: Sequence[Sublayer], routers: Routers, numerics: Numerics = FLOAT
) -> StackOutput:
    """The ordinary pre-norm transformer."""
    del routers
    stream, streams = embedding, []
    for name, sublayer in zip(sublayer_names(config), sublayers):
        stream = _sum(config, name, stream, sublayer(stream)[0], numerics)
        streams.append(stream)
    return StackOutput(stream, streams[1::2], {})


def cumulative(
    config: ModelConfig, embedding: Stream, sublayers: Sequence[Sublayer], routers: Routers, numerics: Numerics = FLOAT
) -> StackOutput:
    """OASIS (arXiv 2605.17887): the candidates a = h + attn and m = h + mlp are routed together with all earlier
    layers' streams.
    """
    history, evidence = [embedding], [jnp.zeros(embedding.shape[:2], jnp.float32)]
    stream, streams, statistics = embedding, [], {}
    candidates, candidate_evidence = [], []
    for index, (name, sublayer) in enumerate(zip(sublayer_names(config), sublayers)):
        output, psi = sublayer(stream)
        candidates, candidate_evidence = (
            [*candidates, _sum(config, name, stream, output, numerics)],
            [*candidate_evidence, psi],
        )
        stream, statistics[name] = routers[name](history + candidates, evidence + candidate_evidence)
        if index % 2:  # the layer is complete
            history, evidence = [*history, stream], [*evidence, psi]
            candidates, candidate_evidence = [], []
            streams.append(stream)
    return StackOutput(stream, streams, statistics)


def delta(
    config: ModelConfig, embedding: Stream, sublayers: Sequence[Sublayer], routers: Routers, numerics: Numerics = FLOAT
) -> StackOutput:
    """AttnRes (arXiv 2603.15031): every sublayer reads a routed mixture of the embedding and the earlier sublayers'
    outputs.

    With `config.blocks`, sublayers are summed into blocks, the last of which takes the remainder; a block's evidence is
    the mean of its members'. The running block is a source of its own.
    """
    count = config.blocks or len(sublayers)
    size = len(sublayers) // count
    sources, evidence = [embedding], [jnp.zeros(embedding.shape[:2], jnp.float32)]
    members, block = 0, 0
    stream, streams, statistics = embedding, [], {}
    for index, sublayer in enumerate(sublayers):
        output, psi = sublayer(stream)
        output = clip(config, output)
        if members:
            total = numerics.within(sublayer_names(config)[index]).tap("residual_sum", sources[-1] + output)
            sources[-1], evidence[-1] = total, (evidence[-1] * members + psi) / (members + 1)
        else:
            sources, evidence = [*sources, output], [*evidence, psi]
        members += 1
        if members == size and block < count - 1:
            members, block = 0, block + 1
        name = sublayer_names(config)[index + 1] if index + 1 < len(sublayers) else "final"
        stream, statistics[name] = routers[name](tuple(sources), tuple(evidence))
        if index % 2:
            streams.append(stream)
    return StackOutput(stream, streams, statistics)


WIRINGS: dict[str, Callable[[ModelConfig, Stream, Sequence[Sublayer], Routers, Numerics], StackOutput]] = {
    "residual": residual,
    "cumulative": cumulative,
    "delta": delta,
}
