"""What `oasis_jax prepare` reads: files that a glob matches, and data sets of a hub or of a folder that the package
`datasets` knows.

A source is a list of pieces, each of which can be read alone and fits into memory.
"""

import contextlib
import dataclasses
import hashlib
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from oasis_jax.data.files import documents_of, matching_files, named
from oasis_jax.data.formats import optional
from oasis_jax.errors import UserError, unknown_name

SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst")
HUB = "hf:"
_ROWS = 20_000  # of a data set that make a piece
# Data sets that people know by a short name -> where they lie on the hub.
_SHORT = {
    "wikitext": "Salesforce/wikitext",
    "wiki40b": "google/wiki40b",
    "bookcorpus": "bookcorpus/bookcorpus",
    "fineweb-edu": "HuggingFaceFW/fineweb-edu",
}
# Of those whose main branch is a script, which `datasets` no longer runs, the branch with the tables that it made.
_BRANCHES = {"bookcorpus/bookcorpus": "refs/convert/parquet"}


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
        return [File(name, path) for name, path in named(matching_files(source, SUFFIXES, "--source"))]
    name, _, rest = source.removeprefix(HUB).partition(":")
    split, _, column = rest.partition(":")
    column = column or key
    table = _table(source, name, split or "train")
    if column not in table.column_names:
        raise unknown_name(f"--source {source}: column", column, table.column_names)
    kind = getattr(table.features[column], "dtype", "nested")
    if kind not in ("string", "large_string"):
        raise UserError(f"--source {source}: the column {column!r} is not text but {kind}")
    table = table.select_columns([column])  # reading rows makes Python objects of all there are
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
    try:
        if not _is_folder(name):
            return _from_hub(datasets, name, split)
        folder = pathlib.Path(name).expanduser()
        if not folder.is_dir():
            raise UserError(f"there is no folder {str(folder)!r}")
        return _from_folder(datasets, folder, split)
    except UserError as error:
        raise UserError(f"--source {source}: {error}") from None
    except Exception as error:  # many kinds, of several libraries underneath
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--source {source}: cannot be read ({reason}){_way_out(error, _is_folder(name))}") from None


def _way_out(error: Exception, folder: bool) -> str:
    if folder:
        return "; it has to be a folder that `datasets` wrote, or one of .parquet, .jsonl or .txt files"
    if isinstance(error, ConnectionError):
        return "; without a network give files: --source 'DIR/**/*.parquet', or hf:FOLDER with what `datasets` saved"
    if "scripts are no longer supported" in str(error):
        return "; give the files of its branch refs/convert/parquet, where it has one: --source 'DIR/**/*.parquet'"
    return ""


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
    return _loaded(datasets, str(folder), None, split)


def _from_hub(datasets: Any, name: str, split: str) -> Any:
    parts = name.split("/")
    if parts[0] in _SHORT and "/".join(parts[:2]) not in _SHORT.values():
        path, rest = _SHORT[parts[0]], parts[1:]
    else:
        path, rest = "/".join(parts[:2]), parts[2:]
    with _quiet():
        return _loaded(datasets, path, "/".join(rest) or None, split, revision=_BRANCHES.get(path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without a line for each of the attempts to reach a hub: the last one is an error, which says it."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _loaded(datasets: Any, path: str, config: str | None, split: str, **where: Any) -> Any:
    """A split of a data set; raises UserError with what there is where there is no such configuration or split."""
    try:
        return datasets.load_dataset(path, config, split=split, **where)
    except ValueError as error:
        if "cache for" in str(error):  # the hub is out of reach, and something else of it was fetched before
            raise ConnectionError(*error.args) from None
        configs = datasets.get_dataset_config_names(path, **where)
        if config is None and len(configs) > 1:
            how = f"hf:{path}/NAME, where NAME is" if "revision" in where else "the folder of"
            raise UserError(f"has several configurations; give {how} one of {', '.join(configs)}") from None
        if config is not None and config not in configs:
            raise unknown_name("configuration", config, configs) from None
        splits = datasets.get_dataset_split_names(path, config, **where)
        if split not in splits:
            raise unknown_name("split", split, splits) from None
        raise
