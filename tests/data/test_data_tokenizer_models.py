"""Tokenizers of sentencepiece and tiktoken, and the files that `oasis_jax prepare --tokenizer` takes."""

import base64
import io
import json
import sys

import numpy as np
import pytest
import tokenizers

from oasis_jax.data.tokenizers import BPETokenizer, SentencePieceTokenizer, TiktokenTokenizer, Tokenizer
from oasis_jax.errors import UserError
from oasis_jax.pretrained.tokenizer import open_tokenizer

TEXTS = [b"the quick brown fox jumps over a lazy dog " * 9, "zwölf 漢字 <s> </s> <|endoftext|>".encode(), b"x y  z"]


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    library = pytest.importorskip("sentencepiece")
    model, lines = io.BytesIO(), [text.decode() for text in TEXTS] * 5
    library.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=310, model_type="bpe", byte_fallback=True,
        pad_id=3, hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "some.model"
    path.write_bytes(model.getvalue())
    return path


def again(tokenizer):
    return Tokenizer.from_json(tokenizer.to_json())


def test_sentencepiece(sentencepiece_file):
    sentencepiece = pytest.importorskip("sentencepiece")

    tokenizer = open_tokenizer(str(sentencepiece_file))
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert tokenizer.kind == "sentencepiece" and tokenizer.vocab_size == library.GetPieceSize()
    assert (tokenizer.begin_id, tokenizer.separator_id, tokenizer.padding_id) == (1, 2, 3)
    for text, ids in zip(TEXTS, tokenizer.encode_all(TEXTS)):
        assert ids.dtype == np.int32 and ids.tolist() == library.EncodeAsIds(text.decode())
        assert not set(ids.tolist()) & {1, 2, 3}
        assert tokenizer.decode([1, *ids, 2]) == text == again(tokenizer).decode(ids)
        assert tokenizer.byte_lengths[ids].sum() == len(text)
    assert again(tokenizer).identity == tokenizer.identity
    with pytest.raises(UserError, match="not UTF-8 at byte 1"):
        tokenizer.encode(b"a\xff")
    with pytest.raises(UserError, match="no model"):
        SentencePieceTokenizer(base64.b64encode(b"nothing of the kind").decode())


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """An encoding that tiktoken knows as it knows its own: from a module of the package tiktoken_ext."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
    (tmp_path / "tiktoken_ext").mkdir()
    (tmp_path / "tiktoken_ext" / "toy.py").write_text(
        f"ENCODING_CONSTRUCTORS = {{'toy': lambda: dict(name='toy', pat_str=r' ?\\w+|\\W', mergeable_ranks={ranks!r}, "
        "special_tokens={'<|endoftext|>': 259, '<|begin_of_text|>': 261})}"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("tiktoken_ext", "tiktoken_ext.toy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", None)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    tiktoken.registry._available_plugin_modules.cache_clear()
    yield tiktoken
    tiktoken.registry._available_plugin_modules.cache_clear()


def test_tiktoken(plugin):
    tokenizer, library = open_tokenizer("tiktoken:toy"), plugin.get_encoding("toy")
    assert (tokenizer.kind, tokenizer.vocab_size) == ("tiktoken", 262)
    assert (tokenizer.begin_id, tokenizer.separator_id, tokenizer.padding_id) == (261, 259, 259)
    for text, ids in zip(TEXTS, tokenizer.encode_all(TEXTS)):
        assert ids.tolist() == library.encode_ordinary(text.decode()) and ids.max() < 259
        assert tokenizer.decode([261, *ids, 259]) == text == again(tokenizer).decode(ids)
    assert tokenizer.encode(b"the the").tolist() == [257, 258]
    assert tokenizer.byte_lengths[[256, 257, 259, 260]].tolist() == [2, 3, 0, 0]
    assert again(tokenizer).identity == tokenizer.identity
    with pytest.raises(UserError, match=r"unknown name 'toi' \(did you mean 'toy'\?\)"):
        open_tokenizer("tiktoken:toi")


def test_an_encoding_that_cannot_be_fetched(plugin, monkeypatch):
    def get_encoding(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(plugin, "get_encoding", get_encoding)
    with pytest.raises(UserError, match=r"cannot be fetched \(no route to host\); set TIKTOKEN_CACHE_DIR"):
        TiktokenTokenizer.named("toy")


@pytest.mark.parametrize("kind", [SentencePieceTokenizer, TiktokenTokenizer])
def test_they_are_not_learned_from_a_corpus(kind):
    with pytest.raises(UserError, match=r"comes with a corpus that was prepared with --tokenizer"):
        kind.train([b"text"], 300)


def test_a_tokenizer_json_alone(tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    model.add_special_tokens(["<s>", "<end>"])
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    model.save(str(tmp_path / "tokenizer.json"))
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        found = open_tokenizer(str(source))
        assert (found.kind, found.begin_id, found.separator_id) == ("library", 3, None)
        assert found.encode(b"aba").tolist() == [2, 0]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    assert open_tokenizer(str(tmp_path)).separator_id == 4
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 4], "model_type": "unheard_of"}))
    assert open_tokenizer(str(tmp_path)).separator_id == 2
    trained = BPETokenizer.train(TEXTS[:1], 290)
    (tmp_path / "oasis_tokenizer.json").write_text(trained.to_json())
    assert open_tokenizer(str(tmp_path)).identity == trained.identity


def test_what_has_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"comes without a tokenizer; allowed: bytes, bpe, a tokenizer.json"):
        open_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="no such folder or file"):
        open_tokenizer(str(tmp_path / "none.model"))
