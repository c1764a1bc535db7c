"""Tokenizers over bytes: one token a byte, or a byte-level BPE trained from the corpus."""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers

from oasis_jax.errors import UserError, unknown_name

# What the library does anyway; said aloud, it does not warn about itself in every child process.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

# Documents handed to the library at a time: enough for all cores, few enough that its objects stay small.
_DOCUMENTS_AT_ONCE = 64


class Tokenizer:
    """Text to ids and back. Ordinary tokens come first, then the begin token and the separator between documents.

    The two special ids never come out of `encode`, whatever the text says.

    Attributes:
      kind: its name in `TOKENIZERS`.
      vocab_size: ids there are, special ones included.
      begin_id: id of the begin token.
      separator_id: id of the document separator.
    """

    kind: str

    def __init__(self, ordinary: int):
        self.begin_id, self.separator_id, self.vocab_size = ordinary, ordinary + 1, ordinary + 2

    @classmethod
    def train(cls, documents: Sequence[bytes], vocab_size: int) -> "Tokenizer":
        """Makes one for these documents, of at most `vocab_size` tokens where there is a choice."""
        raise NotImplementedError

    def encode_all(self, documents: Sequence[bytes]) -> Iterator[np.ndarray]:
        """The int32 ids of one document after another."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes behind ids; special ids and the padding of a vocabulary stand for none."""
        raise NotImplementedError

    def to_json(self) -> str:
        """All there is to the tokenizer, for `from_json`."""
        raise NotImplementedError

    def encode(self, text: bytes | str) -> np.ndarray:
        """The int32 ids of one text, without special tokens. A BPE raises UserError for bytes that are not UTF-8."""
        return next(self.encode_all([text.encode() if isinstance(text, str) else text]))

    @functools.cached_property
    def identity(self) -> dict:
        """kind, vocab_size and the sha256 of `to_json`."""
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "sha256": hashlib.sha256(self.to_json().encode()).hexdigest(),
        }

    @staticmethod
    def from_json(text: str) -> "Tokenizer":
        """The tokenizer that `to_json` wrote."""
        values = json.loads(text)
        if values["kind"] not in TOKENIZERS:
            raise unknown_name("tokenizer", values["kind"], TOKENIZERS)
        return TOKENIZERS[values.pop("kind")](**values)


class BytesTokenizer(Tokenizer):
    """Token b is byte b; keeps any bytes, UTF-8 or not."""

    kind = "bytes"

    def __init__(self):
        super().__init__(256)

    @classmethod
    def train(cls, documents, vocab_size):
        return cls()

    def encode_all(self, documents):
        return (np.frombuffer(document, np.uint8).astype(np.int32) for document in documents)

    def decode(self, ids):
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes()

    def to_json(self):
        return json.dumps({"kind": self.kind})


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding by the `tokenizers` library; every UTF-8 text comes back exactly."""

    kind = "bpe"

    def __init__(self, model: str):
        """Args: model: the library's own JSON, kept letter by letter so that the identity outlives changes of its
        format.
        """
        self._model = model
        self._library = tokenizers.Tokenizer.from_str(model)
        super().__init__(self._library.get_vocab_size())

    @classmethod
    def train(cls, documents, vocab_size):
        # Specials are kept out of the library's vocabulary: there a text that spells one would turn into it.
        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        library.train_from_iterator((document.decode() for document in documents), trainer)
        return cls(library.to_str())

    def encode_all(self, documents):
        for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
            try:
                texts = [document.decode() for document in documents[start : start + _DOCUMENTS_AT_ONCE]]
            except UnicodeDecodeError as error:
                raise UserError(
                    f"tokenizer=bpe: the text is not UTF-8 at byte {error.start}; use tokenizer=bytes"
                ) from None
            for encoding in self._library.encode_batch_fast(texts, add_special_tokens=False):
                yield np.array(encoding.ids, np.int32)

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        """The bytes of every ordinary token, by id."""
        # The library writes bytes as characters: printable Latin-1 as itself, the others, in order, from U+0100 on.
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        byte_of = {character: ord(character) for character in alphabet if ord(character) < 256}
        others = [byte for byte in range(256) if chr(byte) not in byte_of]
        byte_of |= dict(zip(alphabet[len(byte_of) :], others))
        tokens = sorted(self._library.get_vocab().items(), key=lambda item: item[1])
        return [bytes(byte_of[character] for character in token) for token, _ in tokens]

    def decode(self, ids):
        return b"".join(self._token_bytes[i] for i in np.asarray(ids).tolist() if i < self.begin_id)

    def to_json(self):
        return json.dumps({"kind": self.kind, "model": self._model})


# A new kind of tokenizer is one class and one line here.
TOKENIZERS: dict[str, type[Tokenizer]] = {"bytes": BytesTokenizer, "bpe": BPETokenizer}
