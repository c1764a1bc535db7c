"""Saves many small states, each into a folder of its own on a disk that is filled while one of two checkpoints is being
written; prints a line of JSON for each: what was said, and which steps are whole once there is room again.

    python saves_onto_a_filling_disk.py DISK COUNT SEED
"""

import json
import pathlib
import random
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from small_disks import fill

from oasis_jax.errors import UserError
from oasis_jax.training.checkpoints import Checkpoints, Keep
from oasis_jax.training.state import TrainState

FACTS = {name: {} for name in ("config", "corpus", "tokenizer", "versions")}


def tree(numbers: np.random.Generator, count: int) -> dict[str, jax.Array]:
    return {f"x{i}": jnp.asarray(numbers.random(numbers.choice((7, 3001, 200_003)))) for i in range(count)}


def save_two(run: pathlib.Path, state: TrainState, ended: threading.Event) -> str:
    """What is said of it; `ended` is set when that is known."""
    try:
        with Checkpoints(run, keep=Keep(2), say=print) as checkpoints:
            for step in (7, 9):
                checkpoints.save(state, step=step, data_state={}, description=FACTS)
                time.sleep(0.1)
    except UserError as error:
        return str(error)
    finally:
        ended.set()
    return ""


def whole(run: pathlib.Path, state: TrainState) -> list[int]:
    """The steps that are restored as they were saved."""
    found = []
    with Checkpoints(run, keep=None, say=print) as checkpoints:
        for step in checkpoints.steps():
            restored, _ = checkpoints.first_whole(lambda step: checkpoints.params(step, state.params), [step])
            assert jax.tree.all(jax.tree.map(np.array_equal, restored, state.params))
            found.append(step)
    return found


def main(disk: pathlib.Path, count: int, seed: int) -> None:
    chance, numbers = random.Random(seed), np.random.default_rng(seed)
    state = TrainState(jnp.int32(3), tree(numbers, 12), tree(numbers, 24), jax.random.key(0))
    for number in range(count):
        run, ended = disk / str(number), threading.Event()
        meets, delay = chance.choice((7, 9)), chance.choice((0, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2))

        def take_the_room(run=run, meets=meets, delay=delay, ended=ended) -> None:
            while not ended.is_set() and not any(run.glob(f"checkpoints/{meets}*")):
                time.sleep(0.0003)
            time.sleep(delay)
            while not ended.is_set():  # also what is given back meanwhile
                fill(disk)
                time.sleep(0.0005)

        run.mkdir()
        filling = threading.Thread(target=take_the_room)
        filling.start()
        said = save_two(run, state, ended)
        filling.join()
        (disk / "filler").unlink(missing_ok=True)
        print(json.dumps({"meets": meets, "said": said, "whole": whole(run, state)}), flush=True)
        for path in run.rglob("*"):  # the storage library's threads may still be writing
            if path.is_file():
                path.unlink(missing_ok=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
