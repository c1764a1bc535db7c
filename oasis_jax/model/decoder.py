"""The decoder: embedding, a stack of attention and MLP sublayers in one of three wirings, a head."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.model.attention import Attention, Constrain, backend, unconstrained
from oasis_jax.model.mlp import MLP
from oasis_jax.model.norms import Norm
from oasis_jax.model.numerics import FLOAT, Numerics
from oasis_jax.model.parameters import ParameterModule, Parameters, ParameterSpec, matrix
from oasis_jax.model.remat import rematerialized
from oasis_jax.model.router import Router
from oasis_jax.model.statistics import AttentionStatistics, Statistics
from oasis_jax.model.wiring import WIRINGS, router_names, sublayer_names

Inputs = Int[Array, "B T"] | Float[Array, "B T I"]
Outputs = Float[Array, "B T O"]


def padded_vocab(vocab_size: int) -> int:
    """The rows of the embedding: vocab_size rounded up to a multiple of 8, so that it can be split over devices."""
    return -(-vocab_size // 8) * 8


def check_model(config: ModelConfig) -> None:
    """Raises UserError where a config cannot be built: a backend that does not exist, inputs without a size."""
    backend("null_attention", config.attention_implementation)
    backend("depth_route", config.depth_implementation)
    size = "vocab_size" if config.inputs == "tokens" else "vector_dim"
    if not getattr(config, size):
        raise UserError(f"model.{size}: must be set to build a model with inputs={config.inputs}")


def ends_parameters(config: ModelConfig) -> dict[str, ParameterSpec]:
    """The parameters before and after the stack."""
    width = config.width
    if config.inputs == "vectors":
        return {
            "embedding": matrix((config.vector_dim, width), (None, "embed"), config.vector_dim),
            "head": matrix((width, config.vector_dim), ("embed", None), width),
        }
    vocab = padded_vocab(config.vocab_size)
    specs = {"embedding": matrix((vocab, width), ("vocab", "embed"), width)}
    return specs if config.tied_head else specs | {"head": matrix((width, vocab), ("embed", "vocab"), width)}


def embed(
    parameters: Parameters, config: ModelConfig, inputs: Inputs, numerics: Numerics = FLOAT
) -> Float[Array, "B T D"]:
    """Token ids are looked up, vectors projected; the result has the compute type."""
    if config.inputs == "vectors":
        return numerics.einsum(
            "embedding", "BTI,ID->BTD", inputs.astype(config.dtype), parameters["embedding"].astype(config.dtype)
        )
    return numerics.lookup("embedding", parameters["embedding"].astype(config.dtype), inputs)


def unembed(
    parameters: Parameters,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    constrain: Constrain,
    numerics: Numerics = FLOAT,
) -> Outputs:
    """Logits over the padded vocabulary, or output vectors; float32 or better."""
    x = constrain(x, ("batch", "length", None))
    head = parameters["head"] if "head" in parameters else parameters["embedding"].T
    wide = jnp.promote_types(x.dtype, jnp.float32)
    outputs = numerics.einsum("head", "BTD,DO->BTO", x, head.astype(x.dtype), preferred_element_type=wide)
    return constrain(outputs, ("batch", "length", "vocab" if config.inputs == "tokens" else None))


def attention_sublayer(
    layer: Any, x: Float[Array, "B T D"], segment_ids: Array | None, constrain: Constrain, numerics: Numerics
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], AttentionStatistics]:
    """(output, norm output, statistics) of a layer's attention; `layer` is an NNX or a bound Linen module."""
    normed = layer.attention_norm(x)
    output, statistics = layer.attention(normed, segment_ids=segment_ids, constrain=constrain, numerics=numerics)
    return constrain(output, ("batch", "stream", None)), normed, statistics


def mlp_sublayer(
    layer: Any, x: Float[Array, "B T D"], constrain: Constrain, numerics: Numerics
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """(output, norm output) of a layer's MLP."""
    normed = layer.mlp_norm(x)
    return constrain(layer.mlp(normed, constrain=constrain, numerics=numerics), ("batch", "stream", None)), normed


def decode(
    config: ModelConfig,
    inputs: Inputs,
    *,
    ends: Parameters,
    layers: list,
    routers: dict[str, Callable],
    final_norm: Callable,
    segment_ids: Int[Array, "B T"] | None,
    constrain: Constrain | None,
    call: Callable,
    numerics: Numerics = FLOAT,
) -> tuple[Outputs, Statistics]:
    """The decoder over callables, shared by NNX and Linen.

    Args:
      ends: as `ends_parameters` lists them.
      layers: objects with attention_norm, attention, mlp_norm and mlp.
      routers: by name, as `router_names` lists them.
      final_norm: the norm that the head reads.
      segment_ids, constrain: see `Decoder.__call__`.
      call: call(function, layer, x) runs function(layer, x), rematerialized where the config asks for it.
      numerics: see `Decoder.__call__`.
    """
    constrain = constrain or unconstrained
    taps = {name: [] for name in ("attention_norm", "attention_output", "mlp_norm", "mlp_output")}
    attentions: list[AttentionStatistics] = []
    evidence: list[Float[Array, "B T"]] = []

    def attend(layer, name, x):
        run = partial(attention_sublayer, segment_ids=segment_ids, constrain=constrain, numerics=numerics.within(name))
        output, normed, statistics = call(run, layer, x)
        attentions.append(statistics)
        taps["attention_norm"].append(normed)
        taps["attention_output"].append(output)
        evidence.append(constrain(statistics.null_mass.mean(axis=1), ("batch", "stream")))
        return output, evidence[-1]

    def feed(layer, name, x):
        output, normed = call(partial(mlp_sublayer, constrain=constrain, numerics=numerics.within(name)), layer, x)
        taps["mlp_norm"].append(normed)
        taps["mlp_output"].append(output)
        return output, evidence[-1]

    kinds = [(run, layer) for layer in layers for run in (attend, feed)]
    sublayers = [partial(run, layer, name) for (run, layer), name in zip(kinds, sublayer_names(config))]
    if numerics is not FLOAT:
        routers = {
            name: partial(router, numerics=numerics.within(f"{name}.router")) for name, router in routers.items()
        }
    routers = {name: partial(router, constrain=constrain) for name, router in routers.items()}
    embedding = constrain(embed(ends, config, inputs, numerics), ("batch", "stream", None))
    stack = WIRINGS[config.wiring](config, embedding, sublayers, routers, numerics)
    final = final_norm(stack.stream)
    outputs = unembed(ends, config, final, constrain, numerics)
    taps |= {"layer_output": stack.layer_outputs, "final_norm": [final]}
    return outputs, Statistics(attentions, stack.routers, taps)


class Layer(nnx.Module):
    """One attention and one MLP, each with its norm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = Norm(config, config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = Norm(config, config.width, rngs=rngs)
        self.mlp = MLP(config.width, config.mlp_size, rngs=rngs)


def _call(function: Callable, layer: Layer, x: Array):
    return function(layer, x)


def _call_rematerialized(name: str, function: Callable, layer: Layer, x: Array):
    graphdef, state = nnx.split(layer)
    return rematerialized(lambda state, x: function(nnx.merge(graphdef, state), x), name)(state, x)


class Decoder(nnx.Module):
    """A decoder of any preset: `Decoder(ModelConfig(preset="oasis", vocab_size=258), rngs=nnx.Rngs(0))`.

    Raises UserError for a config that cannot be built. Needs no mesh; parameters carry their logical axes as metadata.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        check_model(config)
        self.config = config
        self.ends = ParameterModule(ends_parameters(config), rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.routers = nnx.List([Router(config, rngs=rngs) for _ in router_names(config)])
        self.final_norm = Norm(config, config.width, rngs=rngs)

    def __call__(
        self,
        inputs: Inputs,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        constrain: Constrain | None = None,
        numerics: Numerics = FLOAT,
    ) -> tuple[Outputs, Statistics]:
        """Runs the decoder.

        Args:
          inputs: token ids [B, T], or vectors [B, T, vector_dim], as `config.inputs` says.
          segment_ids: [B, T]; attention stays within equal ids.
          constrain: function (array, logical axes) -> array that pins the sharding of activations.
          numerics: how linear layers are computed and activations rounded. Other than FLOAT it is for inference:
            nothing is rematerialized.

        Returns:
          float32 logits [B, T, padded vocabulary] or vectors [B, T, vector_dim], and the Statistics of the pass.
        """
        return decode(
            self.config,
            inputs,
            ends=self.ends.parameters,
            layers=self.layers,
            routers=dict(zip(router_names(self.config), self.routers)),
            final_norm=self.final_norm,
            segment_ids=segment_ids,
            constrain=constrain,
            # A numerics that records could not carry what it saw out of a rematerialized function.
            call=_call
            if self.config.remat == "none" or numerics is not FLOAT
            else partial(_call_rematerialized, self.config.remat),
            numerics=numerics,
        )


def with_parameters(config: ModelConfig, params: dict) -> Decoder:
    """The decoder with these parameters, nested as `nnx.to_pure_dict(nnx.state(Decoder(...)))` nests them."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def parameter_axes(config: ModelConfig) -> dict:
    """The logical axes of every parameter, in the nested-dict structure of `nnx.to_pure_dict(nnx.state(model))`."""
    state = nnx.eval_shape(lambda: nnx.state(Decoder(config, rngs=nnx.Rngs(0))))
    flat = {path: variable.get_metadata()["axes"] for path, variable in nnx.to_flat_state(state)}
    return nnx.traversals.unflatten_mapping(flat)
