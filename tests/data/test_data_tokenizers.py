"""Round trips of the tokenizers, through text and through JSON."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import oasis_jax
from oasis_jax.data.tokenizers import BPETokenizer, BytesTokenizer, Tokenizer
from oasis_jax.errors import UserError

TEXTS = [
    b"def f(x):\n    return x + 1\n" * 5,
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. ".encode() * 3,
    "  漢字 and 😀\t\ttabs\r\nand \x00 nul \x7f".encode(),
    b"<begin><separator> spelled out <|endoftext|>",
    "".join(map(chr, range(1, 0x250))).encode(),
]
TRAIN = """
from oasis_jax.data.tokenizers import BPETokenizer
import random
words = random.Random(3)
word = lambda: "".join(words.choices("abcde", k=words.randint(1, 6)))
texts = [" ".join(word() for _ in range(200)).encode() for _ in range(150)]
print(BPETokenizer.train(texts, 400).identity["sha256"])
"""


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(TEXTS[:2], 300)


def tokenizers(bpe):
    return [BytesTokenizer(), bpe]


def test_text_comes_back_and_never_as_special_tokens(bpe):
    for tokenizer in tokenizers(bpe):
        for text in [*TEXTS, b""]:
            ids = tokenizer.encode(text)
            assert ids.dtype == np.int32 and not set(ids.tolist()) & {tokenizer.begin_id, tokenizer.separator_id}
            assert tokenizer.decode(ids) == text
            assert tokenizer.encode(text.decode()).tolist() == ids.tolist()


def test_bytes_are_their_own_ids():
    tokenizer = BytesTokenizer()
    assert tokenizer.encode(bytes(range(256))).tolist() == list(range(256))
    assert (tokenizer.begin_id, tokenizer.separator_id, tokenizer.vocab_size) == (256, 257, 258)


def test_bpe_merges_the_most_frequent_pair_first():
    tokenizer = BPETokenizer.train([b"xyxy", b"xyxy", b"pq"], 260)
    assert (tokenizer.begin_id, tokenizer.separator_id, tokenizer.vocab_size) == (258, 259, 260)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(b"xyxyxpq")]
    assert pieces == [b"xyxy", b"x", b"p", b"q"]


def test_special_and_padding_ids_decode_to_nothing(bpe):
    for tokenizer in tokenizers(bpe):
        ids = [
            tokenizer.begin_id,
            *tokenizer.encode(b"ab"),
            tokenizer.separator_id,
            *tokenizer.encode(b"c"),
            tokenizer.vocab_size + 3,
        ]
        assert tokenizer.decode(ids) == b"abc"


def test_documents_one_by_one_equal_documents_together(bpe):
    documents = [TEXTS[i % len(TEXTS)][i:] for i in range(2 * 64 + 9) if i % len(TEXTS) in (0, 3)]
    for tokenizer in tokenizers(bpe):
        together = list(tokenizer.encode_all(documents))
        assert len(together) == len(documents)
        for document, ids in zip(documents, together):
            np.testing.assert_array_equal(tokenizer.encode(document), ids)


def test_json_brings_back_the_same_tokenizer(bpe):
    for tokenizer in tokenizers(bpe):
        again = Tokenizer.from_json(tokenizer.to_json())
        assert (
            type(again) is type(tokenizer)
            and again.identity == tokenizer.identity
            and again.to_json() == tokenizer.to_json()
        )
        assert json.loads(json.dumps(again.identity)) == again.identity
        for text in TEXTS:
            np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


def test_identity_tells_tokenizers_apart(bpe):
    other = BPETokenizer.train(TEXTS[1:], 300)
    assert len({BytesTokenizer().identity["sha256"], bpe.identity["sha256"], other.identity["sha256"]}) == 3


def test_training_is_the_same_in_every_process():
    root = pathlib.Path(oasis_jax.__file__).parents[1]
    runs = [
        subprocess.run([sys.executable, "-c", TRAIN], cwd=root, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout.strip()) == 64


def test_wrong_text_and_wrong_kind_are_told(bpe):
    with pytest.raises(UserError, match=r"not UTF-8 at byte 3; use tokenizer=bytes"):
        bpe.encode(b"abc\xffdef")
    with pytest.raises(UserError, match=r"unknown name 'bpr' \(did you mean 'bpe'\?\); allowed: bytes, bpe"):
        Tokenizer.from_json('{"kind": "bpr"}')
