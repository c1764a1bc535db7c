"""Perplexity of a whole text in strided windows, by token, word and byte, as papers report it."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from oasis_jax.errors import UserError, unknown_name
from oasis_jax.evaluation.measures.perplexity import DEFINITIONS as MEASURES
from oasis_jax.evaluation.tasks.scoring import Row, longest_text, score
from oasis_jax.pretrained import Pretrained

BEGIN_AT = ("text", "windows")

DEFINITIONS = {
    "nats": "cross entropy in nats, summed over the counted tokens",
    "tokens": "counted tokens: every token of the text once, but for those that no window shows with a token before it",
    "bytes": "bytes of text that the counted tokens stand for",
    "words": "words of the whole text, separated by white space",
    "perplexity": "exp(nats / tokens): depends on the tokenizer",
    "bits_per_byte": MEASURES["bits_per_byte"]["average"] + "; comparable across tokenizers",
    "byte_perplexity": "exp(nats / bytes)",
    "word_perplexity": "exp(nats / bytes * bytes of the whole text / words): exp(nats / words) where all tokens count",
}


class _Windows(NamedTuple):
    """Rows to score, and which of the text's tokens they score, in order."""

    rows: list[Row]
    counted: Int[np.ndarray, " n"]


def windows_of(tokens: Int[np.ndarray, " n"], window: int, stride: int, begin: int | None, begin_at: str) -> _Windows:
    """Windows over a text. Each starts `stride` tokens after the one before it and scores the tokens that no earlier
    one has; the first window scores all of its own. The first token of a window has nothing before it and is scored
    only behind a begin token.

    Args:
      tokens: of the text, without a begin token.
      window: tokens that the model reads at once, a begin token among them.
      stride: tokens from one window to the next; the last window may be shorter.
      begin: the begin token; None: none.
      begin_at: "text": before the first token only, as a tokenizer puts it; "windows": before every window.
    """
    every = begin is not None and begin_at == "windows"
    first = 1 if begin is not None and not every else 0
    line = np.concatenate([[begin], tokens]) if first else np.asarray(tokens)
    width = window - every
    rows, counted, done = [], [], 0
    for start in range(0, len(line), stride):
        stop = min(start + width, len(line))
        shown = line[start:stop].tolist()
        fresh = min(stop - done, len(shown) - (not every))
        if fresh:
            rows.append(Row([begin, *shown] if every else shown, fresh))
            counted.append(np.arange(stop - fresh, stop) - first)
        done = stop
        if stop == len(line):
            break
    return _Windows(rows, np.concatenate(counted) if counted else np.zeros(0, int))


def strided_perplexity(
    model: Pretrained,
    text: str,
    *,
    window: int,
    stride: int,
    begin_at: Literal["text", "windows"] = "text",
    batch_size: int = 8,
) -> dict[str, float | int]:
    """The perplexity of a text whose every token is scored once, with at least window - stride tokens before it but at
    the start of the text.

    Args:
      model: with a tokenizer; in its own placement and numerics. Its `begin_token` is used; None: no begin token.
      text: tokenized as one piece.
      window: tokens that the model reads at once, a begin token among them.
      stride: tokens from one window to the next, at most what a window holds of the text. The smaller, the more context
        and the more work. Where it is all of the window, windows do not overlap.
      begin_at: where the begin token stands; see `windows_of`.
      batch_size: windows computed at once.

    Returns:
      What `DEFINITIONS` lists. Sums are in float64.

    Raises:
      UserError: a model without a tokenizer, a window longer than the model's context, a stride that skips tokens, a
        text of too few tokens.
    """
    if model.tokenizer is None:
        raise UserError("perplexity: text needs a tokenizer, and this model came without one")
    if begin_at not in BEGIN_AT:
        raise unknown_name("perplexity: begin_at", begin_at, BEGIN_AT)
    every = begin_at == "windows" and model.begin_token is not None
    _check_windows(model, window, stride, window - every)
    tokens = model.tokenizer.encode(text)
    rows, counted = windows_of(tokens, window, stride, model.begin_token, begin_at)
    if not rows:
        raise UserError(f"perplexity: the text has {len(tokens)} tokens; none has a token before it")
    nats = -sum(scores.total for scores in score(model, rows, batch_size=batch_size))
    bytes_of = model.tokenizer.byte_lengths[tokens]
    return summary(nats, len(counted), int(bytes_of[counted].sum()), int(bytes_of.sum()), len(text.split()))


def summary(nats: float, tokens: int, counted_bytes: int, text_bytes: int, words: int) -> dict[str, float | int]:
    """What `DEFINITIONS` lists, from sums over the counted tokens and from the sizes of the whole text; where a model
    is so bad that an exponential is beyond float64, inf.
    """
    per_byte = nats / counted_bytes if counted_bytes else np.nan
    with np.errstate(over="ignore"):
        return {
            "nats": nats,
            "tokens": tokens,
            "bytes": counted_bytes,
            "words": words,
            "perplexity": float(np.exp(nats / tokens)),
            "bits_per_byte": float(per_byte / np.log(2)),
            "byte_perplexity": float(np.exp(per_byte)),
            "word_perplexity": float(np.exp(per_byte * text_bytes / words)) if words else np.nan,
        }


def _check_windows(model: Pretrained, window: int, stride: int, held: int) -> None:
    longest = longest_text(model.config)
    if window < 2:
        raise UserError(f"perplexity: window must be at least 2, got {window}")
    if longest is not None and window > longest:
        raise UserError(f"perplexity: window is {window}, but the model was made for {longest}")
    if not 1 <= stride <= held:
        raise UserError(f"perplexity: stride must be 1 to {held}, what a window holds of the text, got {stride}")
