"""How documents become examples of T tokens, the same whenever they are read.

Examples can be read in any order at no cost: rows are laid out from the lengths of documents alone, so that nothing is
lost or repeated where a run goes on, whatever the number of hosts.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from oasis_jax.config import DataConfig
from oasis_jax.data.tokenizers import Tokenizer

TEXTS_OF_A_GROUP = 1000


class Tokens(Protocol):
    """Token ids; a slice of them is an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, window: slice) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Stream:
    """Documents one after another, with the tokenizer's separator, where it has one, between them.

    Attributes:
      tokens: of all documents.
      read_lengths: gives the number of tokens of each document, its separator not counted; called where borders matter.
      tokenizer: that made them.
    """

    tokens: Tokens
    read_lengths: Callable[[], Int[np.ndarray, " documents"]]
    tokenizer: Tokenizer


class PackedSource(Protocol):
    """Examples of documents, read at random.

    Attributes:
      tokens: of the stream.
      length: T.
      places: how many the documents have in all, or at most in a row, before anything is left out.
    """

    tokens: Tokens
    length: int
    places: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class Piece(NamedTuple):
    """Places of a row that belong to one document: `size` of them from token `start` of the stream on."""

    start: int
    size: int


class Windows:
    """A token stream cut into examples of T tokens, without overlap; a tail that fills no window is left out.

    An example is {"inputs": int32 [T], "targets": int32 [T], "weights": float32 [T], all 1}. With a begin token the
    inputs are [begin, x_0 .. x_{T-2}] and the targets x_0 .. x_{T-1}; without one they are x_0 .. x_{T-1} and x_1 ..
    x_T.
    """

    def __init__(self, tokens: Tokens, length: int, begin_id: int | None):
        self.tokens, self.length, self.begin_id = tokens, length, begin_id
        # Without a begin token the last target lies one token past its window.
        self.places = max(len(tokens) - (begin_id is None), 0)

    def __len__(self) -> int:
        return self.places // self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = _checked(index, self) * self.length
        if self.begin_id is None:
            window = self.tokens[start : start + self.length + 1].astype(np.int32)
        else:
            window = np.concatenate([[self.begin_id], self.tokens[start : start + self.length]]).astype(np.int32)
        return {"inputs": window[:-1], "targets": window[1:], "weights": np.ones(self.length, np.float32)}


def _checked(index: int, source) -> int:
    if not 0 <= index < len(source):
        raise IndexError(f"example {index} of {len(source)}")
    return index


class _Documents:
    """Where the documents of a stream lie. A document of n tokens, its separator counted, has n places behind a begin
    token, and n - 1 without one, where each token but the first is a target.
    """

    def __init__(self, stream: Stream, length: int, begin_id: int | None):
        self.tokens, self.length, self.begin_id = stream.tokens, length, begin_id
        self.padding_id = stream.tokenizer.padding_id
        lengths = stream.read_lengths().astype(np.int64)
        if len(lengths) and stream.tokenizer.separator_id is not None:
            lengths += 1
            lengths[-1] -= 1
        self.starts = np.cumsum(lengths) - lengths
        self.sizes = np.maximum(lengths - (begin_id is None), 0)

    def example(self, pieces: Iterable[Piece]) -> dict[str, np.ndarray]:
        """Pieces in a row, each a segment with positions of its own that begins with the begin token where there is
        one. The rest is padding of weight 0, in a segment of its own.
        """
        length = self.length
        example = {name: np.full(length, self.padding_id, np.int32) for name in ("inputs", "targets")}
        example |= {name: np.zeros(length, np.int32) for name in ("segment_ids", "positions")}
        example["weights"] = np.zeros(length, np.float32)
        at = 0
        for number, (start, size) in enumerate(pieces, start=1):
            here = slice(at, at + size)
            if self.begin_id is None:
                tokens = self.tokens[start : start + size + 1]
                example["inputs"][here], example["targets"][here] = tokens[:-1], tokens[1:]
            else:
                tokens = self.tokens[start : start + size]
                example["targets"][here] = tokens
                example["inputs"][at], example["inputs"][at + 1 : at + size] = self.begin_id, tokens[:-1]
            example["segment_ids"][here], example["positions"][here] = number, np.arange(size)
            example["weights"][here] = 1
            at = here.stop
        example["positions"][at:] = np.arange(length - at)
        return example


class SplitRows(_Documents):
    """Documents joined and cut into rows of T places; those that a cut meets go on in the next row as a document of
    their own. A tail that fills no row is left out.
    """

    def __init__(self, stream: Stream, length: int, begin_id: int | None):
        super().__init__(stream, length, begin_id)
        self.ends = np.cumsum(self.sizes)
        self.places = int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        return self.places // self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.example(self._pieces(_checked(index, self) * self.length))

    def _pieces(self, place: int) -> Iterator[Piece]:
        end, document = place + self.length, int(np.searchsorted(self.ends, place, side="right"))
        while place < end:
            left = int(self.ends[document]) - place
            if left:  # a document of one token has no place where there is no begin token
                yield Piece(int(self.starts[document] + self.sizes[document]) - left, min(left, end - place))
            place += min(left, end - place)
            document += 1


class BestFitRows(_Documents):
    """Every document whole, in the row whose room it fits best; of those longer than a row, full rows first (Ding et
    al., arXiv 2404.10830).
    """

    def __init__(self, stream: Stream, length: int, begin_id: int | None):
        super().__init__(stream, length, begin_id)
        count = -(-self.sizes // length)
        first = np.cumsum(count) - count
        offset = (np.arange(int(count.sum())) - np.repeat(first, count)) * length
        self._sizes = np.minimum(np.repeat(self.sizes, count) - offset, length)
        self._starts = np.repeat(self.starts, count) + offset
        self.places = int(self.sizes.sum())
        rows = best_fit(self._sizes, length)
        self._order = np.argsort(rows, kind="stable")
        self._ends = np.cumsum(np.bincount(rows, minlength=0)) if len(rows) else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        first = int(self._ends[index - 1]) if _checked(index, self) else 0
        here = self._order[first : int(self._ends[index])]
        return self.example(map(Piece, self._starts[here].tolist(), self._sizes[here].tolist()))


def best_fit(sizes: Int[np.ndarray, " n"], length: int) -> Int[np.ndarray, " n"]:
    """The row of each of `sizes`, all between 1 and `length`: from the largest to the smallest, each goes into the
    fullest row that has room for it. Equal sizes are placed together, so that it takes time in their number alone.
    """
    rows, opened = np.zeros(len(sizes), np.int64), 0
    order = np.argsort(-sizes, kind="stable")
    borders = np.flatnonzero(np.diff(sizes[order], prepend=-1, append=-1))
    free: dict[int, np.ndarray] = {}  # room -> rows that have it
    rooms: list[int] = []  # in order
    for first, last in itertools.pairwise(borders):
        size, left = int(sizes[order[first]]), order[first:last]
        while len(left):
            found = bisect.bisect_left(rooms, size)
            room = rooms[found] if found < len(rooms) else length
            each = room // size
            wanted = -(-len(left) // each)
            if found < len(rooms):
                there = free.pop(rooms.pop(found))
                used, unused = there[:wanted], there[wanted:]
                _add(free, rooms, room, unused)
            else:
                used = np.arange(opened, opened + wanted)
                opened += wanted
            placed = min(len(left), each * len(used))
            rows[left[:placed]] = np.repeat(used, each)[:placed]
            full, rest = divmod(placed, each)
            _add(free, rooms, room - each * size, used[:full])
            _add(free, rooms, room - rest * size, used[full:])
            left = left[placed:]
    return rows


def _add(free: dict[int, np.ndarray], rooms: list[int], room: int, rows: np.ndarray) -> None:
    if not len(rows) or not room:
        return
    if room in free:
        free[room] = np.concatenate([free[room], rows])
    else:
        free[room] = rows
        bisect.insort(rooms, room)


class GroupedTexts:
    """What run_clm of transformers makes of texts, as OASIS' published code does: every text behind a begin token where
    there is one, without separators, 1,000 texts joined and cut into rows of T tokens, the rest of them left out. A
    row's last token is no input of the loss, and attention crosses texts.
    """

    def __init__(self, stream: Stream, length: int, begin_id: int | None):
        self.tokens, self.length, self.begin_id = stream.tokens, length, begin_id
        self.padding_id = stream.tokenizer.padding_id
        lengths = stream.read_lengths().astype(np.int64)
        separated = lengths + (stream.tokenizer.separator_id is not None)
        self.starts = np.cumsum(separated) - separated
        self.ends = np.cumsum(lengths + (begin_id is not None))
        borders = np.append(np.arange(0, len(lengths), TEXTS_OF_A_GROUP), len(lengths))
        self._group_starts = np.append(0, self.ends)[borders[:-1]]
        sizes = np.diff(np.append(0, self.ends)[borders])
        self.rows = np.cumsum(sizes // length)
        self.places = int(sizes.max(initial=0))

    def __len__(self) -> int:
        return int(self.rows[-1]) if len(self.rows) else 0

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        group = int(np.searchsorted(self.rows, _checked(index, self), side="right"))
        row = index - (int(self.rows[group - 1]) if group else 0)
        tokens = self._joined(int(self._group_starts[group]) + row * self.length)
        targets = np.append(tokens[1:], self.padding_id).astype(np.int32)
        weights = np.ones(self.length, np.float32)
        weights[-1] = 0
        return {"inputs": tokens, "targets": targets, "weights": weights}

    def _joined(self, place: int) -> np.ndarray:
        """T tokens of all texts, joined, from a place on."""
        found, end = [], place + self.length
        text = int(np.searchsorted(self.ends, place, side="right"))
        while place < end:
            first = int(self.ends[text - 1]) if text else 0
            stop = min(int(self.ends[text]), end)
            begins = self.begin_id is not None
            if begins and place == first and place < stop:
                found.append([self.begin_id])
            start = int(self.starts[text]) - first - begins
            found.append(self.tokens[start + max(place, first + begins) : start + stop])
            place, text = stop, text + 1
        return np.concatenate(found).astype(np.int32)


PACKINGS = {
    "stream": lambda stream, length, begin_id: Windows(stream.tokens, length, begin_id),
    "split": SplitRows,
    "best_fit": BestFitRows,
    "group_texts": GroupedTexts,
}


def pack(stream: Stream, config: DataConfig) -> PackedSource:
    """The examples of a stream as `config.packing` and `config.begin_token` say."""
    begin_id = stream.tokenizer.begin_id if config.begin_token else None
    return PACKINGS[config.packing](stream, config.sequence_length, begin_id)
