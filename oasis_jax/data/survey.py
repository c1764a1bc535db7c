"""Which documents a corpus has and which of them are held out, found by reading all of it once."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from oasis_jax.config import DataConfig
from oasis_jax.data.files import attempting
from oasis_jax.data.sources import Piece
from oasis_jax.data.split import choose, content_hash, halves
from oasis_jax.data.tokenizers import Tokenizer
from oasis_jax.errors import UserError

# Where a document is and how much of it is meant: the side of a split that `halves` makes of it. Arrays, since a data
# set of sentences has a hundred million of them.
DOCUMENT = np.dtype(
    [("piece", "<i4"), ("at", "<i8"), ("size", "<i8"), ("chosen", "?"), ("tail", "<i8"), ("heldout", "?")]
)
Documents = np.ndarray  # of DOCUMENT


@dataclasses.dataclass
class Survey:
    """Every different document of a corpus, in order: in which piece and which text of it, its size, what is cut."""

    pieces: list[Piece]
    documents: Documents  # as they are where they are trained on
    digest: str
    bytes: int
    notes: list[str]

    @property
    def size(self) -> int:
        """Of all documents in bytes."""
        return int(self.documents["size"].sum())

    def part(self, name: str) -> Documents:
        """The documents of which something is in a part."""
        if name == "heldout":
            some = self.documents[self.documents["chosen"] | (self.documents["tail"] > 0)]
            some["heldout"] = True
            return some
        return self.documents[~self.documents["chosen"]]

    def shards(self, part: str, shard_bytes: int) -> list[Documents]:
        """A part's documents in groups of about so many bytes."""
        documents = self.part(part)
        ends, groups, start = np.cumsum(documents["size"]), [], 0
        while start < len(documents):
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + shard_bytes)) + 1
            groups.append(documents[start:stop])
            start = stop
        return groups


class Found(NamedTuple):
    """What a piece holds: sha256 and size of it, the hashes of its texts, one after another, and their sizes, what was
    left out of it, and whether there are NUL bytes in its texts.
    """

    sha256: str
    size: int
    keys: bytes
    sizes: Int[np.ndarray, " texts"]
    corrupt: list[str]
    nul: bool


def look(job: "Job", piece: Piece) -> Found:
    """Reads a piece and keeps of its texts their hashes alone."""
    config, corrupt = job.config, []
    kind = job.tokenizer.kind if job.tokenizer else config.tokenizer
    read = piece.read(config.text_key, kind, attempting(config, corrupt))
    keys, sizes = b"".join(map(content_hash, read.documents)), np.array(list(map(len, read.documents)), np.int64)
    return Found(read.sha256, read.size, keys, sizes, corrupt, any(b"\0" in text for text in read.documents))


def survey(pieces: Sequence[Piece], found: Iterable[Found], config: DataConfig, say: Callable[[str], None]) -> Survey:
    """Joins what was found in the pieces, in their order, and chooses what is held out.

    Raises:
      UserError: there is no text, or a piece that cannot be read and must not be left out.
    """
    found, digest = list(found), hashlib.sha256()
    for piece, read in zip(pieces, found):
        digest.update(f"{piece.name}\0{read.sha256}\n".encode("utf-8", "surrogateescape"))
    corrupt = [what for read in found for what in read.corrupt]
    holding = [piece.name for piece, read in zip(pieces, found) if read.nul]
    keys, documents, empty, repeated = _different(found)
    notes = [f"left out: {what}" for what in corrupt]
    notes += [f"left out: {empty} empty documents"] if empty else []
    notes += [f"left out: {repeated} documents, which repeat the content of others"] if repeated else []
    if holding:
        notes.append(f"NUL bytes, kept as text: in {len(holding)} of {len(pieces)} files, such as {holding[0]!r}")
    if not len(documents):
        what = f"{empty} of their documents are empty, {len(corrupt)} files or documents were left out"
        raise UserError(f"--source: there is no text in {len(pieces)} files ({what})")
    chosen, cut = choose(keys, documents["size"], config.holdout_fraction)
    documents["chosen"][list(chosen)] = True
    for i, tail in cut.items():
        documents["tail"][i] = tail
    for note in notes:
        say(note)
    say(f"{len(pieces)} files, {len(documents)} documents, {documents['size'].sum()} bytes of text")
    return Survey(list(pieces), documents, digest.hexdigest(), sum(read.size for read in found), notes)


def _different(found: Sequence[Found]) -> tuple[np.ndarray, Documents, int, int]:
    """Hashes and places of all texts that are not empty and not there before, how many are empty, how many repeat."""
    keys = np.frombuffer(b"".join(read.keys for read in found), "S32")
    sizes = np.concatenate([np.zeros(0, np.int64), *(read.sizes for read in found)])
    filled = np.flatnonzero(sizes)
    _, first = np.unique(keys[filled], return_index=True)
    kept = filled[np.sort(first)]
    counts = [len(read.sizes) for read in found]
    starts = np.cumsum(counts) - counts
    documents = np.zeros(len(kept), DOCUMENT)
    documents["piece"] = np.repeat(np.arange(len(found)), counts)[kept]
    documents["at"] = kept - starts[documents["piece"]]
    documents["size"] = sizes[kept]
    return keys[kept], documents, len(sizes) - len(filled), len(filled) - len(kept)


class Reader:
    """Reads documents again. Pieces without any are not read; the last one read stays in memory, for the next shard."""

    def __init__(self, pieces: Sequence[Piece], config: DataConfig):
        self.pieces, self._config, self._number, self._texts = pieces, config, -1, []

    def texts(self, documents: Documents) -> Iterator[bytes]:
        """Of each document what is meant of it; raises UserError where it is not as it was when it was first read."""
        for number, at, size, chosen, tail, heldout in documents.tolist():
            piece = self.pieces[number]
            if number != self._number:
                read = piece.read(self._config.text_key, "bytes", attempting(self._config, []))
                self._number, self._texts = number, read.documents
            if at >= len(self._texts) or len(self._texts[at]) != size:
                raise UserError(f"{piece.name}: was changed while it was read; start again in another folder")
            yield halves(self._texts[at], chosen, tail)[heldout]


class Job:
    """What the workers of a preparation share. Can be pickled: a tokenizer goes as its JSON.

    Attributes:
      config: how texts are read.
      tokenizer: None where it is not made yet.
      reader: of the documents.
    """

    def __init__(self, pieces: Sequence[Piece], config: DataConfig, tokenizer: Tokenizer | None):
        self.config, self.tokenizer, self.reader = config, tokenizer, Reader(pieces, config)

    def __reduce__(self):
        text = None if self.tokenizer is None else self.tokenizer.to_json()
        return _job, (self.reader.pieces, self.config, text)


def _job(pieces: Sequence[Piece], config: DataConfig, tokenizer: str | None) -> Job:
    return Job(pieces, config, None if tokenizer is None else Tokenizer.from_json(tokenizer))
