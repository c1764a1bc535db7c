"""Corpus `pairs`: questions and answers from .jsonl files, packed into rows, with the loss on the answers alone.

A pair is one document: begin token, "Question: ...\nAnswer:", then " " and the answer, then the separator, which ends
an answer and is learned. Documents lie in a row one after the other and do not see each other: "segment_ids" tells them
apart, and the rest of a row is padding of weight 0 in a segment of its own.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from oasis_jax.config import DataConfig
from oasis_jax.data.corpus import Corpus
from oasis_jax.data.files import matching_files
from oasis_jax.data.text import TextFile, digest, read
from oasis_jax.data.tokenizers import TOKENIZERS, Tokenizer
from oasis_jax.errors import UserError, nearest

KEYS = ("question", "answer")


class Pair(NamedTuple):
    """A question and what is to be answered; where: file and line."""

    question: str
    answer: str
    where: str


def prompt(question: str) -> str:
    """What comes before an answer, in training as in evaluation; the answer begins with a blank."""
    return f"Question: {question}\nAnswer:"


def read_pairs(path: pathlib.Path, what: str) -> tuple[list[Pair], bytes]:
    """The pairs of a .jsonl file, one a line, blank lines apart, and the file's bytes.

    Args:
      what: the flag or field that named the file.

    Raises:
      UserError: cannot be read, holds nothing, or a line is not an object with a question and an answer that are text
        and not empty; names file and line.
    """
    content = read(path, what)
    lines = enumerate(content.split(b"\n"), start=1)
    pairs = [_pair(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if not pairs:
        raise UserError(f"{what}: {str(path)!r} holds no question; expected JSON objects, one a line")
    return pairs, content


def _pair(line: bytes, where: str) -> Pair:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line; JSON has to be UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{where}: not readable as JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: expected a JSON object with {KEYS[0]!r} and {KEYS[1]!r}, got {type(record).__name__}"
        )
    for key in KEYS:
        if key not in record:
            keys = ", ".join(map(repr, list(record)[:10])) or "none"
            raise UserError(f"{where}: no key {key!r}{nearest(key, record)}; keys of this line: {keys}")
        if not isinstance(record[key], str) or not record[key].strip():
            found = "is empty" if isinstance(record[key], str) else f"is not text but a {type(record[key]).__name__}"
            raise UserError(f"{where}: {key!r} {found}")
        try:
            record[key].encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: {key!r} has half of a surrogate pair at character {error.start}, which is no text"
            ) from None
    return Pair(record["question"], record["answer"], where)


def load(config: DataConfig, *, seed: int, tokenizer: Tokenizer | None) -> Corpus:
    """The pairs of all files that `config.pattern` matches; those with the lowest hashes are held out.

    Raises:
      UserError: a file or line that cannot be read, a pair longer than a row, a part without a pair.
    """
    del seed  # the text is what it is
    paths = matching_files(config.pattern)
    if others := [path for path in paths if path.suffix != ".jsonl"]:
        raise UserError(f"data.pattern: {str(others[0])!r} is no .jsonl file, which corpus=pairs reads")
    files, pairs = [], []
    for path in sorted(paths):
        found, content = read_pairs(path, "data.pattern")
        files.append(TextFile.from_content(path.name, content, ()))
        pairs += found
    heldout = _held_out(pairs, config.holdout_fraction)
    texts = [f"{prompt(pair.question)} {pair.answer}".encode() for pair in pairs]
    tokenizer = tokenizer or TOKENIZERS[config.tokenizer].train(
        [text for text, out in zip(texts, heldout) if not out], config.bpe_vocab_size
    )
    documents = list(_documents(pairs, tokenizer, config.begin_token))
    for pair, document in zip(pairs, documents):
        if len(document.targets) > config.sequence_length:
            raise UserError(
                f"data.sequence_length: {pair.where} has {len(document.targets)} tokens, a row "
                f"{config.sequence_length}; take longer rows"
            )
    train, held = ([d for d, out in zip(documents, heldout) if out is part] for part in (False, True))
    identity = {
        "name": "pairs",
        "sha256": digest(files),
        "bytes": sum(file.size for file in files),
        "files": len(files),
        "pairs": len(pairs),
        "holdout": {"fraction": config.holdout_fraction, "pairs": len(held)},
        "split": f"by question: the {len(held)} of {len(pairs)} with the lowest sha256 held out",
    }
    return Corpus(identity, tokenizer, Rows(train, config.sequence_length), Rows(held, config.sequence_length))


def _held_out(pairs: Sequence[Pair], fraction: float) -> list[bool]:
    """Which questions are never trained on: at least one, and all that are equal together."""
    questions = sorted({pair.question for pair in pairs}, key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(questions) < 2:
        raise UserError("data.pattern: corpus=pairs needs two questions at least, one of them to hold out")
    chosen = set(questions[: min(max(1, round(fraction * len(questions))), len(questions) - 1)])
    return [pair.question in chosen for pair in pairs]


class _Document(NamedTuple):
    inputs: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " n"]
    answered: Bool[np.ndarray, " n"]  # whose targets are the answer's


def _documents(pairs: Sequence[Pair], tokenizer: Tokenizer, begin: bool) -> Iterator[_Document]:
    """Question and answer are tokenized apart, as they are when a model is asked."""
    first = [tokenizer.begin_id] if begin and tokenizer.begin_id is not None else []
    last = [] if tokenizer.separator_id is None else [tokenizer.separator_id]
    questions = tokenizer.encode_all([prompt(pair.question).encode() for pair in pairs])
    answers = tokenizer.encode_all([f" {pair.answer}".encode() for pair in pairs])
    for question, answer in zip(questions, answers):
        ids = np.array([*first, *question, *answer, *last], np.int32)
        yield _Document(ids[:-1], ids[1:], np.arange(1, len(ids)) >= len(first) + len(question))


class Rows:
    """Documents packed into rows of T tokens, none of them cut: each goes into the first row that has room.

    An example is {"inputs", "targets", "segment_ids", "positions": int32 [T], "weights": float32 [T]}; positions begin
    anew with every document, and weights are 1 where a target belongs to an answer, 0 elsewhere.
    """

    def __init__(self, documents: Sequence[_Document], length: int):
        self.length = length
        self.rows: list[list[_Document]] = []
        free: list[int] = []
        first = 0  # rows before it are full
        shortest = min((len(document.inputs) for document in documents), default=0)
        for document in documents:
            size = len(document.inputs)
            place = next((i for i in range(first, len(free)) if free[i] >= size), len(free))
            if place == len(free):
                self.rows.append([])
                free.append(length)
            self.rows[place].append(document)
            free[place] -= size
            while first < len(free) and free[first] < shortest:
                first += 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        row = self.rows[index]
        example = {name: np.zeros(self.length, np.int32) for name in ("inputs", "targets", "segment_ids", "positions")}
        example["weights"] = np.zeros(self.length, np.float32)
        start = 0
        for number, document in enumerate(row, start=1):
            here = slice(start, start + len(document.inputs))
            example["inputs"][here], example["targets"][here] = document.inputs, document.targets
            example["segment_ids"][here], example["positions"][here] = number, np.arange(len(document.inputs))
            example["weights"][here] = document.answered
            start = here.stop
        example["positions"][start:] = np.arange(self.length - start)
        return example
