"""Corpus `files`: local text, a .txt file is one document and every line of a .jsonl file is one."""

import codecs
import dataclasses
import functools
import glob
import json
import os
import pathlib
import stat
from collections.abc import Callable, Sequence

from oasis_jax.config import DataConfig
from oasis_jax.data.corpus import Corpus
from oasis_jax.data.formats import PACKED, parquet_texts
from oasis_jax.data.text import TextFile, read, require_utf8, text_corpus
from oasis_jax.data.tokenizers import Tokenizer
from oasis_jax.errors import UserError, nearest
from oasis_jax.storage import as_path, fetched_glob, is_remote

_SUFFIXES = (".txt", ".jsonl")
# Reading these would wait or never end.
_NO_FILES = {
    stat.S_ISFIFO: "FIFO",
    stat.S_ISSOCK: "socket",
    stat.S_ISCHR: "character device",
    stat.S_ISBLK: "block device",
}


def load(config: DataConfig, *, seed: int, tokenizer: Tokenizer | None) -> Corpus:
    """Reads the files that `config.pattern` matches; names count relative to the folder they share, so the
    folder may move.
    """
    del seed  # the text is what it is
    files, corrupt = read_files(config, tokenizer.kind if tokenizer else config.tokenizer)
    identity = {"name": "files"} | ({"corrupt": len(corrupt)} if corrupt else {})
    corpus = text_corpus(files, config, tokenizer, identity=identity)
    return dataclasses.replace(corpus, notes=(*(f"left out: {what}" for what in corrupt), *corpus.notes))


def read_files(config: DataConfig, tokenizer: str = "bytes") -> tuple[list[TextFile], list[str]]:
    """The files that `config.pattern` matches, and of those that were left out as `config.corrupt` says, why.

    Args:
      config: reads pattern, text_key and corrupt.
      tokenizer: the kind that has to take the text.
    """
    files, corrupt = [], []
    attempt = attempting(config, corrupt)
    for name, path in named(matching_files(config.pattern)):
        found = documents_of(path, name, config.text_key, tokenizer, attempt)
        if found is not None:
            content, documents = found
            files.append(TextFile.from_content(name, content, documents))
    return files, corrupt


def named(paths: Sequence[pathlib.Path]) -> list[tuple[str, pathlib.Path]]:
    """Files in the order of their names, which count relative to the folder they share."""
    root = pathlib.Path(os.path.commonpath([path.parent for path in paths]))
    return sorted((path.relative_to(root).as_posix(), path) for path in paths)


def attempting(config: DataConfig, corrupt: list[str]) -> Callable:
    """Calls what it is given; where that cannot be read and `config.corrupt` is "skip", notes why and gives None."""

    def attempt(read_it):
        try:
            return read_it()
        except UserError as error:
            if config.corrupt == "stop":
                raise UserError(f"{error}; data.corrupt=skip would leave it out") from None
            corrupt.append(str(error))
            return None

    return attempt


def documents_of(
    path: pathlib.Path, name: str, key: str, tokenizer: str, attempt: Callable
) -> tuple[bytes, list[bytes]] | None:
    """A file's bytes and the texts in it; None where `attempt` gives None for the whole file."""
    content = attempt(functools.partial(_content, path, name, tokenizer))
    if content is None:
        return None
    kind = text_suffix(path)
    if kind == ".parquet":
        texts = attempt(functools.partial(parquet_texts, path, key))
        return None if texts is None else (content, texts)
    if kind == ".jsonl":
        return content, json_documents(content, path, key, attempt)
    return content, [content.removeprefix(codecs.BOM_UTF8)]


def text_suffix(path: pathlib.Path) -> str:
    """What kind of text a file holds: its suffix, that of a compression aside."""
    return pathlib.Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def _content(path: pathlib.Path, name: str, tokenizer: str) -> bytes:
    """The bytes of a file with text in it; raises UserError where it cannot be read or taken for text."""
    content = read(path, "data.pattern")
    if path.suffix in PACKED:
        content = PACKED[path.suffix](content, str(path))
    if content and content.count(0) == len(content):
        raise UserError(f"{str(path)!r} holds {len(content)} NUL bytes and no text")
    if text_suffix(path) == ".txt":  # the lines of others are looked at one by one
        require_utf8(content, name, tokenizer)
    return content


def matching_files(
    pattern: str, suffixes: Sequence[str] = _SUFFIXES, where: str = "data.pattern"
) -> list[pathlib.Path]:
    """The files that a glob matches, in an object store their local copies; ** means any depth of folders. What there
    is under a name such as a[1] is meant by that name.

    Raises:
      UserError: nothing matches, or a match ends with none of `suffixes` (leaving it out in silence would hide a
        misspelt pattern), or is no regular file, or the pattern means one file as a name and others as a glob.
    """
    if is_remote(pattern):
        paths = fetched_glob(pattern, where)
        if not paths:
            raise UserError(f"{where}: no object matches {pattern!r}; ** stands for folders of any depth")
        _check_suffixes(pattern, paths, suffixes, where)
        return paths
    as_path(pattern, where)  # says what other schemes are
    expanded = os.path.expanduser(pattern)
    found = glob.glob(_without_names(pathlib.Path(expanded)), recursive=True)
    paths = [pathlib.Path(path) for path in found if not os.path.isdir(path)]
    if glob.has_magic(expanded) and os.path.lexists(expanded) and not os.path.isdir(expanded):
        others = [path for path in glob.glob(expanded, recursive=True) if path != expanded and not os.path.isdir(path)]
        if others:
            raise UserError(
                f"{where}: {pattern!r} is the name of a file and matches {others[0]!r} too; write "
                f"{glob.escape(expanded)!r} for the file of that name"
            )
    if not paths:
        raise UserError(f"{where}: no file matches {pattern!r}{_hint(pathlib.Path(expanded), suffixes)}")
    _check_suffixes(pattern, paths, suffixes, where)
    for path in paths:
        if path.exists() and not path.is_file():
            kind = next(name for is_it, name in _NO_FILES.items() if is_it(path.stat().st_mode))
            raise UserError(f"{where}: {pattern!r} matches {str(path)!r}, which is no file but a {kind}")
    return [pathlib.Path(os.path.abspath(path)) for path in paths]


def _check_suffixes(pattern: str, paths: Sequence[pathlib.Path], suffixes: Sequence[str], where: str) -> None:
    for path in paths:
        if not path.name.endswith(tuple(suffixes)):
            raise UserError(
                f"{where}: {pattern!r} matches {str(path)!r}, which is neither {' nor '.join(suffixes)}; end the "
                "pattern with one of them"
            )


def _without_names(pattern: pathlib.Path) -> str:
    """The pattern, with those of its first parts that are names of something escaped."""
    place, rest = pathlib.Path(pattern.anchor), list(pattern.relative_to(pattern.anchor).parts)
    while rest and os.path.lexists(place / rest[0]):
        place /= rest.pop(0)
    start = glob.escape(str(place)) if place.parts else ""
    return os.path.join(start, *rest)


def _hint(pattern: pathlib.Path, suffixes: Sequence[str]) -> str:
    """Where a pattern without a match goes wrong: it is a folder, or the first part of it that does not exist."""
    if pattern.is_dir():
        return ", it is a folder; add /*.txt or /**/*.jsonl, or the like"
    folder = pathlib.Path(pattern.anchor or ".")
    for part in pattern.relative_to(pattern.anchor).parts:
        if not (folder / part).exists():
            if glob.has_magic(part):
                break
            names = os.listdir(folder) if os.access(folder, os.R_OK) and folder.is_dir() else []
            return f": {str(folder.absolute())!r} has no {part!r}{nearest(part, names)}"
        folder = folder / part
    kinds = f"{', '.join(suffixes[:-1])} and {suffixes[-1]} files"
    return f" in {str(folder.absolute())!r}; allowed are {kinds}, and ** for folders of any depth"


def json_documents(
    content: bytes,
    path: pathlib.Path,
    key: str,
    attempt: Callable[[Callable[[], bytes]], bytes | None] = lambda read_it: read_it(),
) -> list[bytes]:
    """The texts of a .jsonl file in UTF-8, one a line; blank lines are skipped, and those for which `attempt` gives
    None.

    Raises:
      UserError: names file and line where a line is not a JSON object with a text under `key`.
    """
    lines = enumerate(content.split(b"\n"), start=1)
    texts = [
        attempt(functools.partial(_json_text, line, f"{path}:{number}", key)) for number, line in lines if line.strip()
    ]
    return [text for text in texts if text is not None]


class _Object(dict):
    """A JSON object that knows which of its keys came more than once; the last value of those is kept."""

    def __init__(self, pairs: list[tuple[str, object]]):
        super().__init__(pairs)
        names = [name for name, _ in pairs] if len(self) < len(pairs) else []
        self.repeated = {name for name in names if names.count(name) > 1}


def _json_text(line: bytes, where: str, key: str) -> bytes:
    try:
        record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_Object)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line; JSON has to be UTF-8") from None
    except json.JSONDecodeError as error:
        if not line.strip(b"\0\r"):
            raise UserError(
                f"{where}: not valid JSON: the line holds {line.count(0)} NUL bytes and nothing else"
            ) from None
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise UserError(f"{where}: not readable as JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: not readable as JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object with the key {key!r}, got a {type(record).__name__}")
    if key not in record:
        keys = ", ".join(map(repr, list(record)[:10])) or "none"
        raise UserError(
            f"{where}: no key {key!r}{nearest(key, record)}; keys of this line: {keys}; data.text_key names the "
            "one to read"
        )
    if key in record.repeated:
        raise UserError(f"{where}: the key {key!r} is there more than once; which text is meant?")
    if not isinstance(record[key], str):
        raise UserError(
            f"{where}: {key!r} is not text but a {type(record[key]).__name__}; data.text_key names the key to read"
        )
    try:
        return record[key].encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {key!r} has half of a surrogate pair at character {error.start}, which is no text"
        ) from None
