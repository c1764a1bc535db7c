"""Where the depth routers look: weights router by source, their null mass, entropy, depth sinks, and the coupling beta."""

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation.evaluator import Evaluator, Reading, Rows, Value
from oasis_jax.evaluation.sinks import EPSILON
from oasis_jax.stack import router_names, sublayer_names
from oasis_jax.statistics import RouterStatistics

MINIMUM_SOURCES = 3  # with two sources one of them always has weight 1/2: no sink to speak of

_ALPHA = "depth weights alpha of every router, token and source"
_BY_SOURCE = "mean over tokens and sequences; router x source, null where a router does not read a source"
_OASIS = "OASIS, arXiv 2605.17887"
_ROUTED = "models with depth routers"
_SINK = f"share of routers with at least {MINIMUM_SOURCES} sources in which the mean weight over tokens and sequences exceeds {EPSILON}"
DEFINITIONS = {
    "depth_weights": {"tensor": _ALPHA, "average": _BY_SOURCE, "source": _OASIS, "applies_to": _ROUTED},
    "depth_weight_variance": {
        "tensor": _ALPHA,
        "average": "variance over the tokens of a sequence, mean over sequences; router x source",
        "source": _OASIS,
        "applies_to": _ROUTED,
    },
    "depth_routers": {
        "tensor": "names of the routers, the rows of the matrices",
        "average": "none",
        "source": _OASIS,
        "applies_to": _ROUTED,
    },
    "depth_sources": {
        "tensor": "names of the sources, the columns of the matrices",
        "average": "none",
        "source": _OASIS,
        "applies_to": _ROUTED,
    },
    "depth_entropy": {
        "tensor": "entropy of alpha in nats, the depth null one of the outcomes",
        "average": "mean over tokens, sequences and routers",
        "source": _OASIS,
        "applies_to": _ROUTED,
    },
    "depth_max_weight": {
        "tensor": "largest alpha over sources",
        "average": "mean over tokens, sequences and routers",
        "source": _OASIS,
        "applies_to": _ROUTED,
    },
    "depth_embedding_weight": {
        "tensor": "alpha of the embedding",
        "average": "mean over tokens, sequences and routers",
        "source": _OASIS,
        "applies_to": _ROUTED,
    },
    "depth_null_mass": {
        "tensor": "depth null mass of every router and token",
        "average": "mean over tokens, sequences and routers",
        "source": _OASIS,
        "applies_to": "depth routers with Softmax1",
    },
    "depth_sink_rate": {
        "tensor": "alpha of the embedding, the first source",
        "average": _SINK,
        "source": _OASIS,
        "applies_to": f"models with a router over at least {MINIMUM_SOURCES} sources",
    },
    "depth_sink_rate_by_source": {
        "tensor": _ALPHA,
        "average": f"{_SINK}, of the routers that read the source; one value a source",
        "source": _OASIS,
        "applies_to": f"models with a router over at least {MINIMUM_SOURCES} sources",
    },
    "beta": {
        "tensor": "beta = min(softplus(beta_raw), 10)",
        "average": "mean over routers",
        "source": _OASIS,
        "applies_to": "models with the inter-layer null signal",
    },
    "beta_by_router": {
        "tensor": "beta = min(softplus(beta_raw), 10)",
        "average": "none; one value a router",
        "source": _OASIS,
        "applies_to": "models with the inter-layer null signal",
    },
}


def source_columns(config: ModelConfig) -> tuple[list[str], dict[str, list[int]]]:
    """The columns of the depth matrices, and for every router which of them its sources are, in order.

    cumulative: "embedding", the streams after the layers before ("layer0" ...), and the candidates of the router's own
    layer, "own attention" and "own mlp". delta: "embedding" and one column a sublayer, or one a block ("block1" ...,
    the last of a router's being the running one).
    """
    names, sublayers = router_names(config), sublayer_names(config)
    if config.wiring == "cumulative":
        layers = [f"layer{i}" for i in range(config.num_layers - 1)]
        own = [len(layers) + 1, len(layers) + 2]
        rows = {name: [*range(index // 2 + 1), *own[: index % 2 + 1]] for index, name in enumerate(names)}
        return ["embedding", *layers, "own attention", "own mlp"], rows
    count = config.blocks or len(sublayers)
    size = len(sublayers) // count
    columns = [f"block{i + 1}" for i in range(count)] if config.blocks else sublayers
    rows = {name: list(range(min(index // size + 1, count) + 1)) for index, name in enumerate(names)}
    return ["embedding", *columns], rows


def _rows_of(name: str, router: RouterStatistics) -> Rows:
    weights, null = router.weights, router.null_mass
    entropy = -(xlogy(weights, weights).sum(-1) + xlogy(null, null))
    return {
        f"weights/{name}": weights.mean(1),
        f"variance/{name}": weights.var(1),
        f"entropy/{name}": entropy.mean(1),
        f"largest/{name}": weights.max(-1).mean(1),
        f"null/{name}": null.mean(1),
    }


def read(reading: Reading) -> Rows | None:
    """Means over tokens: weights and variance [B, sources], the others [B]; beta [B] too, the same for all."""
    rows = {}
    for name, router in reading.statistics.routers.items():
        rows |= _rows_of(name, router)
        if router.beta is not None:
            rows[f"beta/{name}"] = jnp.broadcast_to(router.beta, router.weights.shape[:1])
    return rows or None


def _matrix(by_router: dict[str, np.ndarray], config: ModelConfig) -> list[list[float | None]]:
    columns, places = source_columns(config)
    return [[dict(zip(places[name], row.tolist())).get(i) for i in range(len(columns))] for name, row in by_router.items()]


def depth_sinks(weights: list[list[float | None]]) -> list[float | None]:
    """Per column of a router x source matrix of mean weights: share of the routers that read it in which it is a sink."""
    wide = [row for row in weights if sum(w is not None for w in row) >= MINIMUM_SOURCES]
    given = [[row[i] for row in wide if row[i] is not None] for i in range(len(weights[0]))]
    return [sum(w > EPSILON for w in column) / len(column) if column else None for column in given]


def finish(rows: dict[str, np.ndarray] | None, config: ModelConfig) -> dict[str, Value]:
    """Means over sequences, then over routers."""
    if rows is None:
        return dict.fromkeys(DEFINITIONS)
    mean = {kind: {} for kind in ("weights", "variance", "entropy", "largest", "null", "beta")}
    for router in router_names(config):  # rows come out of jit in alphabetical order
        for kind, by_router in mean.items():
            if f"{kind}/{router}" in rows:
                by_router[router] = rows[f"{kind}/{router}"].mean(0)
    weights = _matrix(mean["weights"], config)
    sinks = depth_sinks(weights)
    average = {
        kind: float(np.mean(list(values.values()))) for kind, values in mean.items() if kind not in ("weights", "variance") and values
    }
    return {
        "depth_weights": weights,
        "depth_weight_variance": _matrix(mean["variance"], config),
        "depth_routers": list(mean["weights"]),
        "depth_sources": source_columns(config)[0],
        "depth_entropy": average["entropy"],
        "depth_max_weight": average["largest"],
        "depth_embedding_weight": float(np.mean([row[0] for row in weights])),
        "depth_null_mass": average["null"] if config.depth_normalizer == "softmax1" else None,
        "depth_sink_rate": sinks[0],
        "depth_sink_rate_by_source": None if sinks[0] is None else sinks,
        "beta": average.get("beta"),
        "beta_by_router": [float(value) for value in mean["beta"].values()] or None,
    }


DEPTH = Evaluator(read, finish, DEFINITIONS)
