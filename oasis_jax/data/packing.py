"""How documents become examples of T tokens, the same whenever they are read.

Examples can be read in any order at no cost: rows are laid out from the lengths of documents alone, so that nothing is
lost or repeated where a run goes on, whatever the number of hosts.
"""

import abc
import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
from jaxtyping import Int

from oasis_jax.config import DataConfig
from oasis_jax.data.tokenizers import Tokenizer

TEXTS_OF_A_GROUP = 1000


class Tokens(Protocol):
    """Token ids; a slice of them is an array. May have `slices`, which reads several at once; see `read`."""

    def __len__(self) -> int: ...

    def __getitem__(self, window: slice) -> np.ndarray: ...


def read(tokens: Tokens, windows: Sequence[slice]) -> list[np.ndarray]:
    """Slices of tokens, in one request where they lie in files."""
    slices = getattr(tokens, "slices", None)
    return [tokens[window] for window in windows] if slices is None else slices(windows)


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


class PackedSource(abc.ABC):
    """Examples of documents, read at random.

    Args:
      stream: the documents.
      length: T.
      begin_id: of the begin token; None: there is none.

    Attributes:
      tokens: of the stream.
      places: how many the documents have in all, or at most in a row, before anything is left out.
    """

    fields: ClassVar[Mapping[str, type]] = {"inputs": np.int32, "targets": np.int32, "weights": np.float32}
    places: int

    def __init__(self, stream: Stream, length: int, begin_id: int | None):
        self.tokens, self.length, self.begin_id = stream.tokens, length, begin_id
        self.padding_id = stream.tokenizer.padding_id

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def windows(self, index: int) -> list[slice]:
        """The tokens that example `index` is made of."""

    @abc.abstractmethod
    def fill(self, row: Mapping[str, np.ndarray], tokens: Sequence[np.ndarray], index: int) -> None:
        """Writes example `index` into arrays [T], zero before, from the tokens of its windows."""

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Examples as arrays [len(indices), T], read in one request."""
        shape = (len(indices), self.length)
        batch = {name: np.zeros(shape, kind) for name, kind in self.fields.items()}
        windows = [self.windows(index) for index in indices]
        tokens = iter(read(self.tokens, [window for some in windows for window in some]))
        for row, (index, some) in enumerate(zip(indices, windows)):
            arrays = {name: x[row] for name, x in batch.items()}
            self.fill(arrays, list(itertools.islice(tokens, len(some))), index)
        return batch

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return {name: x[0] for name, x in self.batch([index]).items()}


class Windows(PackedSource):
    """A token stream cut into examples of T tokens, without overlap; a tail that fills no window is left out.

    An example is {"inputs": int32 [T], "targets": int32 [T], "weights": float32 [T], all 1}. With a begin token the
    inputs are [begin, x_0 .. x_{T-2}] and the targets x_0 .. x_{T-1}; without one they are x_0 .. x_{T-1} and x_1 ..
    x_T.
    """

    def __init__(self, stream: Stream, length: int, begin_id: int | None):
        super().__init__(stream, length, begin_id)
        # Without a begin token the last target lies one token past its window.
        self.places = max(len(self.tokens) - (begin_id is None), 0)

    def __len__(self) -> int:
        return self.places // self.length

    def windows(self, index: int) -> list[slice]:
        start = index * self.length
        return [slice(start, start + self.length + (self.begin_id is None))]

    def fill(self, row: Mapping[str, np.ndarray], tokens: Sequence[np.ndarray], index: int) -> None:
        _fill_piece(row["inputs"], row["targets"], tokens[0], self.begin_id)
        row["weights"][:] = 1


def _fill_piece(inputs: np.ndarray, targets: np.ndarray, tokens: np.ndarray, begin_id: int | None) -> None:
    if begin_id is None:
        inputs[:], targets[:] = tokens[:-1], tokens[1:]
    else:
        inputs[0], inputs[1:], targets[:] = begin_id, tokens[:-1], tokens


class _Rows(PackedSource):
    """Documents side by side, each a segment with positions of its own that begins with the begin token where there is
    one; the rest of a row is padding of weight 0 in a segment of its own.

    A document of n tokens, its separator counted, has n places behind a begin token, and n - 1 without one, where each
    token but the first is a target.
    """

    fields: ClassVar[Mapping[str, type]] = {**PackedSource.fields, "segment_ids": np.int32, "positions": np.int32}

    def __init__(self, stream: Stream, length: int, begin_id: int | None):
        super().__init__(stream, length, begin_id)
        lengths = stream.read_lengths().astype(np.int64)
        if len(lengths) and stream.tokenizer.separator_id is not None:
            lengths += 1
            lengths[-1] -= 1
        self.starts = np.cumsum(lengths) - lengths
        self.sizes = np.maximum(lengths - (begin_id is None), 0)
        self.places = int(self.sizes.sum())

    @abc.abstractmethod
    def pieces(self, index: int) -> Iterable[tuple[int, int]]:
        """Of each document in a row where its tokens start in the stream, and how many places it has."""

    def windows(self, index: int) -> list[slice]:
        return [slice(start, start + size + (self.begin_id is None)) for start, size in self.pieces(index)]

    def fill(self, row: Mapping[str, np.ndarray], tokens: Sequence[np.ndarray], index: int) -> None:
        at = 0
        for number, piece in enumerate(tokens, start=1):
            size = len(piece) - (self.begin_id is None)
            here = slice(at, at + size)
            _fill_piece(row["inputs"][here], row["targets"][here], piece, self.begin_id)
            row["segment_ids"][here], row["positions"][here], row["weights"][here] = number, np.arange(size), 1
            at += size
        row["inputs"][at:] = row["targets"][at:] = self.padding_id
        row["positions"][at:] = np.arange(self.length - at)


class SplitRows(_Rows):
    """Documents joined and cut into rows of T places; those that a cut meets go on in the next row as a document of
    their own. A tail that fills no row is left out.
    """

    def __init__(self, stream: Stream, length: int, begin_id: int | None):
        super().__init__(stream, length, begin_id)
        self.ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return self.places // self.length

    def pieces(self, index: int) -> Iterator[tuple[int, int]]:
        place, end = index * self.length, (index + 1) * self.length
        document = int(np.searchsorted(self.ends, place, side="right"))
        while place < end:
            left = int(self.ends[document]) - place
            if left:  # a document of one token has no place where there is no begin token
                yield int(self.starts[document] + self.sizes[document]) - left, min(left, end - place)
            place += min(left, end - place)
            document += 1


class BestFitRows(_Rows):
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
        rows = best_fit(self._sizes, length)
        self._order = np.argsort(rows, kind="stable")
        self._ends = np.cumsum(np.bincount(rows, minlength=0)) if len(rows) else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def pieces(self, index: int) -> Iterable[tuple[int, int]]:
        here = self._order[int(self._ends[index - 1]) if index else 0 : int(self._ends[index])]
        return zip(self._starts[here].tolist(), self._sizes[here].tolist())


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


class GroupedTexts(PackedSource):
    """What run_clm of transformers makes of texts, as OASIS' published code does: every text behind a begin token where
    there is one, without separators, 1,000 texts joined and cut into rows of T tokens, the rest of them left out. A
    row's last token is no input of the loss, and attention crosses texts.
    """

    def __init__(self, stream: Stream, length: int, begin_id: int | None):
        super().__init__(stream, length, begin_id)
        lengths, begins = stream.read_lengths().astype(np.int64), begin_id is not None
        separated = lengths + (stream.tokenizer.separator_id is not None)
        self.starts = np.cumsum(separated) - separated
        self.ends = np.cumsum(lengths + begins)
        borders = np.append(np.arange(0, len(lengths), TEXTS_OF_A_GROUP), len(lengths))
        places = np.append(0, self.ends)[borders]
        self._group_starts = places[:-1]
        self._rows = np.cumsum(np.diff(places) // length)
        self.places = int(np.diff(places).max(initial=0))

    def __len__(self) -> int:
        return int(self._rows[-1]) if len(self._rows) else 0

    def _texts(self, index: int) -> Iterator[tuple[int, int, int]]:
        """Of each text in a row: its number, and from which to which place of all texts it is there."""
        group = int(np.searchsorted(self._rows, index, side="right"))
        row = index - (int(self._rows[group - 1]) if group else 0)
        place = int(self._group_starts[group]) + row * self.length
        end, text = place + self.length, int(np.searchsorted(self.ends, place, side="right"))
        while place < end:
            stop = min(int(self.ends[text]), end)
            yield text, place, stop
            place, text = stop, text + 1

    def windows(self, index: int) -> list[slice]:
        found = []
        for text, place, stop in self._texts(index):
            # Where the text's own first token lies among all texts, behind its begin token.
            first = (int(self.ends[text - 1]) if text else 0) + (self.begin_id is not None)
            start = int(self.starts[text]) - first
            found.append(slice(start + max(place, first), start + stop))
        return found

    def fill(self, row: Mapping[str, np.ndarray], tokens: Sequence[np.ndarray], index: int) -> None:
        at = 0
        for (_, place, stop), piece in zip(self._texts(index), tokens):
            inputs = row["inputs"][at : at + stop - place]
            if len(piece) < len(inputs):
                inputs[0] = self.begin_id
            inputs[len(inputs) - len(piece) :] = piece
            at += len(inputs)
        row["targets"][:-1], row["targets"][-1], row["weights"][:-1] = row["inputs"][1:], self.padding_id, 1


PACKINGS: dict[str, type[PackedSource]] = {
    "stream": Windows,
    "split": SplitRows,
    "best_fit": BestFitRows,
    "group_texts": GroupedTexts,
}


def pack(stream: Stream, config: DataConfig) -> PackedSource:
    """The examples of a stream as `config.packing` and `config.begin_token` say."""
    begin_id = stream.tokenizer.begin_id if config.begin_token else None
    return PACKINGS[config.packing](stream, config.sequence_length, begin_id)
