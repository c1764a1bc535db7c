"""How well the model predicts: perplexity, accuracy and bits per byte for tokens, the squared error for vectors."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation.bootstrap import Estimate
from oasis_jax.evaluation.evaluator import Evaluator, FinalReading, Rows, Value
from oasis_jax.model.head import token_losses

TOP = (1, 5)

DEFINITIONS = {
    "loss": {
        "tensor": "model outputs: logits against the next token, or vectors against the target",
        "average": "weighted mean over all target positions: nats per token, or squared error per vector component",
        "source": "cross entropy; mean squared error",
    },
    "perplexity": {
        "tensor": "logits against the next token",
        "average": "exp of the weighted mean over all target tokens of the cross entropy in nats",
        "source": "exp(cross entropy)",
        "applies_to": "models of tokens",
    },
    "bits_per_byte": {
        "tensor": "logits against the next token",
        "average": "weighted sum over all target tokens of the cross entropy in bits / weighted sum of the bytes of "
        "text they stand for; special tokens, such as a separator, are predicted like others and stand for none",
        "source": "cross entropy / (ln 2 * bytes)",
        "applies_to": "batches that say how many bytes each target stands for: those of runs and models with any "
        "tokenizer",
    },
    "squared_error": {
        "tensor": "output vectors against target vectors",
        "average": "weighted mean over target positions and components",
        "source": "mean squared error",
        "applies_to": "models of vectors",
    },
} | {
    f"top_{k}_accuracy": {
        "tensor": f"target tokens among the {k} largest logits of their position, the padding of the vocabulary "
        "included; "
        "of equal logits the first counts as the larger",
        "average": "weighted share of all target positions",
        "source": f"top-{k} accuracy",
        "applies_to": "models of tokens",
    }
    for k in TOP
}


def _of_tokens(logits: Float[Array, "b t V"], arrays: Mapping[str, Array]) -> Rows:
    """nats, and whether the target is among the k largest logits, of equal ones the first; no vocabulary is sorted."""
    targets, places = arrays["targets"], jnp.arange(logits.shape[-1])
    is_target = places == targets[..., None]
    logit = jnp.where(is_target, logits, 0.0).sum(-1, keepdims=True)
    before = (logits > logit) | ((logits == logit) & (places < targets[..., None]))
    rank = before.sum(-1)
    return {"nats": token_losses(logits, targets)} | {f"top_{k}": rank < k for k in TOP}


def _of_vectors(outputs: Float[Array, "b t O"], arrays: Mapping[str, Array]) -> Rows:
    return {"squared_error": token_losses(outputs, arrays["targets"])}


def position_losses(reading: FinalReading) -> Rows:
    """Of every position [B, T]: "nats" and "top_k", or "squared_error"; and "weight". {} without targets."""
    batch = reading.tokens.batch
    if "targets" not in batch:
        return {}
    targets = batch["targets"]
    of_piece = _of_tokens if jnp.issubdtype(targets.dtype, jnp.integer) else _of_vectors
    weights = batch["weights"] if "weights" in batch else jnp.ones(targets.shape[:2], jnp.float32)
    return reading.map_logits(of_piece, {"targets": targets}) | {"weight": weights}


def read(reading: FinalReading) -> Rows:
    """Per sequence: the weighted sum of what `position_losses` says, the sum of weights and, where the batch has
    "bytes" [B, T], of its targets' bytes.
    """
    found = position_losses(reading)
    if not found:
        return {}
    weights = found.pop("weight")
    rows = {name: (values * weights).sum(-1) for name, values in found.items()} | {"weight": weights.sum(-1)}
    if "bytes" in reading.tokens.batch:
        rows["bytes"] = (reading.tokens.batch["bytes"] * weights).sum(-1)
    return rows


def _exp(means: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(means[..., 0])


def finish(rows: dict[str, np.ndarray], config: ModelConfig | None) -> dict[str, Value | Estimate]:
    """Sums over all tokens before dividing, so that a short sequence counts for what it holds."""
    del config
    rows = {name: values[:, None] for name, values in rows.items()}
    if "squared_error" in rows:
        return dict.fromkeys(("loss", "squared_error"), Estimate(rows["squared_error"], rows["weight"]))
    found = {"loss": Estimate(rows["nats"], rows["weight"]), "perplexity": Estimate(rows["nats"], rows["weight"], _exp)}
    found |= {f"top_{k}_accuracy": Estimate(rows[f"top_{k}"], rows["weight"]) for k in TOP}
    return found | ({"bits_per_byte": Estimate(rows["nats"] / np.log(2), rows["bytes"])} if "bytes" in rows else {})


PERPLEXITY = Evaluator(final=read, finish=finish, definitions=DEFINITIONS)
