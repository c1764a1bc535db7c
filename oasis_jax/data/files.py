"""Corpus `files`: local text, a .txt file is one document and every line of a .jsonl file is one."""

import codecs
import dataclasses
import functools
import glob
import json
import os
import pathlib
from collections.abc import Callable

from oasis_jax.config import DataConfig
from oasis_jax.data.corpus import Corpus
from oasis_jax.data.text import TextFile, read, text_corpus
from oasis_jax.data.tokenizers import Tokenizer
from oasis_jax.errors import UserError, nearest

_SUFFIXES = (".txt", ".jsonl")


def load(config: DataConfig, *, seed: int, tokenizer: Tokenizer | None) -> Corpus:
    """Reads the files that `config.pattern` matches; names count relative to the folder they share, so the
    folder may move.
    """
    del seed  # the text is what it is
    files, corrupt = read_files(config)
    identity = {"name": "files"} | ({"corrupt": len(corrupt)} if corrupt else {})
    corpus = text_corpus(files, config, tokenizer, identity=identity)
    return dataclasses.replace(corpus, notes=(*(f"left out: {what}" for what in corrupt), *corpus.notes))


def read_files(config: DataConfig) -> tuple[list[TextFile], list[str]]:
    """The files that `config.pattern` matches, and of those that were left out as `config.corrupt` says, why."""
    paths = matching_files(config.pattern)
    root = pathlib.Path(os.path.commonpath([path.parent for path in paths]))
    files, corrupt = [], []

    def attempt(read_it):
        """Its result, or None where it cannot be read and is to be skipped."""
        try:
            return read_it()
        except UserError as error:
            if config.corrupt == "stop":
                raise UserError(f"{error}; data.corrupt=skip would leave it out") from None
            corrupt.append(str(error))
            return None

    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        content = attempt(lambda path=path: read(path, "data.pattern"))
        if content is None:
            continue
        if path.suffix == ".jsonl":
            documents = json_documents(content, path, config.text_key, attempt)
        else:
            documents = [content.removeprefix(codecs.BOM_UTF8)]
        files.append(TextFile.from_content(name, content, documents))
    return files, corrupt


def matching_files(pattern: str) -> list[pathlib.Path]:
    """The files that a glob matches; ** means any depth of folders. What there is under a name such as a[1] is meant
    by that name.

    Raises:
      UserError: nothing matches, or a match is neither .txt nor .jsonl (leaving it out in silence would hide a misspelt
        pattern).
    """
    expanded = os.path.expanduser(pattern)
    found = glob.glob(_without_names(pathlib.Path(expanded)), recursive=True)
    paths = [pathlib.Path(path) for path in found if not os.path.isdir(path)]
    if not paths:
        raise UserError(f"data.pattern: no file matches {pattern!r}{_hint(pathlib.Path(expanded))}")
    for path in paths:
        if path.suffix not in _SUFFIXES:
            raise UserError(
                f"data.pattern: {pattern!r} matches {str(path)!r}, which is neither .txt nor .jsonl; end the "
                "pattern with one of them"
            )
    return [pathlib.Path(os.path.abspath(path)) for path in paths]


def _without_names(pattern: pathlib.Path) -> str:
    """The pattern, with those of its first parts that are names of something escaped."""
    place, rest = pathlib.Path(pattern.anchor), list(pattern.relative_to(pattern.anchor).parts)
    while rest and os.path.lexists(place / rest[0]):
        place /= rest.pop(0)
    start = glob.escape(str(place)) if place.parts else ""
    return os.path.join(start, *rest)


def _hint(pattern: pathlib.Path) -> str:
    """Where a pattern without a match goes wrong: it is a folder, or the first part of it that does not exist."""
    if pattern.is_dir():
        return ", it is a folder; add /*.txt or /**/*.jsonl, or the like"
    folder = pathlib.Path(pattern.anchor or ".")
    for part in pattern.relative_to(pattern.anchor).parts:
        if glob.has_magic(part):
            break
        if not (folder / part).exists():
            names = os.listdir(folder) if os.access(folder, os.R_OK) and folder.is_dir() else []
            return f": {str(folder.absolute())!r} has no {part!r}{nearest(part, names)}"
        folder = folder / part
    return f" in {str(folder.absolute())!r}; allowed are .txt and .jsonl files, and ** for folders of any depth"


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


def _json_text(line: bytes, where: str, key: str) -> bytes:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line; JSON has to be UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
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
