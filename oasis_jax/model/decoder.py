"""The decoder: embedding, layers in one of three wirings, a head; as pure functions and as an NNX module over them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.model.attention import attention_parameters, backend
from oasis_jax.model.batch import check_ids
from oasis_jax.model.context import Context
from oasis_jax.model.head import (
    Inputs,
    Outputs,
    Params,
    embed,
    embedding_parameters,
    head_parameters,
    unembed,
    with_offset,
)
from oasis_jax.model.layer import Layer
from oasis_jax.model.layout import STACKS
from oasis_jax.model.mlp import mlp_parameters
from oasis_jax.model.norms import Norm, norm, norm_parameters
from oasis_jax.model.parameters import ParameterModule, ParameterSpec
from oasis_jax.model.router import Router, router_parameters
from oasis_jax.model.statistics import Statistics
from oasis_jax.model.unrolled import Unrolled, run_unrolled
from oasis_jax.model.wiring import schedule

_NO_CONTEXT = Context()


def check_model(config: ModelConfig) -> None:
    """Raises UserError where a config cannot be built: a backend that does not exist, inputs without a size."""
    backend("null_attention", config.attention_implementation)
    backend("depth_route", config.depth_implementation)
    size = "vocab_size" if config.inputs == "tokens" else "vector_dim"
    if not getattr(config, size):
        raise UserError(f"model.{size}: must be set to build a model with inputs={config.inputs}")


def check_inputs(config: ModelConfig, inputs: Inputs) -> None:
    """Raises UserError for inputs of another shape or type than the config's, or with an id that it does not have."""
    tokens = config.inputs == "tokens"
    shape, dtype = jnp.shape(inputs), jnp.result_type(inputs)
    fits = len(shape) == 2 if tokens else len(shape) == 3 and shape[-1] == config.vector_dim
    if not fits or jnp.issubdtype(dtype, jnp.integer) != tokens:
        wanted = "whole numbers [batch, length]" if tokens else f"numbers [batch, length, {config.vector_dim}]"
        raise UserError(f"inputs: must be {wanted} for model.inputs={config.inputs}, got {dtype} of shape {shape}")
    check_ids(config, inputs=inputs)


def final_stream(
    params: Params,
    config: ModelConfig,
    inputs: Inputs,
    context: Context = _NO_CONTEXT,
    **options: Any,
) -> tuple[Float[Array, "B T D"], Unrolled]:
    """What the head reads, and what was seen on the way.

    Args:
      params: stacked or layer by layer; see `oasis_jax.model.layout`.
      config: of the model.
      inputs: token ids [B, T], or vectors [B, T, vector_dim], as `config.inputs` says.
      context: see Context.
      options: on_layer, on_router, loop; see `run_unrolled`.

    Returns:
      The output of the final norm [B, T, D], and what `run_unrolled` gives.

    Raises:
      UserError: inputs, positions or segment_ids of another shape or type.
    """
    check_inputs(config, inputs)
    context.check(*inputs.shape[:2])
    embedding = embed(params, config, inputs, context)
    run = run_unrolled(params, config, embedding, with_offset(config, context, inputs.shape[1]), **options)
    return context.numerics.norm(partial(norm, params.get("final_norm", {}), config), run.stream), run


def forward(
    params: Params, config: ModelConfig, inputs: Inputs, context: Context = _NO_CONTEXT
) -> tuple[Outputs, Statistics]:
    """The whole model; see `final_stream` for arguments and errors.

    Returns:
      float32 logits [B, T, vocab_size] or vectors [B, T, vector_dim], and the Statistics of the pass.
    """
    final, run = final_stream(params, config, inputs, context)
    outputs = unembed(params, config, final, context)
    if config.inputs == "tokens":
        outputs = outputs[..., : config.vocab_size]
    kinds = ("attention_norm", "attention_output", "mlp_norm", "mlp_output", "layer_output")
    taps = {kind: [getattr(layer, kind) for layer in run.layers] for kind in kinds} | {"final_norm": [final]}
    return outputs, Statistics([layer.attention for layer in run.layers], run.routers, taps)


class Decoder(nnx.Module):
    """A decoder of any preset: `Decoder(ModelConfig(preset="oasis", vocab_size=258), rngs=nnx.Rngs(0))`.

    Raises UserError for a config that cannot be built. Needs no mesh; parameters carry logical axes and roles as
    metadata.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        check_model(config)
        self.config: ModelConfig = config
        self.embedding: ParameterModule = ParameterModule(embedding_parameters(config), rngs=rngs)
        self.head: ParameterModule = ParameterModule(head_parameters(config), rngs=rngs)
        self.layers: nnx.List[Layer] = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm: Norm = Norm(config, config.width, rngs=rngs)
        # Last, so that every wiring starts from the same values elsewhere.
        self.routers: nnx.List[Router] = nnx.List([Router(config, rngs=rngs) for _ in schedule(config).routers])

    def parameters(self) -> dict[str, Any]:
        """The parameters as nested dicts, layer by layer; see `oasis_jax.model.layout`."""
        return nnx.to_pure_dict(nnx.state(self))

    def __call__(self, inputs: Inputs, context: Context = _NO_CONTEXT) -> tuple[Outputs, Statistics]:
        """See `forward`."""
        return forward(self.parameters(), self.config, inputs, context)


def with_parameters(config: ModelConfig, params: Mapping[str, Any]) -> Decoder:
    """The decoder with these parameters, layer by layer, as `Decoder.parameters` gives them."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def initial_params(config: ModelConfig, key: Array) -> dict:
    """The stacked parameters of `Decoder(config, rngs=nnx.Rngs(params=key))`, bit for bit when compiled.

    All layers are drawn at once: the program does not grow with depth, and a second copy never exists.

    Raises:
      UserError: a config that cannot be built.
    """
    check_model(config)
    rngs = nnx.Rngs(params=key)
    parts = {
        "embedding": _pure(ParameterModule(embedding_parameters(config), rngs=rngs)),
        "head": _pure(ParameterModule(head_parameters(config), rngs=rngs)),
        "layers": _draw(Layer, config.num_layers, config, rngs),
    }
    parts["final_norm"] = _pure(Norm(config, config.width, rngs=rngs))
    if schedule(config).routers:
        parts["routers"] = _draw(Router, len(schedule(config).routers), config, rngs)
    return {name: group for name, group in parts.items() if group}


def _pure(module: nnx.Module) -> dict:
    return nnx.to_pure_dict(nnx.state(module))


def _draw(make: Callable[..., nnx.Module], count: int, config: ModelConfig, rngs: nnx.Rngs) -> dict:
    """The stacked parameters of modules that were made one after the other, each with the next keys of `rngs`."""
    stream = rngs.params
    first = stream.count[...]
    make(config, rngs=rngs)  # says how many keys one takes
    keys = stream.count[...] - first

    def one(index):
        own = nnx.Rngs(params=stream.key[...])
        own.params.count[...] = first + index * keys
        return _pure(make(config, rngs=own))

    stream.count[...] = first + count * keys
    return jax.vmap(one)(jnp.arange(count, dtype=first.dtype))


def parameter_shapes(config: ModelConfig) -> dict:
    """Shape and type of every stacked parameter."""
    return jax.eval_shape(lambda: initial_params(config, jax.random.key(0)))


def parameter_specs(config: ModelConfig) -> dict[str, Any]:
    """The ParameterSpec of every parameter, of one layer and one router for all of them; groups without any are left
    out.
    """
    layer_norm = norm_parameters(config, config.width)
    specs = {
        "embedding": embedding_parameters(config),
        "head": head_parameters(config),
        "layers": {
            "attention_norm": layer_norm,
            "attention": attention_parameters(config),
            "mlp_norm": layer_norm,
            "mlp": mlp_parameters(config),
        },
        "routers": router_parameters(config) if schedule(config).routers else {},
        "final_norm": layer_norm,
    }
    specs["layers"] = {name: group for name, group in specs["layers"].items() if group}
    return {name: group for name, group in specs.items() if group}


def map_specs(function: Callable[[ParameterSpec, bool], Any], config: ModelConfig) -> dict[str, Any]:
    """function(spec, stacked) of every parameter, in the structure of stacked parameters; stacked: with an axis of
    layers.
    """
    is_spec = lambda x: isinstance(x, ParameterSpec)
    return {
        name: jax.tree.map(lambda spec, name=name: function(spec, name in STACKS), group, is_leaf=is_spec)
        for name, group in parameter_specs(config).items()
    }


def parameter_axes(config: ModelConfig) -> dict[str, Any]:
    """The logical axes of every stacked parameter; that of the layers is never split."""
    return map_specs(lambda spec, stacked: (None, *spec.axes) if stacked else spec.axes, config)


def parameter_roles(config: ModelConfig) -> dict[str, Any]:
    """The role of every stacked parameter, a name of `oasis_jax.model.parameters.ROLES`."""
    return map_specs(lambda spec, stacked: spec.role, config)
