"""From text to shards of tokens, see `oasis_jax.data.prepared`; started again, it goes on after the last whole one."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from oasis_jax.config import DataConfig
from oasis_jax.data.prepared import FORMAT, INDEX, PARTS, RECORD_TOKENS, check_files, file_sha256, read_index
from oasis_jax.data.sources import Piece, licence_of, pieces_of
from oasis_jax.data.split import rule
from oasis_jax.data.survey import Documents, Job, Reader, Survey, look, survey
from oasis_jax.data.tokenizers import TOKENIZERS, Tokenizer
from oasis_jax.data.workers import Workers
from oasis_jax.errors import UserError
from oasis_jax.plain_names import plain
from oasis_jax.reading import read_json, with_checksum, without_checksum
from oasis_jax.storage import local_path

_PLAN, _LOCK = "plan.json", ".lock"
LENGTHS = ".lengths.npy"  # how many tokens each document of a shard has, its separator not counted
WRITING = "group_size:1"
# Bytes of text that make a shard; its tokens are in memory while it is written.
SHARD_BYTES = 64 * 2**20


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    out: str | os.PathLike[str],
    *,
    sources: Sequence[str] = (),
    licence: str = "",
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """Writes the shards and index.json of a corpus into a folder. Every worker has one file and one shard in memory.

    Args:
      config: reads pattern, text_key, corrupt, holdout_fraction and, without a tokenizer, tokenizer and bpe_vocab_size.
      tokenizer: None: made as config says, a BPE from the training part (which is then in memory).
      out: missing, empty, or where the same preparation was stopped.
      sources: what is read, see `oasis_jax.data.sources.pieces_of`; (): `config.pattern`.
      licence: of the text, as the index is to say it; "": what the data sets that are read say.
      shard_bytes: of text in a shard.
      workers: processes that read and tokenize; more than one need a main module that can be imported.
      say: takes lines of progress.

    Returns:
      What index.json says.

    Raises:
      UserError: sources that cannot be read; a folder that holds something else or that another process writes to; no
        space left: what is finished stays, and the same call goes on.
    """
    out, sources = local_path(out, "--out"), list(sources) or [config.pattern]
    with _locked(out):
        _check_free(out)
        pieces = [piece for source in sources for piece in pieces_of(source, config.text_key)]
        with Workers(workers, Job(pieces, config, tokenizer)) as pool:
            found = _survey(pool, pieces, config, say)
        if tokenizer is None:
            texts = list(Reader(pieces, config).texts(found.part("train")))
            tokenizer = TOKENIZERS[config.tokenizer].train(texts, config.bpe_vocab_size)
            del texts
        plan = {
            "format": FORMAT,
            "source": sources,
            "licence": licence or licence_of(pieces),
            "sha256": found.digest,
            "tokenizer": tokenizer.identity,
            "holdout_fraction": config.holdout_fraction,
            "shard_bytes": shard_bytes,
        }
        finished = _begin(out, plan)
        for path in out.glob("*.unfinished"):  # of a preparation that was killed
            path.unlink()
        if finished is not None:
            say(f"{out} is complete")
            return finished
        with Workers(workers, Job(pieces, config, tokenizer)) as pool:
            parts = _write_parts(found, pool, out, shard_bytes, say)
        index = _index(plan, found, tokenizer, parts)
        _write_json(out / INDEX, index)
        for path in [out / _PLAN, *out.glob("*.arrayrecord.json")]:
            path.unlink()
    return index


def _survey(pool: Workers, pieces: Sequence[Piece], config: DataConfig, say: Callable[[str], None]) -> Survey:
    found = [None] * len(pieces)
    begun = time.monotonic()
    for count, (at, read) in enumerate(pool.run(look, [(piece,) for piece in pieces]), start=1):
        found[at] = read
        if count * 10 // len(pieces) > (count - 1) * 10 // len(pieces) and count < len(pieces):
            left = (time.monotonic() - begun) / count * (len(pieces) - count)
            say(f"read {count} of {len(pieces)} files, {left:.0f} s left until tokenizing")
    return survey(pieces, found, config, say)


@contextlib.contextmanager
def _locked(out: pathlib.Path) -> Iterator[None]:
    """Makes the folder, for this process alone while it runs."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / _LOCK).open("w")
    except OSError as error:
        raise UserError(f"--out: cannot write to {str(out)!r}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--out: another preparation is writing to {str(out)!r}; wait or take another folder"
            ) from None
        yield


def _check_free(out: pathlib.Path) -> None:
    """Raises UserError, before anything is read, where a folder holds what no preparation has written."""
    if (out / INDEX).exists() or (out / _PLAN).exists():
        return
    others = sorted(path.name for path in out.iterdir() if path.name != _LOCK and path.suffix != ".unfinished")
    if others:
        raise UserError(f"--out: {str(out)!r} is not empty (it holds {others[0]!r}); take another folder")


def _begin(out: pathlib.Path, plan: dict) -> dict | None:
    """Notes what is prepared here, or checks that it is what was begun; gives the index where all is done."""
    plan = json.loads(json.dumps(plan))
    for name in (INDEX, _PLAN):
        if (out / name).exists():
            stored = read_index(out) if name == INDEX else _read_json(out / name)
            begun = stored.get("plan", {}) if name == INDEX else stored
            other = [key for key in plan if key != "source" and begun.get(key) != plan[key]]  # which may move
            if other:
                found = "; ".join(f"{key} was {begun.get(key)!r}, is {plan[key]!r}" for key in other)
                raise UserError(f"--out: {str(out)!r} holds another preparation ({found}); take another folder")
            return stored if name == INDEX else None
    _write_json(out / _PLAN, plan)
    return None


def _write_parts(
    found: Survey, workers: Workers, out: pathlib.Path, shard_bytes: int, say: Callable[[str], None]
) -> dict[str, list[dict]]:
    """Writes the shards that are not there yet, and gives what is known of each, in order."""
    shards: dict[pathlib.Path, Documents] = {}
    for part in PARTS:
        groups = found.shards(part, shard_bytes)
        for number, documents in enumerate(groups):
            shards[out / f"{part}-{number:05d}-of-{len(groups):05d}.arrayrecord"] = documents
    entries = {path: entry for path in shards if (entry := _finished(path)) is not None}
    total, worked, begun = found.size, 0, time.monotonic()
    done = sum(entry["bytes"] for entry in entries.values())
    missing = [path for path in shards if path not in entries]
    jobs = [(path, shards[path], _number(path) > 0) for path in missing]
    for at, entry in workers.run(write_shard, jobs):
        entries[missing[at]] = entry
        worked += entry["bytes"]
        done += entry["bytes"]
        left = (time.monotonic() - begun) / max(worked, 1) * (total - done)
        say(f"{entry['file']}: {entry['tokens']} tokens; {100 * done / total:.0f} % of the text, {left:.0f} s left")
    return {part: [entries[path] for path in shards if path.name.startswith(f"{part}-")] for part in PARTS}


def _number(path: pathlib.Path) -> int:
    return int(path.name.split("-")[1])


def _finished(path: pathlib.Path) -> dict | None:
    """What is known of a shard that was written whole; None where it was not."""
    note = _note(path)
    if not note.exists():
        return None
    entry = _read_json(note)
    check_files(path.parent, entry)
    return entry


def _note(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.json")


def write_shard(job: Job, path: pathlib.Path, documents: Documents, joined: bool) -> dict:
    """Writes tokens in records of `RECORD_TOKENS`, the lengths of the documents beside them, and a note of both; under
    other names until they are whole.

    Args:
      job: what all shards share.
      path: of the shard.
      documents: that are in it.
      joined: the stream goes on from another shard, so that a separator comes first.

    Returns:
      What the index says of the shard.
    """
    tokenizer, dtype = job.tokenizer, token_dtype(job.tokenizer)
    texts = list(job.reader.texts(documents))
    separator = np.array([] if tokenizer.separator_id is None else [tokenizer.separator_id], dtype)
    pieces = [np.zeros(0, dtype)]
    for ids in tokenizer.encode_all(texts):
        pieces += [separator, ids.astype(dtype)]
    tokens = np.concatenate(pieces)[0 if joined else len(separator) :]
    lengths = path.with_suffix(LENGTHS)
    with _written(lengths) as unfinished, unfinished.open("wb") as file:
        np.save(file, np.array([len(ids) for ids in pieces[2::2]], np.uint32))
    with _written(path) as unfinished:
        writer = ArrayRecordWriter(str(plain(unfinished.parent) / unfinished.name), WRITING)
        for start in range(0, len(tokens), RECORD_TOKENS):
            writer.write(tokens[start : start + RECORD_TOKENS].tobytes())
        writer.close()
    entry = {
        **_facts(path),
        "tokens": len(tokens),
        "documents": len(texts),
        "bytes": sum(map(len, texts)),
        "lengths": _facts(lengths),
    }
    _write_json(_note(path), entry)
    return entry


def _facts(path: pathlib.Path) -> dict:
    return {"file": path.name, "size": path.stat().st_size, "sha256": file_sha256(path)}


@contextlib.contextmanager
def _written(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name of this process alone to write to, which becomes `path` when all is there."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        raise _cannot_write(path, error) from None


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Little-endian, of two bytes where the vocabulary fits."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<i4")


def _cannot_write(path: pathlib.Path, error: Exception) -> UserError:
    text = " ".join(str(error).split())
    return UserError(
        f"--out: cannot write {str(path)!r}: {text[:120]}; what is finished stays, and the same command goes on"
    )


def _read_json(path: pathlib.Path) -> dict:
    try:
        return without_checksum(read_json(path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {error}; prepare again into another folder") from None


def _write_json(path: pathlib.Path, values: dict) -> None:
    """All of it or nothing."""
    with _written(path) as unfinished:
        unfinished.write_text(json.dumps(with_checksum(values), indent=1))


def _index(plan: dict, survey: Survey, tokenizer: Tokenizer, parts: dict[str, list[dict]]) -> dict:
    found = {
        part: {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents", "bytes")}
        | {"shards": shards}
        for part, shards in parts.items()
    }
    heldout, checksums = found["heldout"], "".join(shard["sha256"] for part in PARTS for shard in parts[part])
    return {
        "format": FORMAT,
        "plan": plan,
        "source": plan["source"],
        "licence": plan["licence"],
        "sha256": survey.digest,
        "files": len(survey.pieces),
        "bytes": survey.bytes,
        "left_out": survey.notes,
        "tokenizer": {"identity": tokenizer.identity, "json": tokenizer.to_json()},
        "dtype": token_dtype(tokenizer).str,
        "holdout": {
            "fraction": plan["holdout_fraction"],
            "bytes": heldout["bytes"],
            "documents": heldout["documents"],
        },
        "shards_sha256": hashlib.sha256(checksums.encode()).hexdigest(),
        "split": rule(
            survey.size,
            heldout["bytes"],
            heldout["documents"],
            len(survey.documents),
            bool(survey.documents["tail"].any()),
        ),
        "parts": found,
    }
