"""The next token of every row from its logits: greedy, or drawn from a distribution that is cut in the usual ways."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from oasis_jax.config.schema import check_fields, field
from oasis_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. What is cut is cut in the order of the fields."""

    repetition_penalty: float = field(
        1.0, "logits of tokens that the row holds already are divided by it where positive, multiplied where negative"
    )
    temperature: float = field(0.0, "logits are divided by it; 0: the most likely token is taken")
    top_k: int = field(0, "only so many most likely tokens are drawn from; 0: all")
    top_p: float = field(1.0, "only the most likely tokens that together have this probability are drawn from")
    min_p: float = field(0.0, "only tokens with this share of the most likely one's probability are drawn from")

    def __post_init__(self) -> None:
        check_fields(self, "sampling")
        ranges = {
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and not above 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
        }
        for name, (fits, allowed) in ranges.items():
            if not fits:
                raise UserError(f"sampling.{name}: must be {allowed}, got {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()


def penalized(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """Logits with those of tokens seen already made less likely (CTRL, arXiv 1909.05858, section 4.1)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def cut(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits after the temperature, -inf where a token is not drawn: top-k (arXiv 1805.04833), top-p (arXiv
    1904.09751), min-p (arXiv 2407.01082). The most likely token always stays.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        lowest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        sorted_logits = jnp.take_along_axis(logits, order, axis=-1)
        probabilities = jax.nn.softmax(sorted_logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < sampling.top_p, sorted_logits, -jnp.inf)
        logits = jnp.put_along_axis(jnp.full_like(logits, -jnp.inf), order, kept, axis=-1, inplace=False)
    if sampling.min_p > 0:
        highest = logits.max(axis=-1, keepdims=True)
        logits = jnp.where(logits < highest + jnp.log(sampling.min_p), -jnp.inf, logits)
    return logits


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    seen: Bool[Array, "B V"] | None,
    sampling: Sampling,
) -> Int[Array, " B"]:
    """One token a row.

    Args:
      logits: float32.
      keys: one a row, so that a row draws the same whatever its neighbours are.
      seen: which tokens a row holds already; None without a repetition penalty.
      sampling: see Sampling.
    """
    if seen is not None:
        logits = penalized(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits.argmax(axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, cut(logits, sampling)).astype(jnp.int32)
