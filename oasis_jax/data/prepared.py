"""Corpus `prepared`: a folder of token shards that `oasis_jax prepare` wrote, read at random.

The folder holds ArrayRecord shards of each part, train and heldout, and index.json, which says what they were made
from. The tokens of a part's shards, one shard after another, are the stream that `data.corpus=files` makes of the same
files, and it is cut into the same windows.
"""

import bisect
import hashlib
import itertools
import json
import math
import os
import pathlib
import tokenize
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from oasis_jax.config import DataConfig
from oasis_jax.data.corpus import Corpus
from oasis_jax.data.mixture import mixed
from oasis_jax.data.packing import Stream, pack
from oasis_jax.data.split import missed_share
from oasis_jax.data.tokenizers import Tokenizer
from oasis_jax.errors import UserError
from oasis_jax.plain_names import plain
from oasis_jax.reading import read_bytes, without_checksum
from oasis_jax.storage import fetched

INDEX = "index.json"
FORMAT = 2
RECORD_TOKENS = 1024  # of every record of a shard but its last
PARTS = ("train", "heldout")
_IDENTITY = ("sha256", "shards_sha256", "bytes", "files", "holdout", "split")  # of a corpus
_KEYS = (*_IDENTITY, "tokenizer", "dtype", "parts")


class ShardedTokens:
    """The tokens of shards, one after another; slices are read from the files as they are asked for.

    Args:
      folder: where they lie.
      shards: of each its "file" and how many "tokens" are in it.
      dtype: of a token.

    Raises:
      UserError: names a shard that is not there, not as long as it was written, or corrupt where it is read.
    """

    def __init__(self, folder: pathlib.Path, shards: Sequence[Mapping], dtype: np.dtype):
        self._paths, self.dtype = [folder / shard["file"] for shard in shards], dtype
        for shard in shards:
            check_files(folder, shard)
        self._ends = list(itertools.accumulate(shard["tokens"] for shard in shards))
        self._readers: dict[int, object] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, window: slice) -> np.ndarray:
        return self.slices([window])[0]

    def slices(self, windows: Sequence[slice]) -> list[np.ndarray]:
        """Several slices, with one request to each shard: it takes a tenth of the time of one for each."""
        wanted: dict[int, dict[int, bytes]] = {}  # shard -> record -> its bytes
        parts = [list(self._parts(*window.indices(len(self))[:2])) for window in windows]
        for shard, start, stop in itertools.chain.from_iterable(parts):
            records = range(start // RECORD_TOKENS, -(-stop // RECORD_TOKENS))
            wanted.setdefault(shard, {}).update(dict.fromkeys(records))
        for shard, records in wanted.items():
            records.update(zip(records, self._read(shard, list(records))))
        return [self._joined(wanted, some) for some in parts]

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, start, stop) within shards of a slice of all tokens."""
        while start < stop:
            shard = bisect.bisect_right(self._ends, start)
            first = self._ends[shard - 1] if shard else 0
            end = min(stop, self._ends[shard])
            yield shard, start - first, end - first
            start = end

    def _joined(self, found: Mapping[int, Mapping[int, bytes]], parts: Sequence[tuple[int, int, int]]) -> np.ndarray:
        pieces = []
        for shard, start, stop in parts:
            first, records = start // RECORD_TOKENS, found[shard]
            content = [records[i] for i in range(first, -(-stop // RECORD_TOKENS))]
            tokens = np.frombuffer(content[0] if len(content) == 1 else b"".join(content), self.dtype)
            pieces.append(tokens[start - first * RECORD_TOKENS : stop - first * RECORD_TOKENS])
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, self.dtype), *pieces])

    def _read(self, shard: int, records: list[int]) -> Sequence[bytes]:
        try:
            if shard not in self._readers:
                self._readers[shard] = _reader(self._paths[shard])
            return self._readers[shard].read(records)
        except (RuntimeError, IndexError, ValueError) as error:
            raise corrupt(self._paths[shard], error) from None


def _reader(path: pathlib.Path):
    from array_record.python.array_record_module import ArrayRecordReader  # here: it comes with grain

    return ArrayRecordReader(str(plain(path)))


def corrupt(path: pathlib.Path, why: object) -> UserError:
    """The error for a shard that is not what was written."""
    text = " ".join(str(why).split())
    return UserError(f"{path}: the shard is corrupt ({text[:120]}); prepare it again into another folder")


def check_size(path: pathlib.Path, size: int) -> None:
    """Raises UserError for a shard that is gone or shorter or longer than it was."""
    if not path.is_file():
        raise UserError(f"{path}: the shard is missing; restore it or prepare again into another folder")
    if path.stat().st_size != size:
        raise corrupt(path, f"{path.stat().st_size} bytes where {size} were written")


def check_files(folder: pathlib.Path, shard: Mapping) -> None:
    """Raises UserError where a shard or the lengths of its documents are gone or not as long as they were."""
    for entry in (shard, shard["lengths"]):
        if pathlib.PurePath(entry["file"]).name != entry["file"]:  # an index is data of others
            raise UserError(f"{folder / INDEX}: {entry['file']!r} is no name of a file in its folder")
        check_size(folder / entry["file"], entry["size"])


def file_sha256(path: pathlib.Path) -> str:
    """The sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_folder(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Where a prepared folder can be read; one in an object store is fetched whole: rows are read out of order."""
    return fetched(folder, "data.pattern").expanduser()


def read_index(folder: str | os.PathLike[str]) -> dict:
    """What index.json says; raises UserError where there is none, or one of another format."""
    path = local_folder(folder) / INDEX
    try:
        index = json.loads(read_bytes(path))
        index = without_checksum(index) if isinstance(index, dict) else None
    except FileNotFoundError:
        raise UserError(
            f"data.pattern: {str(folder)!r} holds no prepared corpus (no {INDEX}); `oasis_jax prepare` writes one, and "
            "goes on where it was stopped"
        ) from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if index is None or index.get("format") != FORMAT:
        raise UserError(f"{path}: is not of format {FORMAT}, which this version reads")
    if missing := [name for name in _KEYS if name not in index]:
        raise UserError(f"{path}: does not say its {', '.join(missing)}; restore it or prepare again")
    if problem := _problem(index):
        raise UserError(f"{path}: does not say {problem}; restore it or prepare again")
    return index


def _problem(index: Mapping) -> str:
    """What an index of others does not say, in words; "": it says all that is read of it."""
    try:
        np.dtype(index["dtype"])
        numbers = [index["holdout"]["fraction"], index["holdout"]["bytes"]]
        texts = [index["tokenizer"]["json"], *(index["tokenizer"]["identity"][name] for name in ("kind", "sha256"))]
        for part in PARTS:
            numbers.append(index["parts"][part]["bytes"])
            for shard in index["parts"][part]["shards"]:
                numbers += [shard[name] for name in ("tokens", "documents", "size")] + [shard["lengths"]["size"]]
                texts += [entry[name] for entry in (shard, shard["lengths"]) for name in ("file", "sha256")]
    except (KeyError, TypeError, IndexError) as error:
        return f"what its shards are ({type(error).__name__}: {error})"
    fits = all(type(x) in (int, float) and 0 <= x < 2**63 for x in numbers) and all(type(x) is str for x in texts)
    return "" if fits else "what its shards are"


def verify(folder: str | os.PathLike[str]) -> int:
    """How many shards there are, all of which have their checksums; raises UserError for the first that has not."""
    index, folder = read_index(folder), local_folder(folder)
    shards = [shard for part in PARTS for shard in index["parts"][part]["shards"]]
    for shard in shards:
        check_files(folder, shard)
        for entry in (shard, shard["lengths"]):
            if file_sha256(folder / entry["file"]) != entry["sha256"]:
                raise corrupt(folder / entry["file"], "its sha256 is not the one in the index")
    return len(shards)


def load(config: DataConfig, *, seed: int, tokenizer: Tokenizer | None) -> Corpus:
    """The corpus in the folder `config.pattern`, which may have moved since it was prepared; with `config.mixture` a
    weighted one of several.

    Raises:
      UserError: no such folder, a shard that is not as it was, or a tokenizer or a share held out other than asked for;
        weights that are not those of the folders.
    """
    del seed  # the text is what it is
    if not config.mixture:
        return _load(config, config.pattern, tokenizer)
    weights = _weights(config.mixture)
    folders = [folder.strip() for folder in config.pattern.split(",")]
    if len(weights) != len(folders):
        raise UserError(
            f"data.mixture: {len(weights)} weights for the {len(folders)} folders of data.pattern; give one for each, "
            "with commas between"
        )
    corpora = []
    for folder in folders:
        corpora.append(_load(config, folder, tokenizer))
        tokenizer = tokenizer or corpora[0].tokenizer
    return mixed(corpora, weights)


def _weights(text: str) -> list[float]:
    try:
        weights = [float(weight) for weight in text.split(",")]
    except ValueError:
        weights = []
    if not weights or not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"data.mixture: expected numbers above 0 with commas between, such as 0.7,0.3, got {text!r}")
    return weights


def _load(config: DataConfig, pattern: str, tokenizer: Tokenizer | None) -> Corpus:
    index, folder = read_index(pattern), local_folder(pattern)
    tokenizer = _tokenizer(config, pattern, index, tokenizer)
    fraction = index["holdout"]["fraction"]
    if config.holdout_fraction != fraction:
        raise UserError(
            f"data.holdout_fraction: {config.holdout_fraction} asked for, but {pattern!r} was prepared with "
            f"{fraction}; take that, or prepare again"
        )
    train, heldout = (pack(stream_in(folder, index, part, tokenizer), config) for part in PARTS)
    for part, source in zip(("training", "held-out"), (train, heldout)):
        if not len(source):
            raise UserError(
                f"data.sequence_length: {config.sequence_length} is more than the {part} part's {len(source.tokens)} "
                f"tokens can fill once; use at most {source.places} ({index['split']})"
            )
    identity = {"name": "prepared"} | {name: index[name] for name in _IDENTITY}
    total = sum(index["parts"][part]["bytes"] for part in PARTS)
    notes = missed_share(index["holdout"]["bytes"], total, fraction)
    return Corpus(identity, tokenizer, train, heldout, notes=tuple(notes))


def stream_in(folder: pathlib.Path, index: Mapping, part: str, tokenizer: Tokenizer) -> Stream:
    """The documents of a part. The lengths of documents are read where they are asked for."""
    shards = index["parts"][part]["shards"]

    def lengths() -> np.ndarray:
        found = [_lengths(folder, shard, number > 0, tokenizer) for number, shard in enumerate(shards)]
        return np.concatenate([np.zeros(0, np.int64), *found])

    return Stream(ShardedTokens(folder, shards, np.dtype(index["dtype"])), lengths, tokenizer)


def _lengths(folder: pathlib.Path, shard: Mapping, joined: bool, tokenizer: Tokenizer) -> np.ndarray:
    """Of the documents of a shard; `joined`: it begins with a separator."""
    path, documents = folder / shard["lengths"]["file"], shard["documents"]
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:  # its head is read as Python
        raise corrupt(path, error) from None
    if found.shape != (documents,) or found.dtype != np.uint32:
        raise corrupt(path, f"{found.dtype} of shape {found.shape} for {documents} documents")
    separators = 0 if tokenizer.separator_id is None else max(documents - (not joined), 0)
    if int(found.sum(dtype=np.int64)) + separators != shard["tokens"]:
        raise corrupt(path, f"its documents are not as long as the shard's {shard['tokens']} tokens")
    return found


def _tokenizer(config: DataConfig, pattern: str, index: Mapping, tokenizer: Tokenizer | None) -> Tokenizer:
    """The one that is given, or the folder's own; raises UserError where it is not what the folder was made with."""
    own = index["tokenizer"]["identity"]
    if tokenizer is None:
        if config.tokenizer != own["kind"]:
            raise UserError(
                f"data.tokenizer: {config.tokenizer} asked for, but {pattern!r} was prepared with {own['kind']} "
                f"(sha256 {own['sha256']}); set data.tokenizer={own['kind']}"
            )
        tokenizer = Tokenizer.from_json(index["tokenizer"]["json"])
    if tokenizer.identity != own:
        raise UserError(
            f"data.tokenizer: {pattern!r} was prepared with {own['kind']}, sha256 {own['sha256']}; this run "
            f"reads {tokenizer.kind}, sha256 {tokenizer.identity['sha256']}"
        )
    return tokenizer
