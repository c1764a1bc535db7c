"""What every corpus is: two random-access sources, and an identity that says what they were made from."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from oasis_jax.data.tokenizers import Tokenizer
from oasis_jax.errors import UserError

# What a random stream is for, the second number of its seed.
ORDER, TRAIN, HELDOUT = range(3)


class Source(Protocol):
    """Random access to examples; example i is the same whenever it is read. May have `batch`; see `read_batch`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


def read_batch(source: Source, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """Examples of a source as arrays [len(indices), ...]; in one request where the source has `batch`, which does
    so.
    """
    batch = getattr(source, "batch", None)
    if batch is not None:
        return batch(indices)
    examples = [source[index] for index in indices]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Examples to train on and examples that are never trained on.

    Attributes:
      identity: what the examples were made from, JSON-able; equal identities (with an equal data config and tokenizer)
        mean equal examples.
      tokenizer: None where examples are vectors.
      train: examples to train on.
      heldout: examples kept back.
      notes: what was left out and what is not as asked for, a line each, to be said when training starts.
      vector_dim: size of input and target vectors, None where examples are tokens.
    """

    identity: dict[str, Any]
    tokenizer: Tokenizer | None
    train: Source
    heldout: Source
    vector_dim: int | None = None
    notes: tuple[str, ...] = ()


def seed_sequence(seed: int, *keys: int) -> np.random.SeedSequence:
    """The seed of one random stream of a run; different keys give independent streams, neighbouring run seeds too."""
    if seed < 0:
        raise UserError(f"run.seed: must be at least 0, got {seed}")
    return np.random.SeedSequence([seed, *keys])
