"""Tokenizers of pretrained models: a folder's tokenizer.json, or what the metadata of a GGUF file say."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from oasis_jax.data.tokenizers import LibraryTokenizer, SentencePieceTokenizer, TiktokenTokenizer, Tokenizer
from oasis_jax.errors import UserError, nearest, unknown_name
from oasis_jax.pretrained.source import is_hub_name, model_folder, open_source
from oasis_jax.reading import read_json
from oasis_jax.storage import as_path, fetched, is_remote

# What is read of a model.
_FILES = ("config.json", "tokenizer*", "oasis_tokenizer.json")

_ALLOWED = (
    "bytes, bpe, a tokenizer.json, a .gguf or .model file, tiktoken:NAME, or a model with one: a folder, or "
    "owner/name, a name on a hub"
)

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


def from_folder(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of a `LibraryTokenizer` from tokenizer.json; None where the folder has none.

    Its begin token is what the tokenizer itself puts before a text; its separator the end token that config.json names
    or, without it, tokenizer_config.json.
    """
    file = folder / "tokenizer.json"
    return _from_file(file, config) if file.exists() else None


def _from_file(file: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps(read_json(file))
    try:
        library = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{file}: cannot be read: {error}") from None
    end = config.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    beside = file.with_name("tokenizer_config.json")
    if end is None and beside.exists():
        name = read_json(beside).get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        end = library.token_to_id(name) if isinstance(name, str) else None
    empty = library.encode("", add_special_tokens=True).ids
    return {
        "model": text,
        "begin_id": empty[0] if empty else None,
        "separator_id": end if isinstance(end, int) else None,
    }


def open_tokenizer(source: str) -> Tokenizer:
    """A tokenizer alone.

    Args:
      source: a tokenizer.json or a folder that holds one, a .gguf file, a .model file of sentencepiece, tiktoken:NAME,
        or a model's name on a hub.

    Raises:
      UserError: there is none, or it cannot be read or fetched.
    """
    if source.startswith("tiktoken:"):
        return TiktokenTokenizer.named(source.removeprefix("tiktoken:"))
    path = _local(source)
    if not path.exists() and not is_hub_name(source):
        raise UserError(
            f"--tokenizer: no such folder or file: {source!r}{nearest(source, ('bytes', 'bpe'))}; allowed: {_ALLOWED}"
        )
    if path.suffix == ".model" and path.is_file():
        return SentencePieceTokenizer.from_file(path)
    if path.suffix == ".json" and path.is_file():
        return _library(_from_file(path, _config_of(path.parent)))
    if path.suffix == ".gguf" and path.is_file():
        fields = open_source(path).tokenizer()
    else:
        folder = path if path.is_dir() else model_folder(source, _FILES)
        trained = folder / "oasis_tokenizer.json"
        fields = json.dumps(read_json(trained)) if trained.exists() else from_folder(folder, _config_of(folder))
    if fields is None:
        raise UserError(f"--tokenizer: {source!r} comes without a tokenizer; allowed: {_ALLOWED}")
    return _library(fields)


def _local(source: str) -> pathlib.Path:
    """A path to what `open_tokenizer` reads; out of a store only that is fetched."""
    if not is_remote(source):
        return as_path(source, "--tokenizer").expanduser()
    path = as_path(source, "--tokenizer")
    if path.suffix == ".json":  # config.json beside it says more
        return fetched(path.parent, "--tokenizer", [path.name, "config.json"]) / path.name
    return fetched(path, "--tokenizer", _FILES)


def _library(fields: dict[str, Any] | str) -> Tokenizer:
    return Tokenizer.from_json(fields) if isinstance(fields, str) else LibraryTokenizer(**fields)


def _config_of(folder: pathlib.Path) -> dict[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").exists() else {}


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
