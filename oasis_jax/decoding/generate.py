"""Text behind prompts: `generate`, its state on the device, and what is decided on the host."""

import codecs
import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from oasis_jax.config import ModelConfig
from oasis_jax.decoding.sampling import GREEDY, Sampling, sample
from oasis_jax.decoding.steps import Caches, for_length, for_steps, prefill, step
from oasis_jax.errors import UserError, unknown_name
from oasis_jax.model.cache import STORAGES
from oasis_jax.model.context import Context
from oasis_jax.model.numerics import Numerics
from oasis_jax.placement import Placement
from oasis_jax.pretrained.load import Pretrained

CHUNK = 16  # steps on the device before the host looks at what was written
_LEAST = 16  # prompts, caches and rows are rounded up to powers of two, those of tokens from here on: few programs


class Generated(NamedTuple):
    """What a model wrote behind one prompt.

    Attributes:
      text: decoded, without what ended it; "" where the model has no tokenizer.
      tokens: as drawn, the end token left out.
      logprobs: of each token under the model, in nats, whatever the sampling does to it.
      ended: "token", "string", or "length": by what.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    ended: str


class _State(NamedTuple):
    """What decoding carries from step to step."""

    caches: Caches
    logits: Float[Array, "B V"]
    keys: Key[Array, " B"]
    seen: Bool[Array, "B V"] | None
    left: Int[Array, " B"]  # how many tokens a row may still get; 0: it is done


@dataclasses.dataclass(frozen=True)
class _Program:
    """What is compiled for: equal for equal models, samplings and lengths."""

    config: ModelConfig
    placement: Placement
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    size: int
    kv_cache: str


def generate(
    model: Pretrained,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    on_text: Callable[[int, str], None] | None = None,
    kv_cache: str = "float",
) -> list[Generated]:
    """Continues prompts, all at once; what a row gets does not depend on the others.

    Args:
      model: as `load_pretrained` gives it, on any mesh. Texts get its begin token, tokens are taken as they are.
      prompts: texts, or tokens; of any lengths.
      max_new_tokens: at most so many each.
      sampling: how tokens are drawn; greedy by default.
      stop: texts that end a row; they are not part of its text.
      stop_tokens: tokens that end a row; None: the end token of the model's tokenizer.
      seed: of all rows, or one a row.
      on_text: (row, text): called as text is certain, in order.
      kv_cache: how keys and values are kept: "float", in the model's type, or "int8", see `oasis_jax.model.cache.Int8`.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, more tokens than the model's context; a model of
        vectors or without a tokenizer where one is needed.
    """
    rows = [_ids(model, prompt, number) for number, prompt in enumerate(prompts)]
    if kv_cache not in STORAGES:
        raise unknown_name("generate: kv_cache", kv_cache, STORAGES)
    if max_new_tokens < 1:
        raise UserError(f"generate: max_new_tokens must be at least 1, got {max_new_tokens}")
    if any(not text for text in stop):
        raise UserError("generate: a stop string is empty; every text would end at once")
    if (stop or on_text) and model.tokenizer is None:
        raise UserError("generate: stop strings and text need a tokenizer, and this model came without one")
    if not rows:
        return []
    longest = max(map(len, rows))
    config = for_length(model.config, longest + max_new_tokens)
    size = _rounded(longest + max_new_tokens)
    ends = _stop_tokens(model, stop_tokens)
    program = _Program(config, model.placement, sampling, ends, size, kv_cache)
    arrays = _arrays(rows, size, max_new_tokens, seed, model.placement)
    state = _start(model.params, model.numerics, *arrays, program=program)
    params = for_steps(model.params, config, model.numerics)
    writers = [_Writer(model, max_new_tokens, ends, stop, number, on_text) for number in range(len(rows))]
    while not all(writer.ended for writer in writers):
        state, tokens, logprobs = _advance(params, model.numerics, state, program)
        tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
        for writer, row, row_logprobs in zip(writers, tokens, logprobs):
            writer.take(row, row_logprobs)
        if stop:  # only the host knows these
            over = np.array([writer.ended != "" for writer in writers] + [True] * (len(tokens) - len(rows)))
            state = state._replace(left=jnp.where(jax.device_put(over, state.left.sharding), 0, state.left))
    return [writer.result() for writer in writers]


def _ids(model: Pretrained, prompt: str | Sequence[int], number: int) -> list[int]:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise UserError("generate: text needs a tokenizer, and this model came without one; give tokens")
        ids = model.tokenizer.encode(prompt).tolist()
        if model.begin_token is not None:
            ids = [model.begin_token, *ids]
    else:
        ids = [operator.index(token) for token in prompt]
    if not ids:
        raise UserError(f"generate: prompt {number} is empty; give at least one token")
    for token in ids:
        if not 0 <= token < model.config.vocab_size:
            raise UserError(
                f"generate: prompt {number}: token {token} is outside the vocabulary 0..{model.config.vocab_size - 1}"
            )
    return ids


def _stop_tokens(model: Pretrained, asked: Sequence[int] | None) -> tuple[int, ...]:
    if asked is not None:
        return tuple(operator.index(token) for token in asked)
    end = model.tokenizer and model.tokenizer.separator_id
    return () if end is None else (end,)


def _power_of_two(number: int) -> int:
    """The least one that is not below."""
    return 1 << (number - 1).bit_length()


def _rounded(length: int) -> int:
    """Places for so many tokens."""
    return max(_LEAST, _power_of_two(length))


def _arrays(rows: list[list[int]], size: int, new: int, seed: int | Sequence[int], placement: Placement):
    """Prompts side by side; rows that were added, up to a power of two that the mesh divides, are done already."""
    ways = placement.ways("batch")
    count = ways * _power_of_two(-(-len(rows) // ways))
    length = min(_rounded(max(map(len, rows))), size)
    ids, lengths = np.zeros((count, length), np.int32), np.ones(count, np.int32)
    for place, row in enumerate(rows):
        ids[place, : len(row)], lengths[place] = row, len(row)
    seeds = [operator.index(x) for x in ([seed] * len(rows) if isinstance(seed, int | np.integer) else seed)]
    if len(seeds) != len(rows):
        raise UserError(f"generate: seed must be one number or {len(rows)}, one a prompt, got {len(seeds)}")
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds + [0] * (count - len(rows)), jnp.uint32))
    left = np.where(np.arange(count) < len(rows), new, 0).astype(np.int32)
    arrays = placement.put({"ids": ids, "lengths": lengths, "left": left})
    return arrays["ids"], arrays["lengths"], keys, arrays["left"]


@functools.partial(jax.jit, static_argnames="program")
def _start(params: Mapping[str, Any], numerics: Numerics, ids, lengths, keys, left, program: _Program) -> _State:
    config, context = program.config, Context(placement=program.placement, numerics=numerics)
    logits, caches = prefill(params, config, ids, lengths, program.size, context, program.kv_cache)
    seen = None
    if program.sampling.repetition_penalty != 1:
        real = jnp.arange(ids.shape[1]) < lengths[:, None]
        seen = jnp.zeros(logits.shape, bool)
        seen = seen.at[jnp.arange(len(ids))[:, None], ids].max(real)
    return _State(caches, logits, keys, seen, left)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def _advance(
    params: Mapping[str, Any], numerics: Numerics, state: _State, program: _Program
) -> tuple[_State, Int[Array, "B n"], Float[Array, "B n"]]:
    """Up to CHUNK more tokens a row, fewer where all rows are done; the others are 0."""
    rows = len(state.left)
    context = Context(placement=program.placement, numerics=numerics)

    def more(carry):
        number, state, *_ = carry
        return (number < CHUNK) & (state.left > 0).any()

    def one(carry):
        number, state, tokens, logprobs = carry
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.caches[0].length)
        token = sample(state.logits, keys, state.seen, program.sampling)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(state.logits), token[:, None], 1)[:, 0]
        ended = jnp.isin(token, jnp.asarray(program.stop_tokens, jnp.int32))
        done = state.left == 0
        # A row that is done stays where it is: what it writes lies behind its end and is never read.
        logits, caches = step(params, program.config, token, state.caches, context)
        lengths = jnp.where(done, state.caches[0].length, caches[0].length)
        caches = tuple(cache._replace(length=lengths) for cache in caches)
        seen = state.seen if state.seen is None else state.seen.at[jnp.arange(rows), token].set(True)
        state = _State(caches, logits, state.keys, seen, jnp.where(done | ended, 0, state.left - 1))
        return number + 1, state, tokens.at[:, number].set(token), logprobs.at[:, number].set(logprob)

    empty = jnp.zeros((rows, CHUNK), jnp.int32), jnp.zeros((rows, CHUNK), jnp.float32)
    _, state, tokens, logprobs = jax.lax.while_loop(more, one, (0, state, *empty))
    return state, tokens, logprobs


class _Writer:
    """One row on the host: its tokens so far, its text in bytes, and by what it ended ("": not yet)."""

    def __init__(self, model: Pretrained, limit: int, ends: tuple[int, ...], stop: Sequence[str], number: int, on_text):
        self._tokenizer, self._limit, self._ends, self._stop = model.tokenizer, limit, ends, [x.encode() for x in stop]
        self._number, self._on_text = number, on_text
        self._written, self._said, self._decoder = b"", 0, codecs.getincrementaldecoder("utf-8")("replace")
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.ended = ""

    def take(self, tokens: Int[np.ndarray, " n"], logprobs: Float[np.ndarray, " n"]) -> None:
        """The next tokens of the row, as far as they are its own."""
        for token, logprob in zip(tokens.tolist(), logprobs.tolist()):
            if self.ended:
                break
            if token in self._ends:
                self.ended = "token"
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self._write(token)
            if not self.ended and len(self.tokens) == self._limit:
                self.ended = "length"
        self._say()

    def _write(self, token: int) -> None:
        """Adds the text of a token, and cuts it off where a stop string begins."""
        if self._tokenizer is None:
            return
        before = len(self._written)
        self._written += self._tokenizer.decode([token])
        places = [self._written.find(end, max(before - len(end) + 1, 0)) for end in self._stop]
        if found := [place for place in places if place >= 0]:
            self._written, self.ended = self._written[: min(found)], "string"

    def _say(self) -> None:
        if self._on_text is None:
            return
        # Held back until the row ends: half a character, and what may be the start of a stop string.
        held = 0 if self.ended else max((len(end) - 1 for end in self._stop), default=0)
        certain = max(len(self._written) - held, self._said)
        text = self._decoder.decode(self._written[self._said : certain], final=bool(self.ended))
        self._said = certain
        if text:
            self._on_text(self._number, text)

    def result(self) -> Generated:
        return Generated(self._written.decode(errors="replace"), self.tokens, self.logprobs, self.ended)
