"""Log-likelihoods of given tokens, for the harness and for perplexity: a few compiled shapes, logits never whole."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.evaluation.evaluator import Evaluator, FinalReading, Rows
from oasis_jax.evaluation.measures.perplexity import position_losses
from oasis_jax.evaluation.passes import DecoderPass, collect, padded_rows
from oasis_jax.model.numerics import Numerics
from oasis_jax.pretrained import Pretrained

_LEAST = 16  # lengths are rounded up to powers of two from here on, so that few programs are compiled


class Row(NamedTuple):
    """Tokens, of which the last `scored` are predicted from all before them; at least the first is context."""

    tokens: Sequence[int]
    scored: int


class Scores(NamedTuple):
    """Of the scored tokens of a row.

    Attributes:
      logprobs: log-probabilities in nats; float64, of what the model gave in float32 or better.
      greedy: whether the token has the largest logit; of equal ones the first.
    """

    logprobs: Float[np.ndarray, " n"]
    greedy: Bool[np.ndarray, " n"]

    @property
    def total(self) -> float:
        """The log-likelihood of the scored tokens together, in nats, summed in float64."""
        return float(self.logprobs.sum())


def longest_text(config: ModelConfig) -> int | None:
    """How many tokens a model can read; None: as many as there are."""
    room = config.learned_positions and config.learned_positions - config.position_offset
    return min((bound for bound in (config.context_length, room) if bound), default=None)


def score(
    model: Pretrained, rows: Sequence[Row], *, batch_size: int = 8, on_scored: Callable[[int], None] | None = None
) -> list[Scores]:
    """Log-likelihoods of the ends of rows, each under the model as `model.numerics` and `model.placement` compute it.

    Rows of like length share a batch. Its length is a power of two, at most the model's context, and its size is
    `batch_size`, so that there are never more compiled programs than powers of two. What fills a row up comes after its
    end, where causal attention cannot see it. A scheme that takes ranges over a whole batch sees that too: the row's
    own tokens again.

    Args:
      model: of tokens, on any mesh.
      rows: of any lengths.
      batch_size: rows computed at once; rounded up to what the mesh divides.
      on_scored: called with how many more rows are done.

    Returns:
      Scores, in the order of `rows`.

    Raises:
      UserError: a model of vectors; a row without context, longer than the model's context, or with a token outside the
        vocabulary; a mesh that does not divide the length of a batch.
    """
    if model.config.inputs != "tokens":
        raise UserError(f"score: needs a model of tokens, but model.inputs={model.config.inputs}")
    if batch_size < 1:
        raise UserError(f"score: batch_size must be at least 1, got {batch_size}")
    for number, row in enumerate(rows):
        _check(model.config, row, number)
    found: list[Scores | None] = [None] * len(rows)
    ways = model.placement.ways("batch")
    size = -(-batch_size // ways) * ways
    longest_first = sorted(range(len(rows)), key=lambda number: -len(rows[number].tokens))
    groups = itertools.groupby(longest_first, key=lambda number: _kind(model.config, len(rows[number].tokens) - 1))
    for _, group in groups:
        for chosen in _batched(list(group), size):
            for number, scores in zip(chosen, _score_batch(model, [rows[number] for number in chosen], size)):
                found[number] = scores
            if on_scored is not None:
                on_scored(len(chosen))
    return found


def _batched(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _check(config: ModelConfig, row: Row, number: int) -> None:
    length, longest = len(row.tokens), longest_text(config)
    if not 1 <= row.scored < length:
        raise UserError(
            f"score: row {number} has {length} tokens, so 1 to {length - 1} can be scored, not {row.scored}"
        )
    if longest is not None and length - 1 > longest:
        raise UserError(f"score: row {number} reads {length - 1} tokens, but the model was made for {longest}")
    low, high = min(row.tokens), max(row.tokens)
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise UserError(f"score: row {number}: token {wrong} is outside the vocabulary 0..{config.vocab_size - 1}")


def _gamma_of_length(config: ModelConfig) -> bool:
    """Whether attention divides by the number of keys, those of the padding too."""
    return config.normalizer == "clipped" and not config.clip_gamma


def _short_of(config: ModelConfig) -> int | None:
    """The longest text whose positions LongRoPE's short factors turn; all of a batch get one list."""
    scaling = config.rope_scaling
    return scaling.original_length - config.position_offset if scaling and scaling.kind == "longrope" else None


def _kind(config: ModelConfig, length: int) -> int:
    """Rows of equal kinds may share a batch: where the length of a batch matters to a model, no others may."""
    if _gamma_of_length(config):
        return length
    short = _short_of(config)
    return int(short is not None and length > short)


def _padded_length(model: Pretrained, length: int) -> int:
    """The length of a batch whose longest row reads so many tokens."""
    config, placement = model.config, model.placement
    size = max(_LEAST, 1 << (length - 1).bit_length())
    bounds = (longest_text(config), _short_of(config), length if _gamma_of_length(config) else None)
    size = min([size, *(bound for bound in bounds if bound is not None and bound >= length)])
    halves = 2 if placement.ways("length") > 1 else 1  # the zigzag order gives every device two parts
    parts = math.lcm(placement.ways("stream"), halves * placement.ways("length"))
    if size % parts:
        raise UserError(
            f"mesh: batches of {size} tokens are not divisible by the {parts} parts into which it cuts a text; take a "
            "smaller mesh.tensor or mesh.sequence"
        )
    return size


def _of_positions(reading: FinalReading) -> Rows:
    found = position_losses(reading)
    return {name: reading.tokens.in_order(found[name]) for name in ("nats", "top_1")}


_POSITIONS = Evaluator(final=_of_positions)


def _as_given(numerics: Numerics) -> Numerics:
    return numerics


def _score_batch(model: Pretrained, rows: Sequence[Row], size: int) -> list[Scores]:
    """Rows of one kind, the longest first, in a batch of `size`."""
    length = _padded_length(model, len(rows[0].tokens) - 1)
    # A row is repeated until the batch is full; its last token is a target only.
    inputs = np.stack([np.resize(np.asarray(row.tokens[:-1], np.int32), length) for row in rows])
    targets = np.zeros_like(inputs)
    for place, row in enumerate(rows):
        targets[place, : len(row.tokens) - 1] = row.tokens[1:]
    batch = padded_rows({"inputs": inputs, "targets": targets}, size)
    passes = DecoderPass(model.config, model.placement, _as_given)
    ((found,), _) = collect(passes, model.params, [batch], [_POSITIONS], model.numerics)
    scores = []
    for row, nats, top in zip(rows, found["nats"], found["top_1"]):
        places = slice(len(row.tokens) - 1 - row.scored, len(row.tokens) - 1)
        scores.append(Scores(-nats[places], top[places] > 0))
    return scores
