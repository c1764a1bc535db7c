"""Depth and tokens together: the mass q(i, j) = alpha_i p_i(j) that a token gives to token j of source i (OASIS,
appendix D.4).

q is never formed. With p_i the attention of the layer that source i stems from, one head at a time, the chain rule
gives leakage sum_i alpha_i L(p_i), concentration max_i alpha_i C(p_i) and negative entropy sum alpha log alpha + sum_i
alpha_i E(p_i).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation.bootstrap import Estimate
from oasis_jax.evaluation.evaluator import Evaluator, Reading, Rows, Value
from oasis_jax.evaluation.measures.attention_maps import negative_entropy
from oasis_jax.evaluation.measures.order_statistics import kth_smallest
from oasis_jax.evaluation.measures.probabilities import ATTENDING, PREFIX
from oasis_jax.evaluation.measures.values import norm
from oasis_jax.model.statistics import RouterStatistics
from oasis_jax.model.wiring import router_names, sublayer_names

NEAR_NO_OP = 0.25  # quantile of the heads' output norms below which a head does next to nothing
SINK_SETS = {"first_token": 1, "prefix_4": PREFIX}  # a set is the first so many keys

_SOURCE = "OASIS, arXiv 2605.17887, appendix D.4"
_APPLIES = "models of this library whose depth sources each stem from one attention layer"
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
    "leakage_first_token": "mass on the first token, sum_i alpha_i p_i(0); the first query left out",
    "leakage_prefix_4": f"mass on the first {PREFIX} tokens; queries inside the prefix left out",
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
    """For every router the layers that its sources after the embedding stem from; None where a block mixes several
    layers.
    """
    names, sublayers = router_names(config), sublayer_names(config)
    if config.wiring == "cumulative":
        return {name: [*range(index // 2), *[index // 2] * (index % 2 + 1)] for index, name in enumerate(names)}
    count = config.blocks or len(sublayers)
    size = len(sublayers) // count
    found = {}
    for index, name in enumerate(names):
        blocks: dict[int, set[int]] = {}
        for sublayer in range(index + 1):
            blocks.setdefault(min(sublayer // size, count - 1), set()).add(sublayer // 2)
        if any(len(layers) > 1 for layers in blocks.values()):
            return None
        found[name] = [min(layers) for layers in blocks.values()]
    return found


class _Layer(NamedTuple):
    """One layer's attention, [B, N, T] each: leakage by sink set, concentration, negative entropy with the
    null, head output norm.
    """

    leakage: dict[str, Array]
    concentration: Array
    negative_entropy: Array
    norm: Array


def _layers(reading: Reading) -> list[_Layer]:
    found = []
    for layer, p in zip(reading.attention, reading.probabilities):
        leakage = {"first_token": layer.first_token_mass, "prefix_4": p.prefix_mass}
        norms = norm(layer.head_output).transpose(0, 2, 1)
        found.append(_Layer(leakage, p.max_probability, negative_entropy(p, layer.null_mass), norms))
    return found


def _combine(
    weights: Float[Array, "I B 1 T"], null: Float[Array, "B 1 T"], sources: list[_Layer], rest
) -> dict[str, Array]:
    """The measures [B, N, T] of some sources; `rest` is the weight of an outcome of its own, the embedding's
    token, or None.
    """

    def total(values: list[Array]) -> Array:
        return sum(weight * value for weight, value in zip(weights, values))

    peaks = [weight * source.concentration for weight, source in zip(weights, sources)]
    entropy = (
        xlogy(weights, weights).sum(0) + xlogy(null, null) + total([source.negative_entropy for source in sources])
    )
    if rest is not None:
        peaks, entropy = [*peaks, jnp.broadcast_to(rest, peaks[0].shape)], entropy + xlogy(rest, rest)
    found = {f"leakage_{name}": total([source.leakage[name] for source in sources]) for name in SINK_SETS}
    return found | {"concentration": jnp.stack(peaks).max(0), "negative_entropy": entropy}


def _of_router(router: RouterStatistics, sources: list[_Layer]) -> dict[str, tuple[dict[str, Array], Array]]:
    """Variant -> its measures [B, N, T] and whether a query counts [B, 1, T]."""
    alpha = jnp.moveaxis(router.weights, -1, 0)[:, :, None]  # [I + 1, B, 1, T]
    embedding, alpha, null = alpha[0], alpha[1:], router.null_mass[:, None]
    reads = 1 - embedding > ATTENDING
    rest = jnp.where(reads, 1 - embedding, 1.0)
    return {
        "identity_outcome": (_combine(alpha, null, sources, embedding), jnp.ones_like(reads)),
        "attention_only_conditional": (_combine(alpha / rest, null / rest, sources, None), reads),
    }


def read(reading: Reading) -> Rows | None:
    """ "sum/..." and "count/..." of every measure, variant and filter, over heads and queries, per router [B, R]."""
    places = source_layers(reading.config) if reading.config and reading.statistics.routers else None
    if places is None or reading.probabilities is None or reading.outputs.shape[1] < 2:
        return None
    layers = _layers(reading)
    norms = {name: jnp.stack([layers[i].norm for i in set(sources)]).max(0) for name, sources in places.items()}
    pooled = jnp.stack(list(norms.values()), 1)  # [B, R, N, T]
    pooled = pooled.reshape(pooled.shape[0], -1)
    threshold = kth_smallest(pooled, int(NEAR_NO_OP * (pooled.shape[1] - 1)))[:, None, None]
    by_router: dict[str, list[Array]] = {}
    for name, sources in places.items():
        near_no_op = norms[name] <= threshold
        for variant, (measures, counted) in _of_router(
            reading.statistics.routers[name], [layers[i] for i in sources]
        ).items():
            for measure, values in measures.items():
                prefix = SINK_SETS.get(measure.removeprefix("leakage_"), 1)
                outside = counted & (jnp.arange(values.shape[-1]) >= prefix)
                for suffix, mask in (("", jnp.ones_like(near_no_op)), ("_near_no_op", near_no_op)):
                    chosen = outside & mask
                    by_router.setdefault(f"sum/{measure}_{variant}{suffix}", []).append(
                        jnp.where(chosen, values, 0.0).sum((1, 2))
                    )
                    by_router.setdefault(f"count/{measure}_{variant}{suffix}", []).append(chosen.sum((1, 2)))
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


JOINT = Evaluator(read, finish, DEFINITIONS)
