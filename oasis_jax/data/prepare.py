"""From text to shards of tokens, see `oasis_jax.data.prepared`; started again, it goes on after the last whole one."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from oasis_jax.config import DataConfig
from oasis_jax.data.files import attempting, documents_of, matching_files, named
from oasis_jax.data.prepared import FORMAT, INDEX, PARTS, RECORD_TOKENS, check_size, file_sha256
from oasis_jax.data.split import choose, content_hash, halves, rule
from oasis_jax.data.tokenizers import TOKENIZERS, Tokenizer
from oasis_jax.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst")
_PLAN, _LOCK = "plan.json", ".lock"
# Bytes of text that make a shard; its tokens are in memory while it is written.
SHARD_BYTES = 64 * 2**20


@dataclasses.dataclass
class _Survey:
    """Every different document of the files, in order: which file and which text in it, its size, and what is cut."""

    files: list[tuple[str, pathlib.Path]]
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


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    out: str | os.PathLike,
    *,
    licence: str = "",
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """Writes the shards and index.json of a corpus into a folder. A file at a time is in memory.

    Args:
      config: reads pattern, text_key, corrupt, holdout_fraction and, without a tokenizer, tokenizer and bpe_vocab_size.
      tokenizer: None: made as config says, a BPE from the training part (which is then in memory).
      out: missing, empty, or where the same preparation was stopped.
      licence: of the text, as the index is to say it.
      shard_bytes: of text in a shard.
      say: takes lines of progress.

    Returns:
      What index.json says.

    Raises:
      UserError: files that cannot be read; a folder that holds something else or that another process writes to; no
        space left: what is finished stays, and the same call goes on.
    """
    out = pathlib.Path(out)
    with _locked(out):
        survey = _survey(config, tokenizer.kind if tokenizer else config.tokenizer, say)
        if tokenizer is None:
            texts = [text for _, text in _texts(survey, survey.part("train"), config, "train")]
            tokenizer = TOKENIZERS[config.tokenizer].train(texts, config.bpe_vocab_size)
            del texts
        plan = {
            "format": FORMAT,
            "source": config.pattern,
            "licence": licence,
            "sha256": survey.digest,
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
        parts = _write_parts(survey, config, tokenizer, out, shard_bytes, say)
        index = _index(plan, survey, tokenizer, parts)
        _write_json(out / INDEX, index)
        for path in [out / _PLAN, *out.glob("*.arrayrecord.json")]:
            path.unlink()
    return index


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


def _survey(config: DataConfig, kind: str, say: Callable[[str], None]) -> _Survey:
    """Reads all files once: which documents there are, and which are held out."""
    files = named(matching_files(config.pattern, SUFFIXES))
    places, sizes, seen, notes, corrupt, digest = [], [], {}, [], [], hashlib.sha256()
    repeated = empty = total = 0
    attempt = attempting(config, corrupt)
    for number, (name, path) in enumerate(files):
        content, documents = documents_of(path, name, config.text_key, kind, attempt) or (b"", [])
        digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode("utf-8", "surrogateescape"))
        total += len(content)
        for at, document in enumerate(documents):
            key = content_hash(document)
            empty += not document
            repeated += bool(document) and key in seen
            if document and key not in seen:
                seen[key] = len(places)
                places.append((number, at))
                sizes.append(len(document))
    notes += [f"left out: {what}" for what in corrupt]
    notes += [f"left out: {empty} empty documents"] if empty else []
    notes += [f"left out: {repeated} documents, which repeat the content of others"] if repeated else []
    chosen, cut = choose(list(seen), sizes, config.holdout_fraction)
    for note in notes:
        say(note)
    say(f"{len(files)} files, {len(places)} documents, {sum(sizes)} bytes of text")
    return _Survey(files, places, sizes, chosen, cut, digest.hexdigest(), total, notes)


def _texts(survey: _Survey, indices: Sequence[int], config: DataConfig, part: str) -> Iterator[tuple[int, bytes]]:
    """Of each document its text, or what of it is in a part; files are read once, those without any not at all."""
    read, documents = -1, []
    for i in indices:
        number, at = survey.places[i]
        if number != read:
            name, path = survey.files[number]
            found = documents_of(path, name, config.text_key, "bytes", attempting(config, []))
            read, documents = number, found[1] if found else []
        if at >= len(documents) or len(documents[at]) != survey.sizes[i]:
            raise UserError(f"{survey.files[number][1]}: was changed while it was read; start again in another folder")
        yield i, halves(documents[at], i in survey.chosen, survey.cut.get(i, 0))[part == "heldout"]


def _begin(out: pathlib.Path, plan: dict) -> dict | None:
    """Notes what is prepared here, or checks that it is what was begun; gives the index where all is done."""
    plan = json.loads(json.dumps(plan))
    for name in (INDEX, _PLAN):
        if (out / name).exists():
            stored = json.loads((out / name).read_bytes())
            begun = stored["plan"] if name == INDEX else stored
            other = [key for key in plan if key != "source" and begun.get(key) != plan[key]]  # which may move
            if other:
                found = "; ".join(f"{key} was {begun.get(key)!r}, is {plan[key]!r}" for key in other)
                raise UserError(f"--out: {str(out)!r} holds another preparation ({found}); take another folder")
            return stored if name == INDEX else None
    others = sorted(path.name for path in out.iterdir() if path.name != _LOCK and path.suffix != ".unfinished")
    if others:
        raise UserError(f"--out: {str(out)!r} is not empty (it holds {others[0]!r}); take another folder")
    _write_json(out / _PLAN, plan)
    return None


def _write_parts(
    survey: _Survey,
    config: DataConfig,
    tokenizer: Tokenizer,
    out: pathlib.Path,
    shard_bytes: int,
    say: Callable[[str], None],
) -> dict[str, list[dict]]:
    """Writes the shards that are not there yet, and gives what is known of each."""
    groups = {part: _groups(survey, survey.part(part), shard_bytes) for part in PARTS}
    total, done, worked, begun = sum(survey.sizes), 0, 0, time.monotonic()
    parts: dict[str, list[dict]] = {part: [] for part in PARTS}
    for part, shards in groups.items():
        for number, indices in enumerate(shards):
            path = out / f"{part}-{number:05d}-of-{len(shards):05d}.arrayrecord"
            note = out / f"{path.name}.json"
            if note.exists():
                entry = json.loads(note.read_bytes())
                check_size(path, entry["size"])
            else:
                texts = [text for _, text in _texts(survey, indices, config, part)]
                entry = _write_shard(path, texts, tokenizer, joined=number > 0)
                _write_json(note, entry)
                worked += entry["bytes"]
            parts[part].append(entry)
            done += entry["bytes"]
            seconds = time.monotonic() - begun
            left = f", {seconds / worked * (total - done):.0f} s left" if worked else ""
            say(f"{path.name}: {entry['tokens']} tokens; {100 * done / total:.0f} % of the text{left}")
    return parts


def _groups(survey: _Survey, indices: Sequence[int], shard_bytes: int) -> list[list[int]]:
    """Documents of a part, shard by shard."""
    groups, size = [], shard_bytes
    for i in indices:
        if size >= shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(i)
        size += survey.sizes[i]
    return groups


def _write_shard(path: pathlib.Path, texts: Sequence[bytes], tokenizer: Tokenizer, joined: bool) -> dict:
    """Writes tokens in records of `RECORD_TOKENS`, under another name until they are whole.

    Args:
      joined: the stream goes on from another shard, so that a separator comes first.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    separator = np.array([] if tokenizer.separator_id is None else [tokenizer.separator_id], token_dtype(tokenizer))
    pieces = [np.zeros(0, separator.dtype)]
    for ids in tokenizer.encode_all(texts):
        pieces += [separator, ids.astype(separator.dtype)]
    tokens = np.concatenate(pieces)[0 if joined else len(separator) :]
    unfinished = path.with_suffix(".unfinished")
    try:
        writer = ArrayRecordWriter(str(unfinished), "group_size:1")
        for start in range(0, len(tokens), RECORD_TOKENS):
            writer.write(tokens[start : start + RECORD_TOKENS].tobytes())
        writer.close()
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        raise _cannot_write(path, error) from None
    return {
        "file": path.name,
        "tokens": len(tokens),
        "documents": len(texts),
        "bytes": sum(map(len, texts)),
        "size": path.stat().st_size,
        "sha256": file_sha256(path),
    }


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Little-endian, of two bytes where the vocabulary fits."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<i4")


def _cannot_write(path: pathlib.Path, error: Exception) -> UserError:
    text = " ".join(str(error).split())
    return UserError(
        f"--out: cannot write {str(path)!r}: {text[:120]}; what is finished stays, and the same command goes on"
    )


def _write_json(path: pathlib.Path, values: dict) -> None:
    """All of it or nothing."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        unfinished.write_text(json.dumps(values, indent=1))
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise _cannot_write(path, error) from None


def _index(plan: dict, survey: _Survey, tokenizer: Tokenizer, parts: dict[str, list[dict]]) -> dict:
    found = {
        part: {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents", "bytes")}
        | {"shards": shards}
        for part, shards in parts.items()
    }
    heldout, checksums = found["heldout"], "".join(shard["sha256"] for part in PARTS for shard in parts[part])
    total = sum(survey.sizes)
    return {
        "format": FORMAT,
        "plan": plan,
        "source": plan["source"],
        "licence": plan["licence"],
        "sha256": survey.digest,
        "files": len(survey.files),
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
        "split": rule(total, heldout["bytes"], heldout["documents"], len(survey.places), bool(survey.cut)),
        "parts": found,
    }
