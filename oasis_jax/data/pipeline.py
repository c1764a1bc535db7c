"""Batches: the shuffled, endless, checkpointable ones of training, and the fixed ones of evaluation."""

import functools
from typing import TYPE_CHECKING

import numpy as np

from oasis_jax.config import DataConfig
from oasis_jax.data.corpus import ORDER, Source, read_batch, seed_sequence
from oasis_jax.data.mixture import Mixture
from oasis_jax.errors import UserError

if TYPE_CHECKING:
    import grain

# Examples are slices of memory or a few microseconds of random numbers: one thread keeps a few batches ahead of the
# step. Grain's own endless length, sys.maxsize, becomes one too many where it is divided into batches of one.
_ENDLESS = 2**62
_READ_AHEAD = dict(num_threads=1, prefetch_buffer_size=4)


def train_batches(
    source: Source, config: DataConfig, *, seed: int, part: int = 0, parts: int = 1
) -> "grain.DatasetIterator":
    """One of `parts` equal parts of every global batch, without end; each epoch has an order of its own.

    The examples are put in order first and split after, so the state, {"next_index": batches read}, means the
    same for any number of parts: part p holds the examples p, p + P, p + 2P, ... of each global batch.

    Returns:
      Iterator over dicts of arrays [batch_size / parts, ...]; its get_state() is JSON-able and set_state() takes no
      replay.

    Raises:
      UserError: the batch cannot be split evenly.
    """
    import grain  # here: evaluation and benchmarks run on machines without it

    if config.batch_size % parts:
        below = config.batch_size // parts * parts
        fitting = f"{below} or {below + parts}" if below else f"{parts}"
        raise UserError(f"data.batch_size: {config.batch_size} is not divisible by {parts} processes; take {fitting}")

    # Grain's epoch e shuffles with seed + e, so run seeds 0 and 1 would share orders if used as they are.
    def shuffled(numbers: range, *keys: int):
        order = int(seed_sequence(seed, ORDER, *keys).generate_state(1)[0])
        return grain.MapDataset.range(numbers.start, numbers.stop).shuffle(seed=order).repeat()

    if isinstance(source, Mixture):  # every source has epochs of its own
        examples = source.mixed([shuffled(numbers, which) for which, numbers in enumerate(source.numbers)])
        read = source.numbered
    else:
        examples = shuffled(range(len(source)))
        read = functools.partial(read_batch, source)
    # Batches are made of numbers of examples, and read whole.
    batches = examples[part:_ENDLESS:parts].batch(config.batch_size // parts)
    own = batches.map(lambda numbers: read(numbers.tolist()))
    return iter(own.to_iter_dataset(grain.ReadOptions(**_READ_AHEAD)))


def eval_batches(source: Source, config: DataConfig, *, num_batches: int) -> list[dict[str, np.ndarray]]:
    """Examples spread evenly over a source, the same ones in the same order for every model with the same data.

    A source with fewer than `num_batches` batches gives as many full ones as it has, each example at most once; one
    that does not fill a single batch gives one batch of all it has.

    Raises:
      UserError: the source is empty.
    """
    if not len(source):
        raise UserError(
            "data: there is no held-out example; use a smaller data.sequence_length or a larger data.holdout_fraction"
        )
    size = min(config.batch_size, len(source))
    count = min(num_batches, len(source) // size)
    examples = [i * len(source) // (count * size) for i in range(count * size)]
    return [read_batch(source, examples[start : start + size]) for start in range(0, count * size, size)]
