"""Where the depth routers look: weights router by source, their null mass, entropy, depth sinks, and the
coupling beta.
"""

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation import bootstrap
from oasis_jax.evaluation.bootstrap import Estimate, per_sequence
from oasis_jax.evaluation.evaluator import Evaluator, Rows, Value
from oasis_jax.evaluation.measures.sinks import EPSILON
from oasis_jax.model.statistics import RouterStatistics
from oasis_jax.model.wiring import schedule

MINIMUM_SOURCES = 3  # with two sources one of them always has weight 1/2: no sink to speak of

_ALPHA = "depth weights alpha of every router, token and source"
_BY_SOURCE = "mean over tokens and sequences; router x source, null where a router does not read a source"
_OASIS = "OASIS, arXiv 2605.17887"
_ROUTED = "models with depth routers"
_SINK = (
    f"share of routers with at least {MINIMUM_SOURCES} sources in which the mean weight over tokens and "
    f"sequences exceeds {EPSILON}"
)
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
        "applies_to": f"{_ROUTED} whose weights and null sum to 1",
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
        "applies_to": "depth routers with Softmax1; with sigmoid, 1 - the sum of alpha, at least 0",
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
        "tensor": "beta = min(softplus(beta_raw), 10), or what model.fixed_beta says",
        "average": "mean over routers",
        "source": _OASIS,
        "applies_to": "models with the inter-layer null signal",
    },
    "beta_by_router": {
        "tensor": "beta = min(softplus(beta_raw), 10), or what model.fixed_beta says",
        "average": "none; one value a router",
        "source": _OASIS,
        "applies_to": "models with the inter-layer null signal",
    },
}


Columns = tuple[list[str], dict[str, list[int]]]


def source_columns(config: ModelConfig) -> Columns:
    """The columns of the depth matrices, and for every router which of them its sources are, in order."""
    plan = schedule(config)
    index = {name: i for i, name in enumerate(plan.columns)}
    rows = {router: [index[source.name] for source in step.sources] for step in plan.steps for router in step.routers}
    return plan.columns, rows


def foreign_columns(sources: dict[str, int]) -> Columns:
    """The same for routers of a foreign model, of which only the numbers of sources are known: "source0" is
    the oldest.
    """
    names = [f"source{i}" for i in range(max(sources.values()))]
    return names, {router: list(range(count)) for router, count in sources.items()}


def read(router: RouterStatistics) -> Rows:
    """Means over tokens: weights and variance [B, sources], the others [B]; beta [B], the same for all."""
    weights, null, beta = router
    entropy = -(xlogy(weights, weights).sum(-1) + xlogy(null, null))
    rows = {
        "weights": weights.mean(1),
        "variance": weights.var(1),
        "entropy": entropy.mean(1),
        "largest": weights.max(-1).mean(1),
        "null": null.mean(1),
    }
    return rows if beta is None else rows | {"beta": jnp.broadcast_to(beta, len(weights))}


def _matrix(by_router: dict[str, np.ndarray], columns: Columns) -> list[list[float | None]]:
    names, places = columns
    return [
        [dict(zip(places[name], row.tolist())).get(i) for i in range(len(names))] for name, row in by_router.items()
    ]


def depth_sinks(weights: list[list[float | None]]) -> list[float | None]:
    """Per column of a router x source matrix of mean weights: share of the routers that read it in which it
    is a sink.
    """
    wide = [row for row in weights if sum(w is not None for w in row) >= MINIMUM_SOURCES]
    given = [[row[i] for row in wide if row[i] is not None] for i in range(len(weights[0]))]
    return [sum(w > EPSILON for w in column) / len(column) if column else None for column in given]


def _share_of_sinks(means: np.ndarray) -> np.ndarray:
    return (means > EPSILON).mean(-1)


def finish(rows: dict[str, np.ndarray], config: ModelConfig | None) -> dict[str, Value | Estimate]:
    """Means over sequences, then over routers."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for place, values in rows.items():
        kind, _, router = place.split("/", 2)
        found.setdefault(kind, {})[router] = values
    sources = {name: values.shape[1] for name, values in found["weights"].items()}
    columns = source_columns(config) if config else foreign_columns(sources)
    weights = _matrix({name: values.mean(0) for name, values in found["weights"].items()}, columns)

    def average(kind: str) -> Estimate:
        return per_sequence(np.stack(list(found[kind].values()), -1), bootstrap.mean)

    embedding = {name: values[:, 0] for name, values in found["weights"].items()}
    wide = [values for name, values in embedding.items() if sources[name] >= MINIMUM_SOURCES]
    metrics = {
        "depth_weights": weights,
        "depth_weight_variance": _matrix({name: values.mean(0) for name, values in found["variance"].items()}, columns),
        "depth_routers": list(sources),
        "depth_sources": columns[0],
        "depth_max_weight": average("largest"),
        "depth_embedding_weight": per_sequence(np.stack(list(embedding.values()), -1), bootstrap.mean),
    }
    if config is None or config.depth_normalizer != "sigmoid":
        metrics["depth_entropy"] = average("entropy")
    if any(values.any() for values in found["null"].values()):  # depth softmax has a null mass of exactly 0
        metrics["depth_null_mass"] = average("null")
    if wide:
        metrics |= {
            "depth_sink_rate": per_sequence(np.stack(wide, -1), _share_of_sinks),
            "depth_sink_rate_by_source": depth_sinks(weights),
        }
    if "beta" in found:
        metrics |= {
            "beta": average("beta").value,
            "beta_by_router": [float(values[0]) for values in found["beta"].values()],
        }
    return metrics


DEPTH = Evaluator(router=read, finish=finish, definitions=DEFINITIONS)
