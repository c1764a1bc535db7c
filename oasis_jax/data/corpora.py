"""The table of corpora: a new one is one file with a `load` function and one line here."""

from oasis_jax.config import DataConfig
from oasis_jax.data import backcopy, files, pairs, prepared, stdlib, trigger
from oasis_jax.data.corpus import Corpus
from oasis_jax.data.tokenizers import Tokenizer

CORPORA = {
    "stdlib": stdlib.load,
    "files": files.load,
    "pairs": pairs.load,
    "prepared": prepared.load,
    "trigger": trigger.load,
    "backcopy": backcopy.load,
}


def load_corpus(config: DataConfig, *, seed: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """Reads or generates the corpus that `config.corpus` names.

    Args:
      config: which corpus, how it is tokenized, split and cut into examples.
      seed: the run's seed; only generated corpora depend on it, the held-out part of a text never does.
      tokenizer: used as it is instead of making one from the corpus, as resuming and evaluating a run must.

    Raises:
      UserError: missing, empty, unreadable or too short text, or text that the tokenizer cannot take.
    """
    return CORPORA[config.corpus](config, seed=seed, tokenizer=tokenizer)
