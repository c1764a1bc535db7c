"""Native Flax Linen modules over the same functions as the NNX modules, with the same parameters in the same shapes."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from oasis_jax.config import AttentionConfig, ModelConfig, NormConfig, RouterConfig
from oasis_jax.model.attention import Constrain, attention, attention_parameters
from oasis_jax.model.decoder import Inputs, Outputs, check_model, decode, ends_parameters
from oasis_jax.model.mlp import mlp, mlp_parameters
from oasis_jax.model.norms import norm, norm_parameters
from oasis_jax.model.numerics import FLOAT, Numerics
from oasis_jax.model.parameters import ParameterSpec
from oasis_jax.model.remat import POLICIES
from oasis_jax.model.router import Evidence, Sources, route, router_parameters
from oasis_jax.model.statistics import AttentionStatistics, RouterStatistics, Statistics
from oasis_jax.model.wiring import router_names


def _declare(module: nn.Module, specs: Mapping[str, ParameterSpec]) -> dict[str, Array]:
    return {name: module.param(name, spec.init, spec.shape, jnp.float32) for name, spec in specs.items()}


class Norm(nn.Module):
    """`oasis_jax.model.norms.norm` over `width` channels."""

    config: NormConfig
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return norm(_declare(self, norm_parameters(self.config, self.width)), self.config, x)


class Attention(nn.Module):
    """`oasis_jax.model.attention.attention`; see there for the options and what comes back."""

    config: AttentionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], **options) -> tuple[Float[Array, "B T D"], AttentionStatistics]:
        return attention(_declare(self, attention_parameters(self.config)), self.config, x, **options)


class Router(nn.Module):
    """`oasis_jax.model.router.route`."""

    config: RouterConfig

    @nn.compact
    def __call__(
        self, sources: Sources, evidence: Evidence, **options
    ) -> tuple[Float[Array, "B T D"], RouterStatistics]:
        return route(_declare(self, router_parameters(self.config)), self.config, sources, evidence, **options)


class MLP(nn.Module):
    """`oasis_jax.model.mlp.mlp`."""

    width: int
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], **options) -> Float[Array, "B T D"]:
        return mlp(_declare(self, mlp_parameters(self.width, self.hidden)), x, **options)


class _Ends(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        return _declare(self, ends_parameters(self.config))


class Layer(nn.Module):
    """One attention and one MLP, each with its norm."""

    config: ModelConfig

    def setup(self):
        config = self.config
        self.attention_norm = Norm(config, config.width)
        self.attention = Attention(config)
        self.mlp_norm = Norm(config, config.width)
        self.mlp = MLP(config.width, config.mlp_size)


class Decoder(nn.Module):
    """The decoder of `oasis_jax.model.decoder`; see there."""

    config: ModelConfig

    def setup(self):
        config = self.config
        check_model(config)
        self.ends = _Ends(config)
        self.layers = [Layer(config) for _ in range(config.num_layers)]
        self.routers = [Router(config) for _ in router_names(config)]
        self.final_norm = Norm(config, config.width)

    def __call__(
        self,
        inputs: Inputs,
        *,
        segment_ids: Array | None = None,
        constrain: Constrain | None = None,
        numerics: Numerics = FLOAT,
    ) -> tuple[Outputs, Statistics]:
        def call(function, layer, x):
            name = self.config.remat if numerics is FLOAT else "none"
            return (function if name == "none" else nn.remat(function, policy=POLICIES[name]))(layer, x)

        return decode(
            self.config,
            inputs,
            ends=self.ends(),
            layers=self.layers,
            routers=dict(zip(router_names(self.config), self.routers)),
            final_norm=self.final_norm,
            segment_ids=segment_ids,
            constrain=constrain,
            call=call,
            numerics=numerics,
        )


def params_from_nnx(parameters: Mapping) -> dict:
    """The Linen `params` of NNX parameters (`nnx.to_pure_dict(nnx.state(model))`): list entries become
    `layers_0` and so on.
    """
    renamed = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping) and value and all(isinstance(key, int) for key in value):
            renamed |= {f"{name}_{index}": params_from_nnx(item) for index, item in value.items()}
        elif isinstance(value, Mapping):
            renamed[name] = params_from_nnx(value)
        else:
            renamed[name] = jnp.asarray(value)
    return renamed


def params_to_nnx(parameters: Mapping) -> dict:
    """The inverse of `params_from_nnx`, for the parameters of a `Decoder`."""
    nested: dict = {}
    for name, value in parameters.items():
        stem, _, index = name.rpartition("_")
        if stem in ("layers", "routers") and index.isdigit():
            nested.setdefault(stem, {})[int(index)] = value
        else:
            nested[name] = value
    return nested
