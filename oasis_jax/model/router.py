"""Depth routing: which earlier layers a sublayer reads, token by token, steered by the null mass of their attention."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from oasis_jax.config import RouterConfig
from oasis_jax.model.attention import backend
from oasis_jax.model.context import Context
from oasis_jax.model.depth_weights import NULL_LOGITS, PLAIN, depth_operator
from oasis_jax.model.norms import rms_norm
from oasis_jax.model.numerics import FLOAT, Numerics
from oasis_jax.model.parameters import ParameterModule, Parameters, ParameterSpec, constant, matrix
from oasis_jax.model.statistics import RouterStatistics

_NO_CONTEXT = Context()

Sources = Sequence[Float[Array, "B T D"]]
Evidence = Sequence[Float[Array, "B T"]]

MAX_BETA = 10.0
_BETA_RAW_START = -5.0


def key_width(config: RouterConfig) -> int:
    """The size of the projected router's queries and keys."""
    return max(config.width // 4, 64)


def router_parameters(config: RouterConfig) -> dict[str, ParameterSpec]:
    """The parameters of one router: of `projected` two projections and a recency bias, of `static` a query and a key
    norm, of `qkv` a query; with coupling its strength, with an alpha gate the gate. Uniform weights need neither
    query nor key.
    """
    width = config.width
    projection = matrix((width, key_width(config)), ("embed", None), width, "router_matrix")
    if config.router_init_std:
        projection = projection._replace(init=jax.nn.initializers.normal(config.router_init_std))
    recency = constant((), config.recency_bias_init, "router")
    specs = {
        "projected": {"query": projection, "key": projection, "recency_bias": recency},
        "static": {"query": constant((width,), 0.0, "router"), "key_norm": constant((width,), 1.0, "router")},
        "qkv": {"query": constant((width,), 0.0, "router")},
    }[config.router]
    specs = {} if config.depth_normalizer == "uniform" else specs
    learned = config.coupling and not config.fixed_beta
    specs |= {"beta_raw": constant((), _BETA_RAW_START, "router")} if learned else {}
    return specs | ({"alpha": constant((), 0.0, "router")} if config.alpha_gate else {})


def coupling_strength(beta_raw: Float[Array, "..."]) -> Float[Array, "..."]:
    """beta = min(softplus(beta_raw), 10) (OASIS, arXiv 2605.17887)."""
    return jnp.minimum(jax.nn.softplus(beta_raw), MAX_BETA)


def router_beta(parameters: Parameters, config: RouterConfig) -> Float[Array, ""]:
    """The coupling strength of a router: learned, or the number that the config fixes."""
    return jnp.asarray(config.fixed_beta) if config.fixed_beta else coupling_strength(parameters["beta_raw"])


def projected_query(
    query: Float[Array, "D C"], key: Float[Array, "D C"], last: Float[Array, "B T D"], numerics: Numerics = FLOAT
) -> Float[Array, "B T D"]:
    """u = W_k^T (W_q v_last): the key projection absorbed into the query, so that scores are u . v_i and no
    key is ever made.
    """
    short = numerics.einsum("query", "BTD,DC->BTC", last, query.astype(last.dtype))
    return numerics.einsum("key", "BTC,DC->BTD", short, key.astype(last.dtype))


def route(
    parameters: Parameters,
    config: RouterConfig,
    sources: Sources,
    evidence: Evidence,
    context: Context = _NO_CONTEXT,
) -> tuple[Float[Array, "B T D"], RouterStatistics]:
    """Weighs the sources of every token and sums them (OASIS, arXiv 2605.17887; static queries: AttnRes, arXiv
    2603.15031).

    Args:
      parameters: as `router_parameters(config)` lists them.
      config: a RouterConfig, or a ModelConfig.
      sources: L arrays [B, T, D], oldest first.
      evidence: L arrays [B, T], the null mass of each source's attention, mean over heads; 0 for the embedding.
      context: see Context; scores and weights stay float whatever its numerics.

    Returns:
      [B, T, D] and the RouterStatistics.
    """
    if config.router == "qkv":  # what is scored and what is summed is normalized alike, without a gain
        sources = [rms_norm(source, jnp.ones(source.shape[-1:], jnp.float32)) for source in sources]
    beta = router_beta(parameters, config) if config.coupling else None
    arguments = query_arguments(parameters, config, sources[-1], len(sources), numerics=context.numerics)

    def run(sources, evidence):
        coupled = dict(null_evidence=evidence, coupling=beta) if config.coupling else {}
        route = depth_operator(config.depth_normalizer).route
        return route(sources, **arguments, **coupled, **route_options(config, context))

    mixture, weights, null_mass = context.numerics.route(run, sources, evidence)
    output = finish(parameters, config, mixture, sources[-1], len(sources))
    if config.alpha_gate:  # what each source adds to the output, which the measures read
        alpha = parameters["alpha"]
        newest = jax.nn.one_hot(len(sources) - 1, len(sources), dtype=weights.dtype)
        weights, null_mass = newest + alpha * (weights - newest), alpha * null_mass
    return context.numerics.tap("mixture", output), RouterStatistics(weights, null_mass, beta)


def finish(
    parameters: Parameters,
    config: RouterConfig,
    mixture: Float[Array, "B T D"],
    newest: Float[Array, "B T D"],
    num_sources: int | Int[Array, ""],
) -> Float[Array, "B T D"]:
    """What is read in place of a router's mixture: with `sum_preserving` its multiple, with `alpha_gate` a step from
    the newest source towards it. Both let a router join a trained model without changing it.
    """
    if config.sum_preserving:
        mixture = mixture * jnp.asarray(num_sources, mixture.dtype)
    if config.alpha_gate:
        mixture = newest + parameters["alpha"].astype(mixture.dtype) * (mixture - newest)
    return mixture


def query_arguments(
    parameters: Parameters,
    config: RouterConfig,
    last: Float[Array, "B T D"],
    num_sources: int | Int[Array, ""],
    capacity: int | None = None,
    *,
    numerics: Numerics = FLOAT,
) -> dict[str, Array]:
    """The arguments of `depth_route` by which a router scores its sources: query, and bias or key_norm_scale.

    Args:
      last: the newest source.
      num_sources: how many there are.
      capacity: how many places for sources, where that is more.
    """
    if config.depth_normalizer == "uniform":
        return dict(query=jnp.zeros(last.shape[-1:], jnp.promote_types(last.dtype, jnp.float32)))
    if config.router == "static":
        return dict(query=parameters["query"], key_norm_scale=parameters["key_norm"])
    if config.router == "qkv":
        return dict(query=parameters["query"])
    query = projected_query(parameters["query"], parameters["key"], last, numerics)
    recency = jnp.arange(capacity or num_sources, dtype=jnp.promote_types(query.dtype, jnp.float32)) / jnp.maximum(
        num_sources - 1, 1
    )
    return dict(query=query, bias=parameters["recency_bias"] * recency)


def route_options(config: RouterConfig, context: Context) -> dict[str, Any]:
    """The arguments of the depth operator that are the same for every router of a model."""
    options = dict(
        score_scale=key_width(config) ** -0.5 if config.router == "projected" else 1.0,
        sharding=context.placement.routing,
    )
    if config.depth_normalizer in PLAIN:
        return options
    return options | dict(
        null_logit=NULL_LOGITS[config.depth_normalizer],
        implementation=backend("depth_route", config.depth_implementation),
    )


class Router(ParameterModule):
    """`route` with its parameters, as an NNX module: `Router(RouterConfig(width=256, router="static"), rngs=rngs)`."""

    def __init__(self, config: RouterConfig, *, rngs: nnx.Rngs):
        super().__init__(router_parameters(config), rngs=rngs)
        self.config = config

    def __call__(
        self, sources: Sources, evidence: Evidence, context: Context = _NO_CONTEXT
    ) -> tuple[Float[Array, "B T D"], RouterStatistics]:
        """See `route`."""
        return route(self.parameters, self.config, sources, evidence, context)
