"""Tokenizers: one token a byte, a byte-level BPE trained from the corpus, that of a pretrained model, or a model of
sentencepiece or tiktoken.
"""

import base64
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers

from oasis_jax.data.formats import optional
from oasis_jax.errors import UserError, unknown_name
from oasis_jax.reading import read_bytes

# What the library does anyway; said aloud, it does not warn about itself in every child process.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

# Documents handed to the library at a time: enough for all cores, few enough that its objects stay small.
_DOCUMENTS_AT_ONCE = 64

# What a BPE trained here takes for words: GPT-2's pattern with runs of at most 64 characters. Learning takes time
# quadratic in the length of a word, so that five megabytes without a blank would not end.
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,64}| ?\p{N}{1,64}| ?[^\s\p{L}\p{N}]{1,64}|\s{1,64}(?!\S)|\s{1,64}"
# Characters that a BPE trained here reads at once: the library takes 100 bytes and more for each.
_PIECE = 2**20
# Where a text can be cut without changing a word: before the blank between letters or digits.
_BETWEEN_WORDS = re.compile(r"(?<=[^\W_])(?=[ \n][^\W_])")


class Tokenizer:
    """Text to ids and back.

    Special ids never come out of `encode`, whatever the text says.

    Attributes:
      kind: its name in `TOKENIZERS`.
      comes_with: where one is from, of a kind that is not learned.
      vocab_size: ids there are, special ones included.
      begin_id: id of the begin token; None: it has none.
      separator_id: id of the document separator; None: it has none.
    """

    kind: str
    comes_with: str
    vocab_size: int
    begin_id: int | None
    separator_id: int | None

    def __init__(self, vocab_size: int, begin_id: int | None, separator_id: int | None):
        self.begin_id, self.separator_id, self.vocab_size = begin_id, separator_id, vocab_size

    @classmethod
    def train(cls, documents: Sequence[bytes], vocab_size: int) -> "Tokenizer":
        """Makes one for these documents, of at most `vocab_size` tokens where there is a choice; raises UserError for
        a kind that is not learned.
        """
        raise UserError(f"data.tokenizer={cls.kind}: comes with {cls.comes_with}")

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

    @property
    def padding_id(self) -> int:
        """What fills a row where there is no text; such places have no weight."""
        return 0 if self.separator_id is None else self.separator_id

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """int32 [vocab_size]: how many bytes of text each token stands for."""
        return np.array([len(self.decode([token])) for token in range(self.vocab_size)], np.int32)

    def _text(self, document: bytes) -> str:
        try:
            return document.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"tokenizer={self.kind}: the text is not UTF-8 at byte {error.start}; use tokenizer=bytes"
            ) from None

    def _encode_in_pieces(self, documents: Sequence[bytes], encode: Callable) -> Iterator[np.ndarray]:
        """The ids of documents, long ones of which go to `encode`, texts -> ids of each, in pieces."""
        for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
            texts = [list(_pieces(self._text(document))) for document in documents[start : start + _DOCUMENTS_AT_ONCE]]
            ids = iter(encode([piece for pieces in texts for piece in pieces]))
            for pieces in texts:
                yield np.concatenate([np.zeros(0, np.int32), *itertools.islice(ids, len(pieces))])

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """kind, vocab_size and the sha256 of `to_json`."""
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "sha256": hashlib.sha256(self.to_json().encode()).hexdigest(),
        }

    @staticmethod
    def from_json(text: str) -> "Tokenizer":
        """The tokenizer that `to_json` wrote; raises UserError for another text."""
        try:
            values = json.loads(text)
            if values["kind"] not in TOKENIZERS:
                raise unknown_name("tokenizer", values["kind"], TOKENIZERS)
            return TOKENIZERS[values.pop("kind")](**values)
        except UserError:
            raise
        except Exception as error:  # the library raises bare ones
            why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            raise UserError(f"tokenizer: what is stored makes none ({why})") from None


class BytesTokenizer(Tokenizer):
    """Token b is byte b; keeps any bytes, UTF-8 or not."""

    kind = "bytes"

    def __init__(self):
        super().__init__(258, 256, 257)

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


class LibraryTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library, with the special tokens of the model it comes with."""

    kind = "library"
    comes_with = "a pretrained model; name one in run.init_from, or in --tokenizer of `oasis_jax prepare`"

    def __init__(self, model: str, begin_id: int | None = None, separator_id: int | None = None):
        """Makes a tokenizer of the library's own JSON, kept letter by letter so that the identity outlives changes of
        its format.
        """
        self._model = model
        self._library = tokenizers.Tokenizer.from_str(model)
        self._library.encode_special_tokens = True  # a text that spells one does not turn into it
        self._library.no_truncation()
        self._library.no_padding()
        ids = self._library.get_vocab(with_added_tokens=True).values()
        super().__init__(max(ids, default=-1) + 1, begin_id, separator_id)

    @property
    def library_json(self) -> str:
        """The library's own JSON, the content of a tokenizer.json."""
        return self._model

    def encode_all(self, documents):
        if self._in_pieces:
            yield from self._encode_in_pieces(documents, self._ids)
            return
        for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
            yield from self._ids([self._text(document) for document in documents[start : start + _DOCUMENTS_AT_ONCE]])

    @functools.cached_property
    def _in_pieces(self) -> bool:
        """Whether a text gives the same ids cut between words: words are split before anything is added to them."""
        values = json.loads(self._model)
        normalizer, words = values.get("normalizer"), json.dumps(values.get("pre_tokenizer"))
        plain = normalizer is None or normalizer.get("type") in ("NFC", "NFD", "NFKC", "NFKD")
        return plain and '"ByteLevel"' in words and '"add_prefix_space": true' not in words

    def _ids(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        for start in range(0, len(texts), _DOCUMENTS_AT_ONCE):
            some = texts[start : start + _DOCUMENTS_AT_ONCE]
            for encoding in self._library.encode_batch_fast(some, add_special_tokens=False):
                yield np.array(encoding.ids, np.int32)

    @functools.cached_property
    def specials(self) -> tuple[str, ...]:
        """The special tokens as they are written."""
        return tuple(token.content for token in self._library.get_added_tokens_decoder().values() if token.special)

    def encode_with_specials(self, text: str) -> np.ndarray:
        """The int32 ids of a text in which special tokens are written out, as a chat template writes them."""
        return np.array(self._with_specials.encode(text, add_special_tokens=False).ids, np.int32)

    @functools.cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        library = tokenizers.Tokenizer.from_str(self._model)
        library.no_truncation()
        library.no_padding()
        return library

    @functools.cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        """The bytes of every ordinary token, by id."""
        special = {i for i, token in self._library.get_added_tokens_decoder().items() if token.special}
        byte_level = '"ByteLevel"' in self._model
        convert = _byte_level_bytes if byte_level else _sentencepiece_bytes
        vocabulary = self._library.get_vocab(with_added_tokens=True).items()
        return {i: convert(token) for token, i in vocabulary if i not in special}

    def decode(self, ids):
        return b"".join(self._token_bytes.get(i, b"") for i in np.asarray(ids).tolist())

    def to_json(self):
        return json.dumps(
            {"kind": self.kind, "model": self._model, "begin_id": self.begin_id, "separator_id": self.separator_id}
        )


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte behind each character in which byte-level tokens are written."""
    # Printable Latin-1 stands for itself, the other bytes, in order, for the characters from U+0100 on.
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    found = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = [byte for byte in range(256) if chr(byte) not in found]
    return found | dict(zip(alphabet[len(found) :], others))


def _byte_level_bytes(token: str) -> bytes:
    table = _byte_of()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()  # an added token, which is written as it is


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces that are not much longer than `_PIECE`, cut between words where there are any."""
    start = 0
    while len(text) - start > 2 * _PIECE:
        found = _BETWEEN_WORDS.search(text, start + _PIECE, start + 2 * _PIECE)
        end = found.start() if found else start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]


class BPETokenizer(LibraryTokenizer):
    """Byte-level byte-pair encoding trained here; every UTF-8 text comes back exactly, however long its words are.

    Its specials follow the library's vocabulary and are no part of it: there a text that spells one would turn into it.
    """

    kind = "bpe"

    def __init__(self, model: str):
        super().__init__(model)
        ordinary = self.vocab_size
        self.begin_id, self.separator_id, self.vocab_size = ordinary, ordinary + 1, ordinary + 2

    @classmethod
    def train(cls, documents, vocab_size):
        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        texts = (piece for document in documents for piece in _pieces(document.decode()))
        library.train_from_iterator(texts, trainer)
        return cls(library.to_str())

    def encode_all(self, documents):
        return self._encode_in_pieces(documents, self._ids)

    def to_json(self):
        return json.dumps({"kind": self.kind, "model": self._model})


class SentencePieceTokenizer(Tokenizer):
    """A model of sentencepiece, which normalizes text as it says itself; its control tokens never come out of one."""

    kind = "sentencepiece"
    comes_with = "a corpus that was prepared with --tokenizer FILE.model"

    def __init__(self, model: str):
        """Reads the base64 of a .model file; raises UserError where it is none."""
        library = optional("sentencepiece", "data.tokenizer=sentencepiece")
        self._model, self._library = model, library.SentencePieceProcessor()
        try:
            self._library.LoadFromSerializedProto(base64.b64decode(model))
        except RuntimeError as error:
            raise UserError(f"data.tokenizer=sentencepiece: no model: {' '.join(str(error).split())[:120]}") from None
        begin, end = self._library.bos_id(), self._library.eos_id()  # -1: there is none
        super().__init__(len(self._library), begin if begin >= 0 else None, end if end >= 0 else None)

    @classmethod
    def from_file(cls, path: pathlib.Path) -> "SentencePieceTokenizer":
        """The tokenizer of a .model file."""
        return cls(base64.b64encode(read_bytes(path)).decode())

    @property
    def padding_id(self) -> int:
        return self._library.pad_id() if self._library.pad_id() >= 0 else super().padding_id

    def encode_all(self, documents):
        for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
            texts = [self._text(document) for document in documents[start : start + _DOCUMENTS_AT_ONCE]]
            yield from (np.array(ids, np.int32) for ids in self._library.Encode(texts))

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        library, ids = self._library, range(len(self._library))
        silent = [library.IsControl(i) or library.IsUnknown(i) for i in ids]
        try:
            return [b"" if silent[i] else _sentencepiece_bytes(library.IdToPiece(i)) for i in ids]
        except UnicodeDecodeError:
            raise UserError("data.tokenizer=sentencepiece: no model: a token of it is not UTF-8") from None

    def decode(self, ids):
        tokens = self._token_bytes
        return b"".join(tokens[i] for i in np.asarray(ids).tolist() if i < len(tokens))

    def to_json(self):
        return json.dumps({"kind": self.kind, "model": self._model})


class TiktokenTokenizer(Tokenizer):
    """Byte pairs of tiktoken: the ranks of tokens, a pattern of words, and special tokens."""

    kind = "tiktoken"
    comes_with = "a corpus that was prepared with --tokenizer tiktoken:NAME"
    _BEGIN, _END = ("<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"), ("<|end_of_text|>", "<|endoftext|>")

    def __init__(self, ranks: dict[str, int], pattern: str, specials: dict[str, int]):
        """Takes ranks as base64 of a token's bytes -> id."""
        library = optional("tiktoken", "data.tokenizer=tiktoken")
        self._fields = {"ranks": ranks, "pattern": pattern, "specials": specials}
        self._tokens = {i: base64.b64decode(token) for token, i in ranks.items()}
        if missing := set(range(256)) - {token[0] for token in self._tokens.values() if len(token) == 1}:
            raise UserError(f"data.tokenizer=tiktoken: no token is byte {min(missing)} alone, which texts are made of")
        self._library = library.Encoding(
            name="oasis_jax",
            pat_str=pattern,
            mergeable_ranks={token: i for i, token in self._tokens.items()},
            special_tokens=specials,
        )
        begin, end = (
            next((specials[name] for name in some if name in specials), None) for some in (self._BEGIN, self._END)
        )
        super().__init__(self._library.n_vocab, begin, end)

    @classmethod
    def named(cls, name: str) -> "TiktokenTokenizer":
        """One that tiktoken knows, such as gpt2 or cl100k_base, which it fetches where it has not yet; raises UserError
        where there is none or it cannot be fetched.
        """
        library = optional("tiktoken", f"--tokenizer tiktoken:{name}")
        if name not in library.list_encoding_names():
            raise unknown_name("--tokenizer tiktoken:", name, library.list_encoding_names())
        try:
            found = library.get_encoding(name)
        except Exception as error:  # of the libraries that fetch it
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise UserError(
                f"--tokenizer tiktoken:{name}: cannot be fetched ({reason}); set TIKTOKEN_CACHE_DIR to a folder that "
                "has it, or give a folder with tokenizer.json"
            ) from None
        ranks = {base64.b64encode(token).decode(): i for token, i in found._mergeable_ranks.items()}
        return cls(ranks, found._pat_str, dict(found._special_tokens))

    def encode_all(self, documents):
        encode = lambda texts: (np.array(ids, np.int32) for ids in self._library.encode_ordinary_batch(texts))
        return self._encode_in_pieces(documents, encode)

    def decode(self, ids):
        return b"".join(self._tokens.get(i, b"") for i in np.asarray(ids).tolist())

    def to_json(self):
        return json.dumps({"kind": self.kind, **self._fields})


# A new kind of tokenizer is one class and one line here.
TOKENIZERS: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (BytesTokenizer, BPETokenizer, LibraryTokenizer, SentencePieceTokenizer, TiktokenTokenizer)
}
