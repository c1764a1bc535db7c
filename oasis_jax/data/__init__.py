"""Corpora, tokenizers and the Grain pipeline that turns them into batches."""

from oasis_jax.data.corpora import CORPORA, load_corpus
from oasis_jax.data.corpus import Corpus, Source
from oasis_jax.data.pipeline import eval_batches, train_batches
from oasis_jax.data.tokenizers import TOKENIZERS, Tokenizer

__all__ = ["CORPORA", "TOKENIZERS", "Corpus", "Source", "Tokenizer", "eval_batches", "load_corpus", "train_batches"]
