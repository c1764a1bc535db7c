"""Depth and tokens together: the mass q(i, j) = alpha_i p_i(j) that a token gives to token j of source i (OASIS,
appendix D.4).

q is never formed. With p_i the attention of the layer that source i stems from, one head at a time, the chain rule
gives leakage sum_i alpha_i L(p_i), concentration max_i alpha_i C(p_i) and negative entropy sum alpha log alpha + sum_i
alpha_i E(p_i).
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation.bootstrap import Estimate
from oasis_jax.evaluation.evaluator import Evaluator, FinalReading, LayerReading, Rows, Value
from oasis_jax.evaluation.measures.attention_maps import negative_entropy
from oasis_jax.evaluation.measures.order_statistics import kth_smallest
from oasis_jax.evaluation.measures.probabilities import ATTENDING, PREFIX
from oasis_jax.evaluation.measures.values import norm
from oasis_jax.model.statistics import RouterStatistics
from oasis_jax.model.wiring import schedule

NEAR_NO_OP = 0.25  # quantile of the heads' output norms below which a head does next to nothing
SINK_SETS = {"first_token": 1, "prefix_4": PREFIX}  # a set is the first so many keys of a document

_SOURCE = "OASIS, arXiv 2605.17887, appendix D.4"
_APPLIES = (
    "models of this library whose depth sources each stem from one attention layer and whose depth weights and null "
    "sum to 1"
)
_Q = "q(i, j) = alpha_i p_i(j), every router, head and query"
_VARIANTS = {
    "identity_outcome": "the embedding's p_0(j | t) is 1 at j = t",
    "attention_only_conditional": f"the embedding left out, alpha_i / (1 - alpha_0) where 1 - alpha_0 > {ATTENDING:g}",
}
_FILTERS = {
    "": "all of them",
    "_near_no_op": "those whose head output norm, the largest over the sources' layers, is not above the "
    f"{NEAR_NO_OP} quantile, "
    "pooled over the routers, heads and queries of a sequence",
}
_MEASURES = {
    "leakage_first_token": "mass on the document's first token, sum_i alpha_i p_i(0); its first query left out",
    "leakage_prefix_4": f"mass on the document's first {PREFIX} tokens; queries inside the prefix left out",
    "concentration": "largest q; the first query left out",
    "negative_entropy": "sum of q log q in nats, the depth null and every token null outcomes too; the first query "
    "left out",
}


def _definitions() -> dict[str, dict[str, str]]:
    common = {"source": _SOURCE, "applies_to": _APPLIES}
    found = {}
    for measure, what in _MEASURES.items():
        for variant, how in _VARIANTS.items():
            for suffix, which in _FILTERS.items():
                average = f"mean over routers, heads, queries and sequences, of {which}"
                found[f"joint_{measure}_{variant}{suffix}"] = {
                    "tensor": f"{_Q}: {what}; {how}",
                    "average": average,
                    **common,
                }
            average = "mean over heads, queries and sequences; one value a router"
            found[f"joint_{measure}_{variant}_by_router"] = {
                "tensor": f"{_Q}: {what}; {how}",
                "average": average,
                **common,
            }
    coverage = {
        "tensor": "attention layers that a router's sources stem from",
        "average": "share of all attention layers",
    }
    return found | {"joint_layer_coverage": coverage | common}


DEFINITIONS = _definitions()


def source_layers(config: ModelConfig) -> dict[str, list[int]] | None:
    """For every router the layers that its sources after the embedding stem from; None where there is no router, a
    source mixes several layers, or weights are no shares of anything.
    """
    steps = [step for step in schedule(config).steps if step.routers]
    if (
        not steps
        or config.depth_normalizer == "sigmoid"
        or any(len(source.layers) > 1 for step in steps for source in step.sources)
    ):
        return None
    layers = lambda step: [layer for source in step.sources for layer in source.layers]
    return {router: layers(step) for step in steps for router in step.routers}


def read_layer(reading: LayerReading) -> Rows:
    """What the routers need to know of a layer's attention, [B, N, T] each: leakage by sink set, concentration,
    negative entropy with the null, head output norm.
    """
    p, attention = reading.probabilities, reading.attention
    if p is None or reading.tokens.length < 2:
        return {}
    return {
        "leakage_first_token": attention.first_token_mass,
        "leakage_prefix_4": p.prefix_mass,
        "concentration": p.max_probability,
        "negative_entropy": negative_entropy(p, attention.null_mass),
        "norm": norm(attention.head_output).transpose(0, 2, 1),
    }


def read_router(router: RouterStatistics) -> Rows:
    """Its weights [B, T, I] and null mass [B, T]."""
    return {"weights": router.weights, "null": router.null_mass}


def _combine(
    alpha: Float[Array, "B T I"], null: Float[Array, "B T"], layers: Rows, places: Sequence[int], rest
) -> Rows:
    """The measures [B, N, T] of sources that stem from the layers `places`.

    Args:
      layers: [B, L, N, T] of the layers in `places`, each once, in their order.
      rest: [B, T], the weight of an outcome of its own, the embedding's token; None: there is none.
    """
    own = [[i for i, place in enumerate(places) if place == layer] for layer in dict.fromkeys(places)]
    mass = jnp.stack([alpha[..., sources].sum(-1) for sources in map(np.array, own)], 1)[:, :, None]  # [B, L, 1, T]
    largest = jnp.stack([alpha[..., sources].max(-1) for sources in map(np.array, own)], 1)[:, :, None]
    concentration = (largest * layers["concentration"]).max(1)
    entropy = (xlogy(alpha, alpha).sum(-1) + xlogy(null, null))[:, None] + (mass * layers["negative_entropy"]).sum(1)
    if rest is not None:
        concentration = jnp.maximum(concentration, rest[:, None])
        entropy += xlogy(rest, rest)[:, None]
    leakage = {f"leakage_{name}": (mass * layers[f"leakage_{name}"]).sum(1) for name in SINK_SETS}
    return leakage | {"concentration": concentration, "negative_entropy": entropy}


def _of_router(router: Rows, layers: Rows, places: Sequence[int]) -> dict[str, tuple[Rows, Array]]:
    """Variant -> its measures [B, N, T] and whether a query counts [B, 1, T]."""
    embedding, alpha, null = router["weights"][..., 0], router["weights"][..., 1:], router["null"]
    reads = 1 - embedding > ATTENDING
    rest = jnp.where(reads, 1 - embedding, 1.0)
    conditional = _combine(alpha / rest[..., None], null / rest, layers, places, None)
    return {
        "identity_outcome": (_combine(alpha, null, layers, places, embedding), jnp.ones_like(reads)[:, None]),
        "attention_only_conditional": (conditional, reads[:, None]),
    }


def combine(layers: Rows, routers: dict[str, Rows], reading: FinalReading) -> Rows:
    """ "sum/..." and "count/..." of every measure, variant and filter, over heads and queries, per router [B, R]."""
    places = source_layers(reading.config) if reading.config and layers else None
    if places is None:
        return {}
    chosen = {name: np.array(list(dict.fromkeys(sources))) for name, sources in places.items()}
    norms = {name: layers["norm"][:, found].max(1) for name, found in chosen.items()}
    pooled = jnp.stack(list(norms.values()), 1)  # [B, R, N, T]
    rank = int(NEAR_NO_OP * (math.prod(pooled.shape[1:]) - 1))
    threshold = kth_smallest(pooled, rank, (1, 2, 3))[:, None, None]
    by_router: dict[str, list[Array]] = {}
    for name, sources in places.items():
        own = {measure: values[:, chosen[name]] for measure, values in layers.items()}
        near_no_op = norms[name] <= threshold
        for variant, (measures, counted) in _of_router(routers[name], own, sources).items():
            for measure, values in measures.items():
                prefix = SINK_SETS.get(measure.removeprefix("leakage_"), 1)
                outside = counted & (reading.tokens.place[:, None] >= prefix)
                for suffix, mask in (("", jnp.ones_like(near_no_op)), ("_near_no_op", near_no_op)):
                    place, queries = f"{measure}_{variant}{suffix}", outside & mask
                    total = jnp.where(queries, values, 0.0).sum((1, 2))
                    by_router.setdefault(f"sum/{place}", []).append(total)
                    by_router.setdefault(f"count/{place}", []).append(queries.sum((1, 2)))
    return {name: jnp.stack(values, 1) for name, values in by_router.items()}


def finish(rows: dict[str, np.ndarray], config: ModelConfig) -> dict[str, Value | Estimate]:
    """Sums over routers and sequences before dividing."""
    found = {}
    for name in (name.removeprefix("sum/") for name in rows if name.startswith("sum/")):
        totals, counts = rows[f"sum/{name}"], rows[f"count/{name}"]
        found[f"joint_{name}"] = Estimate(totals.sum(1, keepdims=True), counts.sum(1, keepdims=True))
        if not name.endswith("_near_no_op"):
            sums, numbers = totals.sum(0).tolist(), counts.sum(0).tolist()
            found[f"joint_{name}_by_router"] = [
                total / number if number else None for total, number in zip(sums, numbers)
            ]
    read_layers = {layer for layers in source_layers(config).values() for layer in layers}
    return found | {"joint_layer_coverage": len(read_layers) / config.num_layers}


JOINT = Evaluator(layer=read_layer, router=read_router, combine=combine, finish=finish, definitions=DEFINITIONS)
