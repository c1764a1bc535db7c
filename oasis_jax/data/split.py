"""Which text is never trained on."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from oasis_jax.errors import UserError

# How far the share held out may be from the one asked for, as a part of the latter, before a document is cut for it
# and before it is said.
_TOLERANCE = 0.1


@dataclasses.dataclass(frozen=True)
class Split:
    """Documents to train on and documents kept back.

    Attributes:
      train, heldout: in the order of the corpus.
      rule: in words, how they were chosen.
      notes: what was left out and what is not as asked for, a line each.
    """

    train: Sequence[bytes]
    heldout: Sequence[bytes]
    rule: str
    notes: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Of what is held out: equal for equal documents in an equal order."""
        return hashlib.sha256(b"".join(hashlib.sha256(document).digest() for document in self.heldout)).hexdigest()


def hold_out(documents: Sequence[bytes], fraction: float) -> Split:
    """Keeps about `fraction` of the bytes back: the same ones for every seed, sequence length, tokenizer, name and
    order of files.

    Documents with the same content (line ends aside) count once. The others are taken in the order of their hashes as
    long as they fit; where that misses the share by more than a tenth, the next one in that order gives its tail.

    Args:
      documents: texts that are not empty.
      fraction: of the bytes of all different documents, between 0 and 1.

    Raises:
      UserError: there is no text.
    """
    texts: dict[bytes, bytes] = {}
    for document in documents:
        texts.setdefault(content_hash(document), document)
    notes = []
    if len(texts) < len(documents):
        repeated = sum(map(len, documents)) - sum(map(len, texts.values()))
        notes.append(
            f"left out: {len(documents) - len(texts)} of {len(documents)} documents ({repeated} bytes), which repeat "
            "the content of others"
        )
    kept = list(texts.values())
    chosen, cut = choose(list(texts), list(map(len, kept)), fraction)
    parts = [halves(text, i in chosen, cut.get(i, 0)) for i, text in enumerate(kept)]
    train, heldout = ([part[side] for part in parts if part[side]] for side in (0, 1))
    total, size = sum(map(len, kept)), sum(map(len, heldout))
    chosen_how = rule(total, size, len(heldout), len(kept), bool(cut))
    return Split(train, heldout, chosen_how, (*notes, *missed_share(size, total, fraction)))


def missed_share(size: int, total: int, fraction: float) -> list[str]:
    """A line where what is held out is not the share asked for, none where it is."""
    if abs(size - fraction * total) <= _TOLERANCE * fraction * total:
        return []
    return [
        f"held out: {size} of {total} bytes ({size / total:.3g}) where data.holdout_fraction={fraction} was asked "
        "for; so small a text is not cut closer"
    ]


def rule(total: int, size: int, count: int, documents: int, cut: bool) -> str:
    """In words, how `count` of `documents` documents, `size` of `total` bytes, were chosen."""
    return (
        f"by document: {size} of {total} bytes in {count} of {documents} documents held out, taken in the order of "
        f"their contents' sha256 as long as they fit{', of the last one its tail alone' if cut else ''}"
    )


def hold_out_by_name(names: Sequence[str], documents: Sequence[bytes], fraction: float) -> Split:
    """Keeps back the documents that fit into `fraction` of the bytes, taken in the order of their names' hashes: the
    same names in every version of a collection, whatever changes in the texts. Nothing is cut, and copies stay.
    """
    keys = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    sizes = list(map(len, documents))
    chosen, _ = choose(keys, sizes, fraction)
    rule = (
        f"by file: {len(chosen)} of {len(documents)} files ({sum(sizes[i] for i in chosen)} of {sum(sizes)} bytes) "
        "held out, taken in the order of their names' sha256 as long as they fit"
    )
    train, heldout = ([text for i, text in enumerate(documents) if (i in chosen) == side] for side in (False, True))
    return Split(train, heldout, rule)


def content_hash(document: bytes) -> bytes:
    """What tells documents apart: the sha256 of their bytes, line ends aside."""
    return hashlib.sha256(document.replace(b"\r\n", b"\n")).digest()


def choose(
    keys: Sequence[bytes] | np.ndarray, sizes: Sequence[int] | np.ndarray, fraction: float
) -> tuple[set[int], dict[int, int]]:
    """The documents that are held out, and of one that is cut, how many of its last bytes are; keys are sha256."""
    if not len(keys):
        raise UserError("data.corpus: there is no text in it")
    order = np.argsort(np.asarray(keys, "S32"), kind="stable")
    ordered, size, taken, start = np.asarray(sizes, np.int64)[order], 0, [], 0
    wanted = fraction * int(ordered.sum())
    # As many as fit, then the next that does; there are a few such runs, however many documents there are.
    while len(fitting := np.flatnonzero(ordered[start:] <= math.floor(wanted) - size)):
        start += int(fitting[0])
        reached = np.cumsum(ordered[start:])
        count = int(np.searchsorted(reached, math.floor(wanted) - size, side="right"))
        taken.append(order[start : start + count])
        size += int(reached[count - 1])
        start += count
    chosen = set(np.concatenate([np.zeros(0, np.int64), *taken]).tolist())
    if size >= (1 - _TOLERANCE) * wanted:
        return chosen, {}
    # Less than everything is wanted, so one is left, and it is longer than what is missing.
    first = next(i for i in order.tolist() if i not in chosen)
    return chosen, {first: max(1, round(wanted - size))}


def halves(text: bytes, chosen: bool, tail: int) -> tuple[bytes, bytes]:
    """What of a document is trained on and what is held out; cut between two characters where it is UTF-8 at all."""
    cut = 0 if chosen else len(text) - tail
    for _ in range(3):
        if 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:
            cut += 1
    return text[:cut], text[cut:]
