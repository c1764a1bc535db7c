"""What `oasis_jax prepare` reads: files that a glob matches, and data sets of a hub or of a folder that the package
`datasets` knows.

A source is a list of pieces, each of which can be read alone and fits into memory.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from oasis_jax.data.files import documents_of, matching_files, named
from oasis_jax.data.formats import optional
from oasis_jax.errors import UserError, unknown_name

SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst")
HUB = "hf:"
_ROWS = 20_000  # of a data set that make a piece
# Data sets that people know by a short name -> where they lie on the hub, and the branch of it that holds tables.
_SHORT = {
    "wikitext": ("Salesforce/wikitext", None),
    "wiki40b": ("google/wiki40b", None),
    "bookcorpus": ("bookcorpus/bookcorpus", "refs/convert/parquet"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", None),
}


class Read(NamedTuple):
    """What is in a piece: sha256 of it as it lies there, its size in bytes, and its texts, empty ones included."""

    sha256: str
    size: int
    documents: Sequence[bytes]


class Piece(Protocol):
    """A part of a source. Can be pickled."""

    name: str

    def read(self, key: str, tokenizer: str, attempt: Callable) -> Read:
        """The texts under a key or in a column; see `oasis_jax.data.files.documents_of`."""


@dataclasses.dataclass(frozen=True)
class File:
    """A file of text."""

    name: str
    path: pathlib.Path

    def read(self, key: str, tokenizer: str, attempt: Callable) -> Read:
        content, documents = documents_of(self.path, self.name, key, tokenizer, attempt) or (b"", [])
        return Read(hashlib.sha256(content).hexdigest(), len(content), documents)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of a column of a data set."""

    name: str
    table: Any
    column: str
    start: int
    stop: int

    def read(self, key: str, tokenizer: str, attempt: Callable) -> Read:
        del key, tokenizer, attempt  # the column is known, and its texts are UTF-8
        texts = self.table[self.start : self.stop][self.column]
        documents, digest = [(text or "").encode() for text in texts], hashlib.sha256()
        for document in documents:
            digest.update(len(document).to_bytes(8, "little") + document)
        return Read(digest.hexdigest(), sum(map(len, documents)), documents)


def pieces_of(source: str, key: str) -> list[Piece]:
    """The pieces of a source, in its order.

    Args:
      source: a glob of files, or hf:NAME[/CONFIG][:SPLIT[:COLUMN]], where NAME is a data set's on a hub or a folder.
      key: the column of a data set that names none.

    Raises:
      UserError: nothing matches; no network; a data set, split or column that does not exist.
    """
    if not source.startswith(HUB):
        return [File(name, path) for name, path in named(matching_files(source, SUFFIXES))]
    name, _, rest = source.removeprefix(HUB).partition(":")
    split, _, column = rest.partition(":")
    column = column or key
    table = _table(source, name, split or "train")
    if column not in table.column_names:
        raise unknown_name(f"--source {source}: column", column, table.column_names)
    kind = getattr(table.features[column], "dtype", "nested")
    if kind not in ("string", "large_string"):
        raise UserError(f"--source {source}: the column {column!r} is not text but {kind}")
    starts = range(0, len(table), _ROWS)
    label = f"{pathlib.Path(name).name if _is_folder(name) else name}:{split or 'train'}:{column}"  # a folder may move
    return [Rows(f"{label}:{at}", table, column, at, min(at + _ROWS, len(table))) for at in starts]


def licence_of(pieces: Sequence[Piece]) -> str:
    """What the data sets among the pieces say of their licences, with commas between; "" where they say nothing."""
    tables = {id(piece.table): piece.table for piece in pieces if isinstance(piece, Rows)}.values()
    return ", ".join(dict.fromkeys(text for table in tables if (text := table.info.license)))


def _table(source: str, name: str, split: str) -> Any:
    """A split of a data set of the package `datasets`, memory-mapped."""
    datasets = optional("datasets", f"--source {source}", extra="hub")
    folder = pathlib.Path(name).expanduser()
    if _is_folder(name):
        if not folder.is_dir():
            raise UserError(f"--source {source}: there is no folder {str(folder)!r}")
        load = functools.partial(_from_folder, datasets, folder, split)
        other = "it has to be a folder that `datasets` wrote, or one of .parquet, .jsonl or .txt files"
    else:
        load = functools.partial(_from_hub, datasets, name, split)
        other = "without a network give files: --source 'DIR/**/*.parquet', or hf:FOLDER with what `datasets` saved"
    try:
        return load()
    except UserError as error:
        raise UserError(f"--source {source}: {error}") from None
    except Exception as error:  # many kinds, of several libraries underneath
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--source {source}: cannot be read ({reason}); {other}") from None


def _is_folder(name: str) -> bool:
    return name.startswith((".", "/", "~"))


def _from_folder(datasets: Any, folder: pathlib.Path, split: str) -> Any:
    if (folder / "state.json").exists():  # one split, as save_to_disk writes it
        return datasets.load_from_disk(str(folder))
    if (folder / "dataset_dict.json").exists():
        splits = datasets.load_from_disk(str(folder))
        if split not in splits:
            raise unknown_name("split", split, splits)
        return splits[split]
    return datasets.load_dataset(str(folder), split=split)


def _from_hub(datasets: Any, name: str, split: str) -> Any:
    first, _, rest = name.partition("/")
    if first in _SHORT:
        (path, revision), config = _SHORT[first], rest
    else:
        owner, _, rest = rest.partition("/")
        path, revision, config = f"{first}/{owner}" if owner else first, None, rest
    return datasets.load_dataset(path, config or None, split=split, revision=revision)
