"""What the text corpora share: files of documents, the token stream."""

import codecs
import dataclasses
import functools
import hashlib
import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from oasis_jax.config import DataConfig
from oasis_jax.config.run import LARGEST_HOLDOUT
from oasis_jax.data.corpus import Corpus
from oasis_jax.data.packing import PackedSource, Stream, pack
from oasis_jax.data.split import Split, hold_out
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
      empty: how many texts in it are.
    """

    name: str
    sha256: str
    size: int
    documents: Sequence[bytes]
    empty: int

    @classmethod
    def from_content(cls, name: str, content: bytes, documents: Sequence[bytes]) -> "TextFile":
        filled = [document for document in documents if document]
        return cls(name, hashlib.sha256(content).hexdigest(), len(content), filled, len(documents) - len(filled))


def read(path: pathlib.Path, where: str) -> bytes:
    """The bytes of a file; an unreadable one is the user's to mend."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot read {str(path)!r}: {error.strerror}") from None


def text_corpus(
    files: Sequence[TextFile],
    config: DataConfig,
    tokenizer: Tokenizer | None,
    *,
    identity: dict,
    divide: Callable[[float], Split] | None = None,
) -> Corpus:
    """Splits files, tokenizes them and cuts them into windows.

    Args:
      files: in the order in which they are joined.
      config: reads tokenizer, bpe_vocab_size, sequence_length, begin_token, packing and holdout_fraction.
      tokenizer: None: made as config says, a BPE from the training part alone.
      identity: what the caller knows about the corpus; joined by sha256 (over names and contents), bytes, files,
        holdout (its own sha256 over what is held out) and split.
      divide: holdout_fraction -> split; None: `hold_out` of all documents.
    """
    if not any(file.documents for file in files):
        size = sum(file.size for file in files)
        raise UserError(f"data.corpus: there is no text in it ({len(files)} files, {size} bytes)")
    for file in files:
        for document in file.documents:
            require_utf8(document, file.name, tokenizer.kind if tokenizer else config.tokenizer)
    divide = divide or functools.partial(hold_out, [document for file in files for document in file.documents])

    def parts(fraction: float) -> tuple[Split, Tokenizer, PackedSource, PackedSource]:
        split = divide(fraction)
        used = tokenizer or TOKENIZERS[config.tokenizer].train(split.train, config.bpe_vocab_size)
        return split, used, *(pack(stream_of(part, used), config) for part in (split.train, split.heldout))

    split, used, train, heldout = parts(config.holdout_fraction)
    if not (len(train) and len(heldout)):
        raise _too_short(
            split, train, heldout, config.holdout_fraction, lambda fraction: all(map(len, parts(fraction)[2:]))
        )
    holdout = {
        "fraction": config.holdout_fraction,
        "bytes": sum(map(len, split.heldout)),
        "documents": len(split.heldout),
        "sha256": split.sha256,
    }
    summary = {
        "sha256": digest(files),
        "bytes": sum(file.size for file in files),
        "files": len(files),
        "holdout": holdout,
        "split": split.rule,
    }
    empty = sum(file.empty for file in files)
    notes = [f"left out: {empty} empty documents"] if empty else []
    holding = [file.name for file in files if any(b"\0" in document for document in file.documents)]
    if holding:
        notes.append(f"NUL bytes, kept as text: in {len(holding)} of {len(files)} files, such as {holding[0]!r}")
    return Corpus(identity | summary, used, train, heldout, notes=(*notes, *split.notes))


def digest(files: Sequence[TextFile]) -> str:
    """The sha256 over the names and contents of files."""
    return hashlib.sha256(
        "".join(f"{file.name}\0{file.sha256}\n" for file in files).encode("utf-8", "surrogateescape")
    ).hexdigest()


def require_utf8(document: bytes, name: str, kind: str) -> None:
    """Raises UserError, naming the file, for a text that a tokenizer of this kind cannot take."""
    if kind == "bytes":
        return
    try:
        document.decode()
    except UnicodeDecodeError as error:
        marked = document.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        how = "it begins as UTF-16 does: convert it, or " if marked else ""
        raise UserError(
            f"tokenizer {kind!r} needs UTF-8, but {name!r} is not at byte {error.start}; {how}take bytes "
            "(data.tokenizer=bytes, --tokenizer bytes), which keeps any"
        ) from None


def _too_short(
    split: Split, train: PackedSource, heldout: PackedSource, asked: float, works: Callable[[float], bool]
) -> UserError:
    """The error for a part that holds no example, with the numbers that help.

    Args:
      asked: data.holdout_fraction.
      works: whether both parts hold an example with another data.holdout_fraction.
    """
    name, short = ("held-out", heldout) if len(train) else ("training", train)
    remedies = []
    longest = min(train.places, heldout.places)
    if longest >= 2:
        remedies.append(f"data.sequence_length={longest} or less")
    # The share that gives the short part what it needs and a tenth more, rounded away from what is too little.
    count = len(train.tokens) + len(heldout.tokens)
    needed = train.length + len(short.tokens) - short.places
    share = 1.1 * needed / count
    fraction = math.ceil(share * 1000) / 1000 if short is heldout else math.floor((1 - share) * 1000) / 1000
    if 0 < fraction <= LARGEST_HOLDOUT and works(fraction):
        remedies.append(f"data.holdout_fraction={fraction:g}")
    size = sum(map(len, [*split.train, *split.heldout]))
    scale = size / count / min(asked, 1 - asked)  # bytes for a token in each part
    remedies.append(f"a corpus of about {math.ceil(1.2 * scale * needed)} bytes instead of {size}")
    return UserError(
        f"data.sequence_length: {train.length} is more than the {name} part's {len(short.tokens)} tokens can fill "
        f"once; use {', or '.join(remedies)} ({split.rule})"
    )


def token_stream(documents: Sequence[bytes], tokenizer: Tokenizer) -> np.ndarray:
    """All documents as one array of ids, uint16 where they fit, with the separator, where there is one, between
    documents."""
    return stream_of(documents, tokenizer).tokens


def stream_of(documents: Sequence[bytes], tokenizer: Tokenizer) -> Stream:
    """The documents' tokens, see `token_stream`, and how long each of them is."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    separator = np.array([] if tokenizer.separator_id is None else [tokenizer.separator_id], dtype)
    pieces, lengths = [np.zeros(0, dtype)], []
    for ids in tokenizer.encode_all(documents):
        pieces += [ids.astype(dtype), separator]
        lengths.append(len(ids))
    tokens = np.concatenate(pieces[:-1] if len(pieces) > 1 else pieces)
    return Stream(tokens, lambda: np.array(lengths, np.int64), tokenizer)
