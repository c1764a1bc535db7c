"""Text that bites: what is in files that people have, and what is said about it or done with it."""

import json
import os
import socket

import numpy as np
import pytest
import tokenizers as library

from oasis_jax.config import DataConfig
from oasis_jax.data import load_corpus, tokenizers
from oasis_jax.data.files import matching_files
from oasis_jax.data.tokenizers import BPETokenizer
from oasis_jax.errors import UserError

WORDS = " ".join(f"word{i * i % 97} é漢" for i in range(99))


def config(folder, pattern="*", **fields):
    return DataConfig(corpus="files", pattern=f"{folder}/{pattern}", **{"sequence_length": 5} | fields)


def whole_text(corpus):
    return corpus.tokenizer.decode(np.concatenate([corpus.train.tokens, corpus.heldout.tokens]))


def refusal(call, *arguments, **keywords):
    """The one line that the call stops with."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


KEPT = {
    "line ends of DOS": "one\r\ntwo\r\n" * 20,
    "one long line": "no end " * 9_000,
    "one long line without blanks": "abcdefghij" * 900,
    "line separators of Unicode": "one\u2028two\u2029three\x85" * 20,
    "NUL bytes among text": ("\0" * 70 + "\n") * 9 + "text\0" * 30,
    "a mark inside": "a\ufeffb" * 40,
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_text_comes_back_as_it_is(tmp_path, name, tokenizer, suffix):
    text = KEPT[name]
    content = text if suffix == "txt" else json.dumps({"text": text}, ensure_ascii=False) + "\n"
    (tmp_path / f"a.{suffix}").write_bytes(content.encode())
    corpus = load_corpus(config(tmp_path, tokenizer=tokenizer, bpe_vocab_size=280, sequence_length=2), seed=0)
    assert whole_text(corpus) == text.encode()
    notes = [note for note in corpus.notes if note.startswith("NUL bytes")]
    assert len(notes) == ("NUL" in name) and all(f"such as 'a.{suffix}'" in note for note in notes)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + WORDS.encode())
    assert whole_text(load_corpus(config(tmp_path), seed=0)) == WORDS.encode()


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_named(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(("\ufeff" + WORDS).encode(encoding))
    message = refusal(load_corpus, config(tmp_path, tokenizer="bpe"), seed=0)
    assert "'a.txt' is not at byte 0" in message and "begins as UTF-16 does" in message


BAD = {
    "only NUL bytes": ("b.txt", bytes(70), "holds 70 NUL bytes and no text"),
    "only NUL bytes in jsonl": ("b.jsonl", bytes(71), "holds 71 NUL bytes and no text"),
    "a line of NUL bytes": ("b.jsonl", b'{"text": "a"}\n\0\0\0', ":2: not valid JSON: the line holds 3 NUL bytes"),
    "not UTF-8": ("b.txt", b"ab\xff", "'b.txt' is not at byte 2"),
    "a key that repeats": ("b.jsonl", b'{"text": "a", "id": 1, "text": "b"}', "the key 'text' is there more than once"),
    "a column that is not there": ("b.jsonl", b'{"txet": "a", "id": 1}', "keys of this line: 'txet', 'id'"),
    "too long a number": ("b.jsonl", b'{"text": "a", "id": ' + b"1" * 5000 + b"}", ":1: not readable as JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_stops_or_is_named_and_left_out(tmp_path, name):
    file, content, said = BAD[name]
    (tmp_path / "a.txt").write_text(WORDS)
    (tmp_path / file).write_bytes(content)
    asked = dict(tokenizer="bpe", bpe_vocab_size=270, sequence_length=2)
    message = refusal(load_corpus, config(tmp_path, **asked), seed=0)
    assert said in message and message.endswith("; data.corrupt=skip would leave it out")
    corpus = load_corpus(config(tmp_path, **asked, corrupt="skip"), seed=0)
    assert corpus.notes[0].startswith("left out: ") and said in corpus.notes[0]
    assert WORDS[:9].encode() in whole_text(corpus)


def test_a_key_may_repeat_where_it_is_not_read(tmp_path):
    lines = [f'{{"text": "{letter * 30}", "id": 1, "id": {{"text": 2, "text": 3}}}}' for letter in "abc"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert len(whole_text(load_corpus(config(tmp_path, holdout_fraction=0.3), seed=0))) == 90


def test_empty_files_and_texts_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text(WORDS)
    (tmp_path / "b.txt").touch()
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "d.jsonl").write_text('{"text": ""}\n')
    assert load_corpus(config(tmp_path), seed=0).notes == ("left out: 3 empty documents",)


@pytest.mark.parametrize("kind", ["FIFO", "socket", "character device"])
def test_what_is_no_file_is_refused(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    (tmp_path / "a.txt").write_text(WORDS)
    if kind == "FIFO":
        os.mkfifo("b.txt")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as found:
            found.bind("b.txt")
    else:
        os.symlink("/dev/zero", "b.txt")
    message = refusal(load_corpus, config(tmp_path, corrupt="skip"), seed=0)
    assert f"b.txt', which is no file but a {kind}" in message


NAMES = ["a[1].txt", "a*.txt", "what?.txt", "[x].txt", "**.txt"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_with_characters_of_a_glob_is_that_file(tmp_path, name):
    (tmp_path / name).write_text("one")
    assert matching_files(f"{tmp_path}/{name}") == [tmp_path / name]
    for other in ("a1.txt", "ab.txt", "whats.txt", "x.txt"):
        (tmp_path / other).write_text("two")
    message = refusal(matching_files, f"{tmp_path}/{name}")
    written = message.split("write ")[1].split("'")[1]
    assert matching_files(written) == [tmp_path / name]


def test_a_folder_with_characters_of_a_glob_is_meant_by_its_name(tmp_path):
    (tmp_path / "books [old]").mkdir()
    (tmp_path / "books [old]" / "a.txt").write_text("one")
    assert matching_files(f"{tmp_path}/books [old]/*.txt") == [tmp_path / "books [old]" / "a.txt"]
    assert "has no 'c'" in refusal(matching_files, f"{tmp_path}/books [old]/c/*.txt")


def test_words_are_those_of_gpt2_and_bounded():
    texts = [
        WORDS,
        "it's  we'll\n\n  def f(x):\treturn x+1 \r\n ''s",
        "  ",
        " \n x",
        "漢字 and 😀!?",
        "12 345 x\u2028y",
    ]
    split = BPETokenizer.train([WORDS.encode()], 270)._library.pre_tokenizer.pre_tokenize_str
    gpt2 = library.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    for text in texts:
        assert [piece for piece, _ in split(text)] == [piece for piece, _ in gpt2(text)]
    for text in ["漢" * 999, "x1" * 999, "1" * 999, "=" * 999, " " * 999, "\0" * 999, "'" * 999, "a" * 999 + " " * 99]:
        pieces = [text[start:end] for _, (start, end) in split(text)]
        assert "".join(pieces) == text and max(map(len, pieces)) <= 65


def test_a_long_text_is_read_in_pieces_that_change_no_word(monkeypatch):
    texts = [WORDS * 3, "word\nword " * 99, "漢" * 999, "", "ab", "x" * 31 + " y" * 31]
    bpe = BPETokenizer.train([text.encode() for text in texts], 320)
    whole = [ids.tolist() for ids in bpe.encode_all([text.encode() for text in texts])]
    monkeypatch.setattr(tokenizers, "_PIECE", 16)
    assert [len(list(tokenizers._pieces(text))) > 9 for text in texts] == [True, True, True, False, False, False]
    found = [ids.tolist() for ids in bpe.encode_all([text.encode() for text in texts])]
    assert [bpe.decode(ids).decode() for ids in found] == texts
    assert found[0] == whole[0] and found[1] == whole[1] and found[3:] == whole[3:]


@pytest.mark.parametrize("prefix, normalizer", [(False, None), (True, None), (False, "prepend")])
def test_a_long_text_is_read_in_pieces_by_a_library_where_that_changes_nothing(monkeypatch, prefix, normalizer):
    texts = [WORDS * 3, "word\nword " * 99, "", "x1 y2\n z"]
    trained = tokenizers.tokenizers.Tokenizer.from_str(BPETokenizer.train([WORDS.encode()], 320).library_json)
    trained.pre_tokenizer = tokenizers.tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if normalizer:
        trained.normalizer = tokenizers.tokenizers.normalizers.Prepend("x")
    library = tokenizers.LibraryTokenizer(trained.to_str())
    whole = [trained.encode(text).ids for text in texts]
    asked, split = [], tokenizers._pieces
    monkeypatch.setattr(tokenizers, "_PIECE", 16)
    monkeypatch.setattr(tokenizers, "_pieces", lambda text: asked.append(text) or split(text))
    assert [ids.tolist() for ids in library.encode_all([text.encode() for text in texts])] == whole
    assert bool(asked) == (not prefix and not normalizer)
