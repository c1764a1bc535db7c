"""Which documents a corpus has and which of them are held out, found by reading all of it once."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from oasis_jax.config import DataConfig
from oasis_jax.data.files import attempting
from oasis_jax.data.sources import Piece
from oasis_jax.data.split import choose, content_hash, halves
from oasis_jax.data.tokenizers import Tokenizer
from oasis_jax.errors import UserError


@dataclasses.dataclass
class Survey:
    """Every different document of a corpus, in order: in which piece and which text of it, its size, what is cut."""

    pieces: list[Piece]
    places: list[tuple[int, int]]
    sizes: list[int]
    chosen: set[int]
    cut: dict[int, int]
    digest: str
    bytes: int
    notes: list[str]

    def part(self, name: str) -> list[int]:
        """The documents of which something is in a part."""
        heldout = self.chosen | set(self.cut)
        if name == "heldout":
            return sorted(heldout)
        return [i for i in range(len(self.places)) if i not in self.chosen]

    def shards(self, part: str, shard_bytes: int) -> list[list["Document"]]:
        """A part's documents in groups of about so many bytes."""
        groups, size = [], shard_bytes
        for i in self.part(part):
            if size >= shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(
                Document(*self.places[i], self.sizes[i], i in self.chosen, self.cut.get(i, 0), part == "heldout")
            )
            size += self.sizes[i]
        return groups


class Document(NamedTuple):
    """Where a document is and how much of it is meant: the side of a split that `halves` makes of it."""

    piece: int
    at: int
    size: int
    chosen: bool
    tail: int
    heldout: bool


class Found(NamedTuple):
    """What a piece holds: sha256 and size of it, hash and size of each text, what was left out of it, and whether there
    are NUL bytes in its texts.
    """

    sha256: str
    size: int
    texts: list[tuple[bytes, int]]
    corrupt: list[str]
    nul: bool


def look(job: "Job", piece: Piece) -> Found:
    """Reads a piece and keeps of its texts their hashes alone."""
    config, corrupt = job.config, []
    kind = job.tokenizer.kind if job.tokenizer else config.tokenizer
    read = piece.read(config.text_key, kind, attempting(config, corrupt))
    texts = [(content_hash(text), len(text)) for text in read.documents]
    return Found(read.sha256, read.size, texts, corrupt, any(b"\0" in text for text in read.documents))


def survey(pieces: Sequence[Piece], found: Iterable[Found], config: DataConfig, say: Callable[[str], None]) -> Survey:
    """Joins what was found in the pieces, in their order, and chooses what is held out.

    Raises:
      UserError: there is no text, or a piece that cannot be read and must not be left out.
    """
    places, sizes, seen, corrupt, holding, digest = [], [], {}, [], [], hashlib.sha256()
    repeated = empty = total = 0
    for number, (piece, read) in enumerate(zip(pieces, found)):
        digest.update(f"{piece.name}\0{read.sha256}\n".encode("utf-8", "surrogateescape"))
        total += read.size
        corrupt += read.corrupt
        holding += [piece.name] if read.nul else []
        for at, (key, size) in enumerate(read.texts):
            empty += not size
            repeated += bool(size) and key in seen
            if size and key not in seen:
                seen[key] = len(places)
                places.append((number, at))
                sizes.append(size)
    notes = [f"left out: {what}" for what in corrupt]
    notes += [f"left out: {empty} empty documents"] if empty else []
    notes += [f"left out: {repeated} documents, which repeat the content of others"] if repeated else []
    if holding:
        notes.append(f"NUL bytes, kept as text: in {len(holding)} of {len(pieces)} files, such as {holding[0]!r}")
    if not places:
        what = f"{empty} of their documents are empty, {len(corrupt)} files or documents were left out"
        raise UserError(f"--source: there is no text in {len(pieces)} files ({what})")
    chosen, cut = choose(list(seen), sizes, config.holdout_fraction)
    for note in notes:
        say(note)
    say(f"{len(pieces)} files, {len(places)} documents, {sum(sizes)} bytes of text")
    return Survey(list(pieces), places, sizes, chosen, cut, digest.hexdigest(), total, notes)


class Reader:
    """Reads documents again. Pieces without any are not read; the last one read stays in memory, for the next shard."""

    def __init__(self, pieces: Sequence[Piece], config: DataConfig):
        self.pieces, self._config, self._number, self._texts = pieces, config, -1, []

    def texts(self, documents: Sequence[Document]) -> Iterator[bytes]:
        """Of each document what is meant of it; raises UserError where it is not as it was when it was first read."""
        for document in documents:
            piece = self.pieces[document.piece]
            if document.piece != self._number:
                read = piece.read(self._config.text_key, "bytes", attempting(self._config, []))
                self._number, self._texts = document.piece, read.documents
            if document.at >= len(self._texts) or len(self._texts[document.at]) != document.size:
                raise UserError(f"{piece.name}: was changed while it was read; start again in another folder")
            yield halves(self._texts[document.at], document.chosen, document.tail)[document.heldout]


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
