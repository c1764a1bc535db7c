"""The plain definition of depth routing, differentiated by JAX."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.depth_route.base import KEY_NORM_EPSILON, MAX_SCORE, DepthRoute, RouteInputs, lifted, score_shift


def depth_scores(inputs: RouteInputs) -> tuple[Float[Array, "L B T"], Float[Array, "L B T D"], Bool[Array, "L 1 1"]]:
    """The clamped scores of all sources, the sources themselves, stacked in float32 or better and 0 where they are
    dead, and which ones are live.
    """
    wide, live = inputs.wide, inputs.live
    sources = inputs.sources if hasattr(inputs.sources, "ndim") else jnp.stack(inputs.sources)
    sources = sources.astype(wide)
    live = jnp.ones((len(sources), 1, 1), bool) if live is None else live[:, None, None]
    sources = jnp.where(live[..., None], sources, 0.0)
    keys = sources
    if inputs.key_norm_scale is not None:
        mean_square = jnp.mean(sources * sources, axis=-1, keepdims=True)
        keys = sources * lax.rsqrt(mean_square + KEY_NORM_EPSILON) * lifted(inputs.key_norm_scale.astype(wide), sources)
    products = "D,LBTD->LBT" if inputs.query.ndim == 1 else "BTD,LBTD->LBT"
    scores = jnp.einsum(products, inputs.query.astype(wide), keys, precision=lax.Precision.HIGHEST) * inputs.score_scale
    limit = jnp.asarray(MAX_SCORE, wide)
    return lax.clamp(-limit, scores + score_shift(inputs), limit), sources, live


def depth_route_reference(inputs: RouteInputs) -> DepthRoute:
    """Depth routing in float32 or better over stacked sources. In plain JAX, for a query [B, T, D] and all sources
    live:

        keys = sources  # or normalized:
        keys = sources * lax.rsqrt(jnp.mean(sources**2, -1, keepdims=True) + 1e-6) * key_norm_scale
        scores = score_scale * jnp.einsum("BTD,LBTD->LBT", query, keys) + bias
        scores = jnp.clip(scores - coupling * (null_evidence - null_evidence.mean(0)), -50, 50)
        total = jnp.exp(null_logit) + jnp.exp(scores).sum(0)
        weights = jnp.exp(scores) / total
        output = jnp.einsum("LBT,LBTD->BTD", weights, sources)
        null_mass = jnp.exp(null_logit) / total

    The code below subtracts the maximum first and keeps whatever lies in dead sources out of values and gradients.
    """
    inputs = inputs.trimmed()
    scores, sources, live = depth_scores(inputs)
    b = inputs.null_logit.astype(inputs.wide)
    top = lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=0, initial=-MAX_SCORE, where=live), b))
    e = jnp.where(live, jnp.exp(jnp.where(live, scores - top[None], 0.0)), 0.0)
    null = jnp.exp(b - top)
    total = e.sum(0) + null
    weights = e / jnp.where(total == 0.0, 1.0, total)[None]
    output = jnp.einsum("LBT,LBTD->BTD", weights, sources, precision=lax.Precision.HIGHEST)
    null_mass = null / jnp.where(total == 0.0, 1.0, total)
    return DepthRoute(output.astype(inputs.dtype), jnp.moveaxis(weights, 0, -1), null_mass)
