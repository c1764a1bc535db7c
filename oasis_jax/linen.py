"""Native Flax Linen modules over the same functions as the NNX modules, with the same parameters in the same shapes.

`init` gives parameters with their logical axes, as `flax.linen.with_logical_partitioning` has them:
`flax.linen.get_partition_spec` reads them, `flax.linen.unbox` takes them off.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oasis_jax.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig, RouterConfig
from oasis_jax.model.attention import attention, attention_parameters
from oasis_jax.model.context import Context
from oasis_jax.model.decoder import check_model, forward
from oasis_jax.model.head import Inputs, Outputs, embedding_parameters, head_parameters
from oasis_jax.model.layout import STACKS
from oasis_jax.model.mlp import mlp, mlp_parameters
from oasis_jax.model.norms import norm, norm_parameters
from oasis_jax.model.parameters import ParameterSpec, with_initializers
from oasis_jax.model.router import Evidence, Sources, route, router_parameters
from oasis_jax.model.statistics import AttentionStatistics, RouterStatistics, Statistics
from oasis_jax.model.wiring import schedule

_NO_CONTEXT = Context()


def _declare(module: nn.Module, specs: Mapping[str, ParameterSpec], param_dtype: Any = jnp.float32) -> dict[str, Array]:
    """The parameters by name, each with its logical axes."""

    def declare(name: str, spec: ParameterSpec) -> Array:
        return module.param(name, nn.with_logical_partitioning(spec.init, spec.axes), spec.shape, param_dtype)

    return {name: declare(name, spec) for name, spec in specs.items()}


class Norm(nn.Module):
    """`oasis_jax.model.norms.norm` over `width` channels."""

    config: NormConfig
    width: int

    def setup(self) -> None:
        self.parameters: dict[str, Array] = _declare(self, norm_parameters(self.config, self.width))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return norm(self.parameters, self.config, x)


class Attention(nn.Module):
    """`oasis_jax.model.attention.attention`; the fields are those of the NNX module `oasis_jax.Attention`."""

    config: AttentionConfig
    kv_width: int | None = None
    kernel_init: Callable[..., Array] | None = None
    bias_init: Callable[..., Array] | None = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        specs = attention_parameters(self.config, self.kv_width)
        self.parameters: dict[str, Array] = _declare(
            self, with_initializers(specs, self.kernel_init, self.bias_init), self.param_dtype
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context = _NO_CONTEXT,
        *,
        inputs_kv: Float[Array, "B S C"] | None = None,
        kv_segment_ids: Int[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], AttentionStatistics]:
        given = dict(inputs_kv=inputs_kv, kv_segment_ids=kv_segment_ids)
        return attention(self.parameters, self.config, x, context, **given)


class Router(nn.Module):
    """`oasis_jax.model.router.route`."""

    config: RouterConfig

    def setup(self) -> None:
        self.parameters: dict[str, Array] = _declare(self, router_parameters(self.config))

    def __call__(
        self, sources: Sources, evidence: Evidence, context: Context = _NO_CONTEXT
    ) -> tuple[Float[Array, "B T D"], RouterStatistics]:
        return route(self.parameters, self.config, sources, evidence, context)


class MLP(nn.Module):
    """`oasis_jax.model.mlp.mlp`."""

    config: MLPConfig

    def setup(self) -> None:
        self.parameters: dict[str, Array] = _declare(self, mlp_parameters(self.config))

    def __call__(self, x: Float[Array, "B T D"], context: Context = _NO_CONTEXT) -> Float[Array, "B T D"]:
        return mlp(self.parameters, self.config, x, context)


class Layer(nn.Module):
    """The parameters of one attention and one MLP, each with its norm."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.attention_norm: Norm = Norm(config, config.width)
        self.attention: Attention = Attention(config)
        self.mlp_norm: Norm = Norm(config, config.width)
        self.mlp: MLP = MLP(config)

    @property
    def parameters(self) -> dict[str, Any]:
        """By sublayer and norm."""
        names = ("attention_norm", "attention", "mlp_norm", "mlp")
        return {name: getattr(self, name).parameters for name in names}


class _Table(nn.Module):
    """Parameters by a function of the config."""

    config: ModelConfig
    specs: Any

    def setup(self) -> None:
        self.parameters: dict[str, Array] = _declare(self, self.specs(self.config))


class Decoder(nn.Module):
    """The decoder of `oasis_jax.model.decoder`; see there."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        check_model(config)
        self.embedding: nn.Module = _Table(config, embedding_parameters)
        self.head: nn.Module = _Table(config, head_parameters)
        self.layers: list[Layer] = [Layer(config) for _ in range(config.num_layers)]
        self.routers: list[Router] = [Router(config) for _ in schedule(config).routers]
        self.final_norm: Norm = Norm(config, config.width)

    @property
    def parameters(self) -> dict[str, Any]:
        """Nested dicts, layer by layer, as `oasis_jax.Decoder.parameters` gives them."""
        params = {name: getattr(self, name).parameters for name in ("embedding", "head", "final_norm")}
        for name in STACKS:
            params[name] = {i: module.parameters for i, module in enumerate(getattr(self, name))}
        return params

    def __call__(self, inputs: Inputs, context: Context = _NO_CONTEXT) -> tuple[Outputs, Statistics]:
        """See `oasis_jax.model.decoder.forward`."""
        return forward(self.parameters, self.config, inputs, context)


def params_from_nnx(parameters: Mapping[Any, Any]) -> dict[str, Any]:
    """The Linen `params` of NNX parameters (`Decoder.parameters()`): entries of lists become `layers_0` and so on."""
    renamed = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping) and value and all(isinstance(key, int) for key in value):
            renamed |= {f"{name}_{index}": params_from_nnx(item) for index, item in value.items()}
        elif isinstance(value, Mapping):
            renamed[name] = params_from_nnx(value)
        else:
            renamed[name] = jnp.asarray(value)
    return renamed


def params_to_nnx(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `params_from_nnx`, for the parameters of a `Decoder`, with or without their logical axes."""
    nested: dict[str, Any] = {}
    for name, value in nn.unbox(parameters).items():
        stem, _, index = name.rpartition("_")
        if stem in STACKS and index.isdigit():
            nested.setdefault(stem, {})[int(index)] = value
        else:
            nested[name] = value
    return nested
