"""Damage to files, and what a reader makes of each: the same, a refusal in one line, or something else."""

import collections
import faulthandler
import pathlib
import random
import shutil
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from oasis_jax.errors import UserError

SECONDS = 60  # for one case; the first reads of a format compile


def damaged(chance: random.Random, content: bytes) -> bytes:
    """A file with one bit flipped, or cut off somewhere."""
    if chance.random() < 0.25:
        return content[: chance.randrange(len(content))]
    changed = bytearray(content)
    # Half of the bits lie in the first kilobyte, where headers are.
    at = chance.randrange(min(1024, len(content)) if chance.random() < 0.5 else len(content))
    changed[at] ^= 1 << chance.randrange(8)
    return bytes(changed)


def search(
    folder: pathlib.Path, names: Sequence[str], read: Callable[[pathlib.Path], Any], count: int, seed: int
) -> tuple[collections.Counter, list[str]]:
    """Damages a file of a folder at a time and reads it.

    Args:
      folder: what is read; put together anew for each case.
      names: of the files that are damaged.
      read: folder -> what is in it, comparable; raises UserError.
      count: cases.
      seed: of them.

    Returns:
      How many were the "same", "refused", "other" than before; and those that ended otherwise, in words.
    """
    chance, counts, wrong, work = random.Random(seed), collections.Counter(), [], folder.parent / "damaged"
    shutil.copytree(folder, work)  # what reads may also write, such as a report
    expected = read(work)
    for number in range(count):
        name = chance.choice(names)
        content = (folder / name).read_bytes()
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        (work / name).write_bytes(changed := damaged(chance, content))
        what = next((f"byte {i}" for i, (a, b) in enumerate(zip(changed, content)) if a != b), f"cut to {len(changed)}")
        kind, said = _outcome(read, work, expected)
        counts[kind] += 1
        if kind == "wrong":
            wrong.append(f"case {number}, {name}, {what}: {said}")
    return counts, wrong


def _outcome(read: Callable[[pathlib.Path], Any], folder: pathlib.Path, expected: Any) -> tuple[str, str]:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        return ("same" if read(folder) == expected else "other"), ""
    except UserError as error:
        fits = len(str(error).splitlines()) == 1 and len(str(error)) < 2000
        return ("refused" if fits else "wrong"), repr(str(error)[:500])
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = next(
            (frame for frame in reversed(where) if "oasis_jax" in pathlib.Path(frame.filename).parts), where[-1]
        )
        return "wrong", f"{type(error).__name__}: {str(error)[:200]} ({ours.filename}:{ours.lineno})"
    finally:
        faulthandler.cancel_dump_traceback_later()
