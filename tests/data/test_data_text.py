"""Splits, streams and windows of the text corpora."""

import hashlib
import json
import typing

import numpy as np
import pytest

from oasis_jax.config import DataConfig, field_type
from oasis_jax.data import CORPORA, TOKENIZERS, load_corpus
from oasis_jax.data.text import TextFile, Windows, hold_out, token_stream
from oasis_jax.data.tokenizers import BytesTokenizer
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


def text_file(name, *documents):
    return TextFile.from_content(name, b"\n".join(documents), documents)


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


def test_split_by_file_is_disjoint_complete_and_about_the_fraction(tmp_path):
    texts = write_texts(tmp_path)
    split = hold_out([text_file(f"{i}", text) for i, text in enumerate(texts)], 0.25)
    assert sorted([*split.train, *split.heldout]) == sorted(texts)
    share = sum(map(len, split.heldout)) / sum(map(len, texts))
    assert 0.15 < share <= 0.25
    assert split.rule.startswith(f"by file: {len(split.heldout)} of 20 files")


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


def test_two_large_files_hold_out_the_smaller():
    split = hold_out([text_file("a", b"x" * 100), text_file("b", b"y" * 90)], 0.05)
    assert (split.train, split.heldout) == ([b"x" * 100], [b"y" * 90])
    assert "the smallest" in split.rule


def test_one_file_of_documents_holds_out_its_last_ones():
    documents = [bytes([65 + i]) * 10 for i in range(20)]
    split = hold_out([text_file("a.jsonl", *documents)], 0.11)
    assert (split.train, split.heldout) == (documents[:17], documents[17:])
    assert "its last 3 of 20 documents" in split.rule


@pytest.mark.parametrize("fraction", [0.1, 0.17, 0.5, 0.93])
def test_one_document_holds_out_its_tail_between_characters(fraction):
    text = "aé漢😀" * 11
    split = hold_out([text_file("a.txt", text.encode())], fraction)
    (train,), (heldout,) = split.train, split.heldout
    assert train.decode() + heldout.decode() == text
    assert abs(len(heldout) - fraction * len(text.encode())) <= 4
    assert f"its last {len(heldout)} of {len(text.encode())} bytes" in split.rule


def test_stream_has_separators_between_documents_only():
    stream = token_stream([b"ab", b"c", b"def"], BytesTokenizer())
    assert stream.dtype == np.uint16
    assert stream.tolist() == [97, 98, SEPARATOR, 99, SEPARATOR, 100, 101, 102]


@pytest.mark.parametrize("size", [14, 15, 16, 20, 21, 22])
def test_windows_with_begin_token_reconstruct_the_stream(size):
    tokens = np.random.default_rng(size).integers(0, 256, size).astype(np.uint16)
    windows = Windows(tokens, 7, BEGIN)
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
    windows = Windows(tokens, 7, None)
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
    config = files_config(tmp_path, tokenizer="bpe", bpe_vocab_size=400, sequence_length=2)
    before = load_corpus(config, seed=0)
    (kept,) = {before.tokenizer.decode(before.heldout[i]["targets"])[:1] for i in range(len(before.heldout))}
    name = f"part{kept[0] - 65:02d}.txt"
    (tmp_path / name).write_bytes(kept.lower() * len(texts[kept[0] - 65]))
    after = load_corpus(config, seed=0)
    assert after.tokenizer.identity == before.tokenizer.identity and after.identity != before.identity


@pytest.mark.parametrize(
    "fields, part, remedy",
    [
        ({"sequence_length": 2000}, "training part's", "longer corpus"),
        ({"sequence_length": 60}, "held-out part's", "data.holdout_fraction"),
    ],
)
def test_too_short_a_corpus_is_told_with_numbers(tmp_path, fields, part, remedy):
    write_texts(tmp_path)
    message = refusal(load_corpus, files_config(tmp_path, **fields), seed=0)
    assert (
        part in message and remedy in message and "of 20 files" in message and str(fields["sequence_length"]) in message
    )


def test_the_tables_hold_what_the_config_allows():
    assert tuple(CORPORA) == typing.get_args(field_type(DataConfig, "corpus"))
    assert tuple(TOKENIZERS) == typing.get_args(field_type(DataConfig, "tokenizer"))


def test_an_empty_corpus_is_told(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    assert "no text in it (2 files, 0 bytes)" in refusal(load_corpus, files_config(tmp_path), seed=0)
