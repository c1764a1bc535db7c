"""Splits, streams and windows of the text corpora."""

import dataclasses
import hashlib
import json
import re
import typing

import numpy as np
import pytest

from oasis_jax.config import DataConfig, field_type
from oasis_jax.data import CORPORA, TOKENIZERS, load_corpus
from oasis_jax.data.packing import Stream, Windows
from oasis_jax.data.split import hold_out
from oasis_jax.data.text import token_stream
from oasis_jax.data.tokenizers import BPETokenizer, BytesTokenizer
from oasis_jax.errors import UserError

BEGIN, SEPARATOR = 256, 257


def files_config(folder, pattern="*.txt", **fields):
    return DataConfig(corpus="files", pattern=str(folder / pattern), **{"sequence_length": 7, "batch_size": 3} | fields)


def write_texts(folder, count=20, size=50):
    """Files of different letters and sizes, so that every document can be told from the others."""
    texts = [bytes([65 + i]) * (size + i) for i in range(count)]
    for i, text in enumerate(texts):
        (folder / f"part{i:02d}.txt").write_bytes(text)
    return texts


def stream_of(windows):
    """The token stream a source of windows holds, read back through its examples."""
    return np.concatenate([windows[i]["targets"] for i in range(len(windows))])


def refusal(call, *arguments, **keywords):
    """The one line that the call stops with."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_identity_names_the_content_and_nothing_else(tmp_path):
    texts = write_texts(tmp_path)
    config = files_config(tmp_path)
    identity = load_corpus(config, seed=0).identity
    assert identity == load_corpus(config, seed=5).identity
    assert json.loads(json.dumps(identity)) == identity
    assert identity["files"] == 20 and identity["bytes"] == sum(map(len, texts))
    listed = "".join(f"part{i:02d}.txt\0{hashlib.sha256(text).hexdigest()}\n" for i, text in enumerate(texts))
    assert identity["sha256"] == hashlib.sha256(listed.encode()).hexdigest()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    write_texts(moved)
    assert load_corpus(files_config(moved), seed=0).identity == identity
    (moved / "part03.txt").write_bytes(b"another text")
    assert load_corpus(files_config(moved), seed=0).identity["sha256"] != identity["sha256"]


def test_a_file_never_lies_on_both_sides(tmp_path):
    write_texts(tmp_path)
    corpus = load_corpus(files_config(tmp_path, holdout_fraction=0.25), seed=0)
    letters = [set(stream_of(part).tolist()) - {SEPARATOR} for part in (corpus.train, corpus.heldout)]
    assert letters[0] and letters[1] and not letters[0] & letters[1]


def test_split_keeps_its_files_when_tokenizer_and_length_change(tmp_path):
    write_texts(tmp_path)
    splits = [
        load_corpus(files_config(tmp_path, **fields), seed=seed).identity["holdout"]
        for seed, fields in enumerate(
            [{}, {"sequence_length": 3}, {"tokenizer": "bpe", "bpe_vocab_size": 260, "sequence_length": 2}]
        )
    ]
    assert splits[0] == splits[1] == splits[2]


def test_stream_has_separators_between_documents_only():
    stream = token_stream([b"ab", b"c", b"def"], BytesTokenizer())
    assert stream.dtype == np.uint16
    assert stream.tolist() == [97, 98, SEPARATOR, 99, SEPARATOR, 100, 101, 102]


@pytest.mark.parametrize("size", [14, 15, 16, 20, 21, 22])
def test_windows_with_begin_token_reconstruct_the_stream(size):
    tokens = np.random.default_rng(size).integers(0, 256, size).astype(np.uint16)
    windows = Windows(Stream(tokens, list, BytesTokenizer()), 7, BEGIN)
    assert len(windows) == size // 7
    np.testing.assert_array_equal(stream_of(windows), tokens[: size // 7 * 7])
    for i in range(len(windows)):
        example = windows[i]
        assert example["inputs"].tolist() == [BEGIN, *tokens[7 * i : 7 * i + 6].tolist()]
        assert {name: array.dtype.name for name, array in example.items()} == {
            "inputs": "int32",
            "targets": "int32",
            "weights": "float32",
        }
        assert example["weights"].tolist() == [1.0] * 7


@pytest.mark.parametrize("size", [14, 15, 16, 21, 22])
def test_windows_without_begin_token_reconstruct_the_stream(size):
    tokens = np.random.default_rng(size).integers(0, 256, size).astype(np.uint16)
    windows = Windows(Stream(tokens, list, BytesTokenizer()), 7, None)
    assert len(windows) == (size - 1) // 7
    for i in range(len(windows)):
        assert windows[i]["inputs"].tolist() == tokens[7 * i : 7 * i + 7].tolist()
        assert windows[i]["targets"].tolist() == tokens[7 * i + 1 : 7 * i + 8].tolist()
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_bytes_that_are_not_utf8_come_back_as_they_are(tmp_path):
    content = bytes(range(256)) * 3 + b"\xff\xfe\r\n\r"
    (tmp_path / "a.txt").write_bytes(content)
    corpus = load_corpus(files_config(tmp_path, sequence_length=1 + 1), seed=0)
    tokens = np.concatenate([corpus.train.tokens, corpus.heldout.tokens])
    assert corpus.tokenizer.decode(tokens) == content


def test_bpe_refuses_text_that_is_not_utf8(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "part07.txt").write_bytes(b"fine until \xe9 here")
    message = refusal(load_corpus, files_config(tmp_path, tokenizer="bpe"), seed=0)
    assert "'part07.txt'" in message and "at byte 11" in message and "data.tokenizer=bytes" in message


def test_a_given_tokenizer_is_used_instead_of_a_new_one(tmp_path):
    write_texts(tmp_path)
    config = files_config(tmp_path, tokenizer="bpe", bpe_vocab_size=300)
    first = load_corpus(config, seed=0)
    (tmp_path / "part03.txt").write_text("words that would have changed the merges " * 9)
    again = load_corpus(config, seed=0, tokenizer=first.tokenizer)
    assert again.tokenizer is first.tokenizer
    assert load_corpus(config, seed=0).tokenizer.identity != first.tokenizer.identity


def test_bpe_learns_from_the_training_part_alone(tmp_path):
    texts = write_texts(tmp_path)
    config = files_config(tmp_path, tokenizer="bpe", bpe_vocab_size=400, sequence_length=2, holdout_fraction=0.25)
    corpus, train = load_corpus(config, seed=0), hold_out(texts, 0.25).train
    assert corpus.tokenizer.identity == BPETokenizer.train(train, 400).identity
    assert corpus.tokenizer.identity != BPETokenizer.train(texts, 400).identity


SHORT = {
    "held-out": {"sequence_length": 90},
    "held-out without begin token": {"sequence_length": 90, "begin_token": False},
    "training": {"sequence_length": 200, "holdout_fraction": 0.9},
    "training without begin token": {"sequence_length": 200, "holdout_fraction": 0.9, "begin_token": False},
    "held-out in tokens of a BPE": {"sequence_length": 90, "tokenizer": "bpe", "bpe_vocab_size": 259},
}


@pytest.mark.parametrize("name", SHORT)
def test_too_short_a_corpus_is_told_with_numbers_that_help(tmp_path, name):
    """Each of the numbers is taken; a sequence one longer than the one named is refused again."""
    write_texts(tmp_path)
    config = files_config(tmp_path, **SHORT[name])
    message = refusal(load_corpus, config, seed=0)
    assert f"the {name.split()[0]} part's" in message and "of 20 documents" in message
    length = int(re.search(r"data\.sequence_length=(\d+) or less", message)[1])
    fraction = float(re.search(r"data\.holdout_fraction=([\d.]+)", message)[1])
    load_corpus(dataclasses.replace(config, sequence_length=length), seed=0)
    refusal(load_corpus, dataclasses.replace(config, sequence_length=length + 1), seed=0)
    load_corpus(dataclasses.replace(config, holdout_fraction=fraction), seed=0)


def test_too_short_a_corpus_says_how_much_more_text_helps(tmp_path):
    """More text of the same kind than named is enough."""
    random = np.random.default_rng(3)
    (tmp_path / "a.txt").write_bytes(random.integers(65, 91, 310, np.uint8).tobytes())
    config = files_config(tmp_path, sequence_length=61)
    message = refusal(load_corpus, config, seed=0)
    size = int(re.search(r"a corpus of about (\d+) bytes instead of 310", message)[1])
    assert size < 2 * 61 / config.holdout_fraction
    (tmp_path / "b.txt").write_bytes(random.integers(65, 91, size - 310, np.uint8).tobytes())
    load_corpus(config, seed=0)


def test_a_text_without_room_for_two_examples_names_only_what_helps(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    message = refusal(load_corpus, files_config(tmp_path), seed=0)
    assert (
        "data.sequence_length=" not in message and "holdout_fraction=" not in message and "about 168 bytes" in message
    )


def test_the_tables_hold_what_the_config_allows():
    assert tuple(CORPORA) == typing.get_args(field_type(DataConfig, "corpus"))
    assert tuple(TOKENIZERS) == typing.get_args(field_type(DataConfig, "tokenizer"))


def test_an_empty_corpus_is_told(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    assert "no text in it (2 files, 0 bytes)" in refusal(load_corpus, files_config(tmp_path), seed=0)
