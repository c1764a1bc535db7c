"""How well the model predicts: perplexity and bits per byte for tokens, the squared error for vectors."""

import math

import numpy as np

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation.evaluator import Evaluator, Reading, Rows, Value
from oasis_jax.training.loss import token_losses

DEFINITIONS = {
    "loss": {
        "tensor": "model outputs: logits against the next token, or vectors against the target",
        "average": "weighted mean over all target positions: nats per token, or squared error per vector component",
        "source": "cross entropy; mean squared error",
    },
    "perplexity": {
        "tensor": "logits, the padding of the vocabulary included, against the next token",
        "average": "exp of the weighted mean over all target tokens of the cross entropy in nats",
        "source": "exp(cross entropy)",
        "applies_to": "models of tokens",
    },
    "bits_per_byte": {
        "tensor": "logits, the padding of the vocabulary included, against the next token",
        "average": "cross entropy in bits, summed over all target tokens, per byte of the text they stand for",
        "source": "cross entropy / (ln 2 * bytes)",
        "applies_to": "byte tokenizers",
    },
    "squared_error": {
        "tensor": "output vectors against target vectors",
        "average": "weighted mean over target positions and components",
        "source": "mean squared error",
        "applies_to": "models of vectors",
    },
}


def read(reading: Reading) -> Rows:
    """Per sequence: sum of weighted losses, sum of weights and, where the batch has "bytes" [B, T], the bytes of its targets."""
    weights = reading.batch["weights"]
    rows = {
        "loss": (token_losses(reading.outputs, reading.batch, reading.config) * weights).sum(-1),
        "weight": weights.sum(-1),
    }
    if "bytes" in reading.batch:
        rows["bytes"] = (reading.batch["bytes"] * weights).sum(-1)
    return rows


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # of more, Python's raises


def finish(rows: dict[str, np.ndarray], config: ModelConfig) -> dict[str, Value]:
    """Sums over all tokens before dividing, so that a short sequence counts for what it holds."""
    loss = float(rows["loss"].sum() / rows["weight"].sum())
    tokens = config.inputs == "tokens"
    return {
        "loss": loss,
        "perplexity": _exp(loss) if tokens else None,
        "bits_per_byte": float(rows["loss"].sum() / np.log(2) / rows["bytes"].sum()) if "bytes" in rows else None,
        "squared_error": None if tokens else loss,
    }


PERPLEXITY = Evaluator(read, finish, DEFINITIONS)
