"""Several corpora as one, each with its share of the examples."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from oasis_jax.data.corpus import Corpus, Source


class Mixture:
    """Examples of several sources in fixed proportions, spread evenly, until the first source has given all of its own.

    Args:
      sources: each in an order of its own.
      weights: of the examples of each, above 0; their sum does not matter.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        self.sources, self.weights = tuple(sources), tuple(weights)
        self._examples = self.mixed(self.sources)

    def mixed(self, sources: Sequence[Source]):
        """A `grain.MapDataset` of other sources in these proportions."""
        import grain  # here: machines that only evaluate do without it

        datasets = [s if isinstance(s, grain.MapDataset) else grain.MapDataset.source(s) for s in sources]
        return grain.MapDataset.mix(datasets, list(self.weights))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self._examples[index]


def mixed(corpora: Sequence[Corpus], weights: Sequence[float]) -> Corpus:
    """One corpus of several with one tokenizer."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    parts = [corpus.identity for corpus in corpora]
    heldout = [part["holdout"] for part in parts]
    identity = {
        "name": "mixture",
        "sha256": hashlib.sha256(json.dumps([shares, parts], sort_keys=True).encode()).hexdigest(),
        "bytes": sum(part["bytes"] for part in parts),
        "files": sum(part["files"] for part in parts),
        "holdout": {name: sum(part[name] for part in heldout) for name in ("bytes", "documents")},
        "split": "; ".join(f"{share:.3g} of examples: {part['split']}" for share, part in zip(shares, parts)),
        "shares": shares,
        "parts": parts,
    }
    train, held = (Mixture([getattr(corpus, part) for corpus in corpora], shares) for part in ("train", "heldout"))
    notes = tuple(note for corpus in corpora for note in corpus.notes)
    return Corpus(identity, corpora[0].tokenizer, train, held, notes=notes)
