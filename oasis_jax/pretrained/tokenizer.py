"""Tokenizers of pretrained models: a folder's tokenizer.json, or what the metadata of a GGUF file say."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from oasis_jax.errors import UserError, unknown_name
from oasis_jax.pretrained.source import read_json

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


def from_folder(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of a `LibraryTokenizer` from tokenizer.json; None where the folder has none.

    Its begin token is what the tokenizer itself puts before a text; its separator the end token that config.json names.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    text = json.dumps(read_json(file))
    try:
        library = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{file}: cannot be read: {error}") from None
    empty = library.encode("", add_special_tokens=True).ids
    end = config.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    return {
        "model": text,
        "begin_id": empty[0] if empty else None,
        "separator_id": end if isinstance(end, int) else None,
    }


# What is split before pairs are merged, under the names that llama.cpp gives the patterns.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(first: list) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


def _pattern(digits: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(_WORDS + digits + _REST), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS = {
    "gpt-2": lambda: _byte_level([]),
    "smollm": lambda: _byte_level([pre_tokenizers.Digits(individual_digits=True)]),
    "llama-bpe": lambda: _pattern(r"\p{N}{1,3}"),
    "llama3": lambda: _pattern(r"\p{N}{1,3}"),
    "qwen2": lambda: _pattern(r"\p{N}"),
}
# The token that came before every document of pretraining where the metadata name another or none.
_BEGIN = {"smollm": "<|endoftext|>"}


def from_gguf(fields: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The fields of a `LibraryTokenizer` from a GGUF file's metadata; None where there are none.

    Raises:
      UserError: a kind of tokenizer that is not known.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind is None:
        return None
    makers = {"gpt2": _byte_pairs, "llama": _sentencepiece}
    if kind not in makers:
        raise unknown_name(f"{where}: tokenizer.ggml.model", kind, makers)
    try:
        tokens = list(fields["tokenizer.ggml.tokens"])
        library = makers[kind](fields, tokens, where)
        types = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
        kinds = (_CONTROL, _USER_DEFINED)
        library.add_special_tokens(
            [tokenizers.AddedToken(t, special=True) for t, k in zip(tokens, types) if k in kinds]
        )
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{where}: its tokenizer cannot be made: {type(error).__name__}: {error}") from None
    pre = fields.get("tokenizer.ggml.pre")
    if pre in _BEGIN and _BEGIN[pre] in tokens:
        begin = tokens.index(_BEGIN[pre])
    else:
        adds = fields.get("tokenizer.ggml.add_bos_token", kind == "llama")
        begin = fields.get("tokenizer.ggml.bos_token_id") if adds else None
    return {"model": library.to_str(), "begin_id": begin, "separator_id": fields.get("tokenizer.ggml.eos_token_id")}


def _byte_pairs(fields: Mapping[str, Any], tokens: list[str], where: str) -> tokenizers.Tokenizer:
    pre = fields.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in _PRE_TOKENIZERS:
        raise unknown_name(f"{where}: tokenizer.ggml.pre", pre, _PRE_TOKENIZERS)
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    library = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    library.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    library.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        library.normalizer = normalizers.NFC()
    return library


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], where: str) -> tokenizers.Tokenizer:
    """SentencePiece's merges by score, written as byte pairs: a pair is merged the earlier, the better its result."""
    del where
    ids, scores = {t: i for i, t in enumerate(tokens)}, fields["tokenizer.ggml.scores"]
    merges = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((-scores[index], ids[left], ids[right], (left, right)))
    merges.sort()
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    model = models.BPE(ids, [pair for *_, pair in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    library = tokenizers.Tokenizer(model)
    space = [normalizers.Prepend("▁")] if fields.get("tokenizer.ggml.add_space_prefix", True) else []
    library.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return library
