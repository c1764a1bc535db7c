"""How well the model predicts: perplexity and bits per byte for tokens, the squared error for vectors."""

import jax.numpy as jnp
import numpy as np

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation.bootstrap import Estimate
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


def read(reading: Reading) -> Rows | None:
    """Per sequence: the sum of weighted losses by its name, of weights and, where the batch has "bytes" [B,
    T], of its targets' bytes.
    """
    if "targets" not in reading.batch:
        return None
    targets = reading.batch["targets"]
    weights = reading.batch["weights"] if "weights" in reading.batch else jnp.ones(targets.shape[:2], jnp.float32)
    tokens = jnp.issubdtype(targets.dtype, jnp.integer)
    config = reading.config or ModelConfig(inputs="tokens" if tokens else "vectors")
    rows = {
        "nats" if tokens else "squared_error": (token_losses(reading.outputs, reading.batch, config) * weights).sum(-1),
        "weight": weights.sum(-1),
    }
    if "bytes" in reading.batch:
        rows["bytes"] = (reading.batch["bytes"] * weights).sum(-1)
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
    return found | ({"bits_per_byte": Estimate(rows["nats"] / np.log(2), rows["bytes"])} if "bytes" in rows else {})


PERPLEXITY = Evaluator(read, finish, DEFINITIONS)
