"""What the text corpora share: files of documents, the held-out split, the token stream and its windows."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from oasis_jax.config import DataConfig
from oasis_jax.data.corpus import Corpus
from oasis_jax.data.tokenizers import TOKENIZERS, Tokenizer
from oasis_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of a corpus.

    Attributes:
      name: relative to the corpus, with / between folders.
      sha256: of the file's bytes.
      size: of the file in bytes.
      documents: the texts in it that are not empty, as bytes.
    """

    name: str
    sha256: str
    size: int
    documents: Sequence[bytes]

    @classmethod
    def from_content(cls, name: str, content: bytes, documents: Sequence[bytes]) -> "TextFile":
        return cls(
            name, hashlib.sha256(content).hexdigest(), len(content), [document for document in documents if document]
        )

    @property
    def text_size(self) -> int:
        return sum(map(len, self.documents))


@dataclasses.dataclass(frozen=True)
class Split:
    """Documents to train on, documents kept back, and in words how they were chosen."""

    train: Sequence[bytes]
    heldout: Sequence[bytes]
    rule: str


def read(path: pathlib.Path, where: str) -> bytes:
    """The bytes of a file; an unreadable one is the user's to mend."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot read {str(path)!r}: {error.strerror}") from None


def text_corpus(
    files: Sequence[TextFile], config: DataConfig, tokenizer: Tokenizer | None, *, identity: dict
) -> Corpus:
    """Splits files, tokenizes them and cuts them into windows.

    Args:
      files: in the order in which they are joined.
      config: reads tokenizer, bpe_vocab_size, sequence_length, begin_token and holdout_fraction.
      tokenizer: None: made as config says, a BPE from the training part alone.
      identity: what the caller knows about the corpus; joined by sha256 (over names and contents), bytes, files,
        holdout and split.
    """
    kind = tokenizer.kind if tokenizer else config.tokenizer
    if kind != "bytes":
        _require_utf8(files, kind)
    split = hold_out(files, config.holdout_fraction)
    tokenizer = tokenizer or TOKENIZERS[kind].train(split.train, config.bpe_vocab_size)
    holdout = {
        "fraction": config.holdout_fraction,
        "bytes": sum(map(len, split.heldout)),
        "documents": len(split.heldout),
    }
    summary = {
        "sha256": digest(files),
        "bytes": sum(file.size for file in files),
        "files": len(files),
        "holdout": holdout,
        "split": split.rule,
    }
    begin_id = tokenizer.begin_id if config.begin_token else None
    train = Windows(token_stream(split.train, tokenizer), config.sequence_length, begin_id)
    heldout = Windows(token_stream(split.heldout, tokenizer), config.sequence_length, begin_id)
    _require_example(train, "training", "or a longer corpus", split.rule)
    _require_example(heldout, "held-out", "a larger data.holdout_fraction, or a longer corpus", split.rule)
    return Corpus(identity | summary, tokenizer, train, heldout)


def digest(files: Sequence[TextFile]) -> str:
    """The sha256 over the names and contents of files."""
    return hashlib.sha256(
        "".join(f"{file.name}\0{file.sha256}\n" for file in files).encode("utf-8", "surrogateescape")
    ).hexdigest()


def _require_utf8(files: Sequence[TextFile], kind: str) -> None:
    for file in files:
        for document in file.documents:
            try:
                document.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"data.tokenizer={kind} needs UTF-8, but {file.name!r} is not at byte {error.start}; use "
                    "data.tokenizer=bytes, which keeps any bytes"
                ) from None


def _require_example(windows: "Windows", part: str, remedy: str, rule: str) -> None:
    if not len(windows):
        raise UserError(
            f"data.sequence_length: {windows.length} is more than the {part} part's {len(windows.tokens)} tokens "
            "can fill once; "
            f"use a smaller data.sequence_length, {remedy} ({rule})"
        )


def hold_out(files: Sequence[TextFile], fraction: float) -> Split:
    """Keeps about `fraction` of the bytes back, the same ones for every seed, sequence length and tokenizer.

    Several files are split by file. A single file gives the tail of its documents, a single document the tail of its
    bytes.
    """
    filled = [file for file in files if file.documents]
    if not filled:
        raise UserError(
            f"data.corpus: there is no text in it ({len(files)} files, {sum(file.size for file in files)} bytes)"
        )
    if len(filled) > 1:
        return _split_files(filled, fraction)
    if len(filled[0].documents) > 1:
        return _split_documents(filled[0].documents, fraction)
    return _split_bytes(filled[0].documents[0], fraction)


def _split_files(files: Sequence[TextFile], fraction: float) -> Split:
    """Walks the files in the order of their names' hashes and keeps back every one that still fits."""
    total = sum(file.text_size for file in files)
    chosen: set[str] = set()
    size = 0
    for file in sorted(files, key=lambda file: hashlib.sha256(file.name.encode("utf-8", "surrogateescape")).digest()):
        if size + file.text_size <= fraction * total:
            chosen.add(file.name)
            size += file.text_size
    how = "taken in the order of their names' sha256 as long as they fit"
    if not chosen:
        smallest = min(files, key=lambda file: (file.text_size, file.name))
        chosen, size, how = (
            {smallest.name},
            smallest.text_size,
            f"the smallest, as none is as small as {fraction} of the text",
        )
    train = [document for file in files if file.name not in chosen for document in file.documents]
    heldout = [document for file in files if file.name in chosen for document in file.documents]
    return Split(
        train, heldout, f"by file: {len(chosen)} of {len(files)} files ({size} of {total} bytes) held out, {how}"
    )


def _split_documents(documents: Sequence[bytes], fraction: float) -> Split:
    total = sum(map(len, documents))
    first, size = len(documents), 0
    while first > 1 and size < fraction * total:
        first -= 1
        size += len(documents[first])
    rule = (
        f"within the only file: its last {len(documents) - first} of {len(documents)} documents ({size} "
        f"of {total} bytes) held out"
    )
    return Split(documents[:first], documents[first:], rule)


def _split_bytes(text: bytes, fraction: float) -> Split:
    """Cuts between two UTF-8 characters, where the bytes are UTF-8 at all."""
    cut = len(text) - max(1, round(fraction * len(text)))
    for _ in range(3):
        if cut < len(text) and text[cut] & 0xC0 == 0x80:
            cut += 1
    return Split(
        [text[:cut]],
        [text[cut:]],
        f"within the only document: its last {len(text) - cut} of {len(text)} bytes held out",
    )


def token_stream(documents: Sequence[bytes], tokenizer: Tokenizer) -> np.ndarray:
    """All documents as one array of ids, uint16 where they fit, with the separator, where there is one, between
    documents."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    separator = np.array([] if tokenizer.separator_id is None else [tokenizer.separator_id], dtype)
    pieces = [np.zeros(0, dtype)]
    for ids in tokenizer.encode_all(documents):
        pieces += [ids.astype(dtype), separator]
    return np.concatenate(pieces[:-1] if len(pieces) > 1 else pieces)


class Windows:
    """A token stream cut into examples of T tokens, without overlap; a tail that fills no window is left out.

    An example is {"inputs": int32 [T], "targets": int32 [T], "weights": float32 [T], all 1}. With a begin token the
    inputs are [begin, x_0 .. x_{T-2}] and the targets x_0 .. x_{T-1}; without one they are x_0 .. x_{T-1} and x_1 ..
    x_T.
    """

    def __init__(self, tokens: np.ndarray, length: int, begin_id: int | None):
        self.tokens, self.length, self.begin_id = tokens, length, begin_id

    def __len__(self) -> int:
        # Without a begin token the last target lies one token past its window.
        return (len(self.tokens) - (self.begin_id is None)) // self.length if len(self.tokens) else 0

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start = index * self.length
        if self.begin_id is None:
            window = self.tokens[start : start + self.length + 1].astype(np.int32)
        else:
            window = np.concatenate([[self.begin_id], self.tokens[start : start + self.length]]).astype(np.int32)
        return {"inputs": window[:-1], "targets": window[1:], "weights": np.ones(self.length, np.float32)}
