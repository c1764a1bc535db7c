"""Several corpora as one, each with its share of the examples."""

import hashlib
import itertools
import json
from collections.abc import Sequence

import numpy as np

from oasis_jax.data.corpus import Corpus, Source, read_batch


class Mixture:
    """Examples of several sources in fixed proportions, spread evenly, until the first source has given all of its own.

    Args:
      sources: of like examples.
      weights: of the examples of each, above 0; their sum does not matter.

    Attributes:
      numbers: of each source, the numbers of its examples among those of all sources.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        import grain  # here: machines that only evaluate do without it

        self.sources, self.weights = tuple(sources), tuple(weights)
        ends = list(itertools.accumulate(map(len, sources)))
        self.numbers = [range(end - len(source), end) for source, end in zip(sources, ends)]
        self._order = self.mixed([grain.MapDataset.range(numbers.start, numbers.stop) for numbers in self.numbers])

    def mixed(self, datasets: Sequence):
        """Several `grain.MapDataset`s as one in these proportions."""
        import grain

        return grain.MapDataset.mix(list(datasets), list(self.weights))

    def numbered(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """Examples by their numbers among those of all sources, as arrays [len(numbers), ...]."""
        batch: dict[str, np.ndarray] = {}
        for source, own in zip(self.sources, self.numbers):
            rows = [row for row, number in enumerate(numbers) if number in own]
            if not rows:
                continue
            for name, x in read_batch(source, [numbers[row] - own.start for row in rows]).items():
                batch.setdefault(name, np.zeros((len(numbers), *x.shape[1:]), x.dtype))[rows] = x
        return batch

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """See `oasis_jax.data.corpus.read_batch`."""
        return self.numbered([int(self._order[index]) for index in indices])

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return {name: x[0] for name, x in self.batch([index]).items()}


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
