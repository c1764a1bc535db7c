"""Corpus `backcopy`: Bigram-Backcopy (Guo et al., arXiv 2410.13835), a task of tokens on which softmax attention forms
a sink, drains its value and grows a residual peak.

A Markov chain over the bytes of a text. After most characters the next one is drawn from what follows that character in
the text; after a trigger, one of the text's most frequent characters, the next one is a copy of the character before
the trigger. A head that copies has nothing to do elsewhere, and rests on the begin token.

The text is read as a ring, so that every character has a next one. A sequence starts with a character that is no
trigger, drawn by its frequency: a trigger then always has a character before it that is none, and two triggers never
copy each other for ever.
"""

import bisect
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from oasis_jax.config import DataConfig
from oasis_jax.data import files, stdlib
from oasis_jax.data.corpus import HELDOUT, TRAIN, Corpus, seed_sequence
from oasis_jax.data.text import digest
from oasis_jax.data.tokenizers import TOKENIZERS, Tokenizer
from oasis_jax.errors import UserError

# Examples are made when they are read; see `oasis_jax.data.trigger`.
_TRAIN_EXAMPLES = 2**30
_HELDOUT_EXAMPLES = 2**16
_BYTES = 256


class Chain:
    """The Markov chain of a text.

    Attributes:
      triggers: the `count` most frequent bytes, of equally frequent ones the lower first.
      first: probabilities [256] of the first character.
      next: probabilities [256, 256] of the next character (column) after a character (row) that is no trigger; rows of
        characters that the text does not have are 0.
    """

    def __init__(self, documents: Sequence[bytes], count: int):
        text = np.frombuffer(b"".join(documents), np.uint8).astype(np.int64)
        pairs = np.bincount(text * _BYTES + np.roll(text, -1), minlength=_BYTES**2).reshape(_BYTES, _BYTES)
        frequency = pairs.sum(1)
        different = int((frequency > 0).sum())
        if different <= count:
            raise UserError(
                f"data.trigger_characters: the text has {different} different bytes, so at most {different - 1} can be "
                f"triggers, got {count}"
            )
        self.triggers = np.argsort(-frequency, kind="stable")[:count]
        first = frequency.astype(np.float64)
        first[self.triggers] = 0
        self.first = first / first.sum()
        self.next = pairs / np.maximum(frequency, 1)[:, None]
        self._is_trigger = frozenset(self.triggers.tolist())
        self._rows = [_Draw(row) for row in self.next]
        self._first = _Draw(self.first)

    def sample(self, uniform: Sequence[float]) -> tuple[list[int], list[float], list[bool]]:
        """As many characters as there are numbers in [0, 1), the nats of each, and which ones copy."""
        character, nats = self._first(uniform[0])
        characters, costs, copied = [character], [nats], [False]
        for number in uniform[1:]:
            copies = character in self._is_trigger
            character, nats = (characters[-2], 0.0) if copies else self._rows[character](number)
            characters.append(character)
            costs.append(nats)
            copied.append(copies)
        return characters, costs, copied


class _Draw:
    """Draws from a row of probabilities: number in [0, 1) -> (what, its nats)."""

    def __init__(self, row: np.ndarray):
        some = np.flatnonzero(row)
        self._values = some.tolist()
        self._nats = (-np.log(row[some])).tolist()
        self._ends = np.cumsum(row[some])[:-1].tolist()  # a number beyond the last end is the last value's

    def __call__(self, number: float) -> tuple[int, float]:
        place = bisect.bisect_right(self._ends, number)
        return self._values[place], self._nats[place]


class BackcopySource:
    """Example i is a function of the text and of (seed, stream, i) alone.

    An example is {"inputs": int32 [T], "targets": int32 [T], "weights": float32 [T], all 1, "trigger": bool [T], where
    the next token is a copy, "optimal_nats": float32 [T], what the target costs a model that knows the chain, 0 at
    triggers}. With a begin token the inputs start with it.
    """

    def __init__(self, chain: Chain, config: DataConfig, begin_id: int, *, seed: int, stream: int, length: int):
        self._chain, self._seed, self._stream, self._length = chain, seed, stream, length
        self._size, self._begin = config.sequence_length, [begin_id] if config.begin_token else []

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self._length:
            raise IndexError(f"example {index} of {self._length}")
        random = np.random.Generator(np.random.Philox(seed_sequence(self._seed, self._stream, int(index))))
        drawn = self._size + 1 - len(self._begin)
        characters, nats, copied = self._chain.sample(random.random(drawn).tolist())
        tokens = np.array(self._begin + characters, np.int32)
        return {
            "inputs": tokens[:-1],
            "targets": tokens[1:],
            "weights": np.ones(self._size, np.float32),
            "trigger": np.array(copied[-self._size :]),
            "optimal_nats": np.array(nats[-self._size :], np.float32),
        }


def load(config: DataConfig, *, seed: int, tokenizer: Tokenizer | None) -> Corpus:
    """Training and held-out examples from two independent random streams of the seed.

    The text is that of corpus `files` where there is a pattern, else that of `stdlib`; all of it says what follows
    what.

    Raises:
      UserError: another tokenizer than bytes, no text, or more triggers than it has different bytes.
    """
    kind = tokenizer.kind if tokenizer else config.tokenizer
    if kind != "bytes":
        raise UserError(f"data.tokenizer: corpus=backcopy is made of bytes, so tokenizer=bytes, got {kind}")
    text, corrupt = files.read_files(config) if config.pattern else (stdlib.read_files(), [])
    documents = [document for file in text for document in file.documents]
    if not documents:
        raise UserError(f"data.corpus: there is no text in it ({len(text)} files)")
    chain = Chain(documents, config.trigger_characters)
    parameters = {
        "seed": seed,
        "trigger_characters": config.trigger_characters,
        "sequence_length": config.sequence_length,
        "begin_token": config.begin_token,
        "text": digest(text),
    }
    identity = {
        "name": "backcopy",
        **parameters,
        "triggers": bytes(chain.triggers.tolist()).decode("latin-1"),
        "sha256": hashlib.sha256(json.dumps(parameters).encode()).hexdigest(),
        "split": "held-out examples come from a random stream of their own",
    }
    tokenizer = tokenizer or TOKENIZERS["bytes"].train((), 0)
    sources = (
        BackcopySource(chain, config, tokenizer.begin_id, seed=seed, stream=stream, length=length)
        for stream, length in ((TRAIN, _TRAIN_EXAMPLES), (HELDOUT, _HELDOUT_EXAMPLES))
    )
    return Corpus(identity, tokenizer, *sources, notes=tuple(f"left out: {what}" for what in corrupt))
