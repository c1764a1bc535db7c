"""The trigger task: do heads that have nothing to do attend to the first token, or to the null? (arXiv 2603.11487)"""

import jax.numpy as jnp
import numpy as np

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation.evaluator import Evaluator, Reading, Rows, Value
from oasis_jax.evaluation.sinks import WITH_NULL

_SOURCE = "trigger-conditional averaging, arXiv 2603.11487"
_TASK, _NULL_TASK = "the trigger task", "the trigger task and normalizers that leave mass to a null"
_P, _OMEGA = "attention probability of the first token (key 0)", "null mass omega"
_KINDS = {"non_trigger": "queries that carry no trigger, the first query left out", "trigger": "queries that carry the trigger"}


def _definitions() -> dict[str, dict[str, str]]:
    definitions = {}
    for kind, rows in _KINDS.items():
        for name, tensor, applies_to in (("first_token_mass", _P, _TASK), ("null_mass", _OMEGA, _NULL_TASK)):
            common = {"tensor": f"{tensor} of {rows}", "source": _SOURCE, "applies_to": applies_to}
            definitions[f"{kind}_{name}"] = {"average": "mean over those queries of all sequences, then over layers and heads"} | common
            definitions[f"{kind}_{name}_by_head"] = {"average": "mean over those queries of all sequences; layer x head"} | common
    strongest = {"average": "mean over those queries of all sequences, the largest over layers and heads"}
    return definitions | {"non_trigger_first_token_mass_max": definitions["non_trigger_first_token_mass"] | strongest}


DEFINITIONS = _definitions()


def read(reading: Reading) -> Rows | None:
    """Per kind of query: how many there are [B], and the sums of the masses over them [B, L, N]."""
    if "trigger" not in reading.batch:
        return None
    trigger = reading.batch["trigger"]
    masks = {"trigger": trigger, "non_trigger": ~trigger & (jnp.arange(trigger.shape[1]) > 0)}
    masses = ("first_token_mass", "null_mass") if reading.config.normalizer in WITH_NULL else ("first_token_mass",)
    rows = {f"{kind}_count": mask.sum(-1) for kind, mask in masks.items()}
    for name in masses:
        mass = jnp.stack([getattr(layer, name) for layer in reading.statistics.attention], 1)
        rows |= {f"{kind}_{name}": jnp.einsum("BLNT,BT->BLN", mass, mask) for kind, mask in masks.items()}
    return rows


def finish(rows: dict[str, np.ndarray] | None, config: ModelConfig) -> dict[str, Value]:
    """Sums over all sequences before dividing; None for a kind of query that never occurs."""
    del config
    metrics = dict.fromkeys(DEFINITIONS)
    for kind in _KINDS:
        for name in (f"{kind}_first_token_mass", f"{kind}_null_mass"):
            if rows is not None and name in rows and rows[f"{kind}_count"].any():
                by_head = rows[name].sum(0) / rows[f"{kind}_count"].sum()
                metrics |= {name: float(by_head.mean()), f"{name}_by_head": by_head.tolist()}
    if metrics["non_trigger_first_token_mass_by_head"]:
        metrics["non_trigger_first_token_mass_max"] = float(np.max(metrics["non_trigger_first_token_mass_by_head"]))
    return metrics


TRIGGER = Evaluator(read, finish, DEFINITIONS)
