"""Tasks with triggers: do heads that have nothing to do attend to the first token, or to the null? (arXiv 2603.11487)
And what is not learned yet, at triggers and elsewhere (arXiv 2410.13835).
"""

import numpy as np
from jaxtyping import Array, Bool

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation import bootstrap
from oasis_jax.evaluation.bootstrap import Estimate
from oasis_jax.evaluation.evaluator import Evaluator, FinalReading, LayerReading, Rows, Tokens, Value
from oasis_jax.evaluation.measures.perplexity import position_losses

_SOURCE = "trigger-conditional averaging, arXiv 2603.11487"
_TASK, _NULL_TASK = "tasks with triggers", "tasks with triggers and normalizers that leave mass to a null"
_RISK_TASK = "the corpus backcopy, whose batches say what each target costs at best"
_P, _OMEGA = "attention probability of the first token of the query's document", "null mass omega"
_KINDS = {
    "non_trigger": "queries that carry no trigger, the first query left out",
    "trigger": "queries that carry the trigger",
}


def _definitions() -> dict[str, dict[str, str]]:
    definitions = {}
    for kind, rows in _KINDS.items():
        for name, tensor, applies_to in (("first_token_mass", _P, _TASK), ("null_mass", _OMEGA, _NULL_TASK)):
            common = {"tensor": f"{tensor} of {rows}", "source": _SOURCE, "applies_to": applies_to}
            definitions[f"{kind}_{name}"] = {
                "average": "mean over those queries of all sequences, then over layers and heads"
            } | common
            definitions[f"{kind}_{name}_by_head"] = {
                "average": "mean over those queries of all sequences; layer x head"
            } | common
        definitions[f"{kind}_excess_risk"] = {
            "tensor": "cross entropy in nats minus that under the distribution that the target was drawn from, at "
            f"{rows}",
            "average": "mean over those queries of all sequences",
            "source": "Bigram-Backcopy, arXiv 2410.13835",
            "applies_to": _RISK_TASK,
        }
    strongest = {"average": "mean over those queries of all sequences, the largest over layers and heads"}
    return definitions | {"non_trigger_first_token_mass_max": definitions["non_trigger_first_token_mass"] | strongest}


DEFINITIONS = _definitions()


def _masks(tokens: Tokens) -> dict[str, Bool[Array, "B T"]]:
    """Kind of query -> which ones; {} where the batch has no triggers."""
    if "trigger" not in tokens.batch:
        return {}
    trigger = tokens.batch["trigger"]
    return {"trigger": trigger, "non_trigger": ~trigger & (tokens.place > 0)}


def read(reading: LayerReading) -> Rows:
    """Per kind of query the sums of the masses over them [B, N]."""
    if reading.attention is None:
        return {}
    masses = ("first_token_mass", "null_mass") if reading.tokens.has_null else ("first_token_mass",)
    return {
        f"{kind}_{name}": getattr(reading.attention, name).sum(-1, where=mask[:, None])
        for name in masses
        for kind, mask in _masks(reading.tokens).items()
    }


def read_end(reading: FinalReading) -> Rows:
    """How many queries of a kind there are [B] and, where the best loss is known, the sum of what theirs is above
    it.
    """
    masks = _masks(reading.tokens)
    rows = {f"{kind}_count": mask.sum(-1) for kind, mask in masks.items()}
    if masks and "optimal_nats" in reading.tokens.batch:
        excess = position_losses(reading)["nats"] - reading.tokens.batch["optimal_nats"]
        rows |= {f"{kind}_excess_risk": excess.sum(-1, where=mask) for kind, mask in masks.items()}
    return rows


def finish(rows: dict[str, np.ndarray], config: ModelConfig | None) -> dict[str, Value | Estimate]:
    """Sums over all sequences before dividing; nothing for a kind of query that never occurs."""
    del config
    metrics = {}
    for kind in _KINDS:
        risk = f"{kind}_excess_risk"
        if risk in rows and rows[f"{kind}_count"].any():
            metrics[risk] = Estimate(rows[risk][:, None], rows[f"{kind}_count"][:, None])
        for name in (f"{kind}_first_token_mass", f"{kind}_null_mass"):
            if name in rows and rows[f"{kind}_count"].any():
                totals, counts = rows[name], rows[f"{kind}_count"][:, None]
                by_head = Estimate(totals.reshape(len(totals), -1), counts, bootstrap.mean)
                metrics |= {name: by_head, f"{name}_by_head": (totals.sum(0) / counts.sum()).tolist()}
    if "non_trigger_first_token_mass" in metrics:
        metrics["non_trigger_first_token_mass_max"] = metrics["non_trigger_first_token_mass"]._replace(
            reduce=bootstrap.largest
        )
    return metrics


TRIGGER = Evaluator(layer=read, final=read_end, finish=finish, definitions=DEFINITIONS)
