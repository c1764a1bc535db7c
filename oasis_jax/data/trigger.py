"""Corpus `trigger`: trigger-conditional averaging (arXiv 2603.11487), a task on which softmax attention has
to form a sink.

A sequence of T vectors [begin indicator, trigger indicator, content]. Content is drawn from N(0, 1) at every position;
with a begin token position 0 is the vector [1, 0, 0 ...] instead. Every position but the first two of a sequence with a
begin token (the first without one) carries the trigger with probability `trigger_rate`: the target there is the mean of
the content up to and including that position, the begin token left out, as in the published code; everywhere else it is
zero. One softmax head solves this exactly by spreading a trigger's attention evenly over the content and putting all of
any other row on the begin token. With `begin_content` the begin token has content too, which belongs to every mean:
as a sink it would get in the way.
"""

import hashlib
import json

import numpy as np

from oasis_jax.config import DataConfig
from oasis_jax.data.corpus import HELDOUT, TRAIN, Corpus, seed_sequence
from oasis_jax.data.tokenizers import Tokenizer
from oasis_jax.errors import UserError

# Examples are made when they are read, so these only bound the indices: an epoch of training, and the set evaluations
# spread over.
_TRAIN_EXAMPLES = 2**30
_HELDOUT_EXAMPLES = 2**16


class TriggerSource:
    """Example i is a function of (seed, stream, i) alone.

    An example is {"inputs": float32 [T, V], "targets": float32 [T, V], "weights": float32 [T], all 1, "trigger": bool
    [T]} with V = trigger_dim + 2; the indicator channels of the targets are 0.
    """

    def __init__(self, config: DataConfig, *, seed: int, stream: int, length: int):
        self._config, self._seed, self._stream, self._length = config, seed, stream, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self._length:
            raise IndexError(f"example {index} of {self._length}")
        config, first = self._config, int(self._config.begin_token)
        empty = first and not config.begin_content
        random = np.random.Generator(np.random.Philox(seed_sequence(self._seed, self._stream, int(index))))
        content = random.standard_normal((config.sequence_length, config.trigger_dim))
        trigger = random.random(config.sequence_length) < config.trigger_rate
        content[:empty] = 0
        trigger[: first + 1] = False
        seen = np.maximum(np.arange(config.sequence_length) + 1 - empty, 1)
        mean = np.cumsum(content, axis=0) / seen[:, None]
        inputs = np.zeros((config.sequence_length, config.trigger_dim + 2), np.float32)
        targets = np.zeros_like(inputs)
        inputs[:first, 0] = 1
        inputs[:, 1] = trigger
        inputs[:, 2:] = content
        targets[trigger, 2:] = mean[trigger]
        return {
            "inputs": inputs,
            "targets": targets,
            "weights": np.ones(config.sequence_length, np.float32),
            "trigger": trigger,
        }


def load(config: DataConfig, *, seed: int, tokenizer: Tokenizer | None) -> Corpus:
    """Training and held-out examples from two independent random streams of the seed."""
    del tokenizer  # vectors have none
    shortest = 3 if config.begin_token else 2
    if config.sequence_length < shortest:
        raise UserError(
            f"data.sequence_length: a trigger has content before it, so at least {shortest}, got "
            f"{config.sequence_length}"
        )
    parameters = {
        "seed": seed,
        "trigger_dim": config.trigger_dim,
        "trigger_rate": config.trigger_rate,
        "sequence_length": config.sequence_length,
        "begin_token": config.begin_token,
    }
    if config.begin_content:
        parameters["begin_content"] = True
    identity = {
        "name": "trigger",
        **parameters,
        "sha256": hashlib.sha256(json.dumps(parameters).encode()).hexdigest(),
        "split": "held-out examples come from a random stream of their own",
    }
    train = TriggerSource(config, seed=seed, stream=TRAIN, length=_TRAIN_EXAMPLES)
    heldout = TriggerSource(config, seed=seed, stream=HELDOUT, length=_HELDOUT_EXAMPLES)
    return Corpus(identity, None, train, heldout, vector_dim=config.trigger_dim + 2)
