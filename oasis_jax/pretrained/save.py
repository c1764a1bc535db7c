"""Out again: a model as safetensors with config.json and its tokenizer, as its family's other readers expect them.

A residual model of a known family becomes what it came from: its tensors' bytes are those of the file that was read,
where its parameters still are. Any other model keeps this library's parameter names, with its whole ModelConfig under
"oasis" in config.json, and `load_pretrained` reads it back.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from oasis_jax.config import ModelConfig
from oasis_jax.data.tokenizers import LibraryTokenizer, Tokenizer
from oasis_jax.errors import UserError, printable
from oasis_jax.model.decoder import parameter_specs
from oasis_jax.plain_names import plain
from oasis_jax.pretrained.families import FAMILIES, read_model_config
from oasis_jax.pretrained.load import Pretrained
from oasis_jax.pretrained.mapping import file_specs, fit_vocabulary, join
from oasis_jax.pretrained.tensors import MODEL_TYPE
from oasis_jax.storage import local_path

SHARD = 5 * 2**30  # bytes of a file
_TYPES = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("float16")}


def save_pretrained(model: Pretrained, folder: str | os.PathLike[str], *, dtype: str | None = None) -> str:
    """Writes model.safetensors (in shards where it is large), config.json, tokenizer.json, chat template, README.md.

    Args:
      model: what to write.
      folder: made where it is missing; has to be empty.
      dtype: of the tensors; None: as the source's config.json says, or the model's.

    Returns:
      The model_type that was written: a family's name, or "oasis".

    Raises:
      UserError: a folder that holds something, an unknown dtype, a disk that is full.
    """
    path = local_path(folder, "folder")
    kind = standard_family(model)
    name = dtype or str(
        model.source_config.get("dtype") or model.source_config.get("torch_dtype") or model.config.dtype
    )
    if name not in _TYPES:
        raise UserError(f"--dtype: {name!r} cannot be written; allowed: {', '.join(_TYPES)}")
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise UserError(f"--out: {str(path)!r} is not empty")
        tensors = _family_tensors(model, kind) if kind else _own_tensors(model)
        _write_shards(path, ((key, np.ascontiguousarray(x.astype(_TYPES[name]))) for key, x in tensors))
        _write_json(path / "config.json", written_config(model, kind, name))
        _write_tokenizer(path, model.tokenizer, whole=kind is None)
        if model.chat is not None:
            names = dict(chat_template=model.chat.text, bos_token=model.chat.begin, eos_token=model.chat.end)
            _write_json(path / "tokenizer_config.json", {name: text for name, text in names.items() if text})
        (path / "README.md").write_text(printable(_card(model, kind)), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise UserError(f"--out: cannot write to {str(path)!r}: {why}") from None
    return kind or MODEL_TYPE


def _write_tokenizer(path: pathlib.Path, tokenizer: Tokenizer | None, *, whole: bool) -> None:
    """tokenizer.json for all who read it; `whole`: also what it does not say, such as which token begins a text."""
    if tokenizer is None:
        return
    if isinstance(tokenizer, LibraryTokenizer) and tokenizer.kind == "library":
        (path / "tokenizer.json").write_text(tokenizer.library_json, encoding="utf-8")
    if whole:
        (path / "oasis_tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")


def standard_family(model: Pretrained) -> str | None:
    """The family whose files can hold a model: its source's, where what config.json says is still what it computes."""
    kind = model.source_config.get("model_type")
    if kind not in FAMILIES:
        return None
    source = read_model_config(_family_config(model), "config.json")
    how = ("dtype", "preset", "attention_implementation", "depth_implementation", "remat", "stack")
    computed_alike = dataclasses.replace(source, **{name: getattr(model.config, name) for name in how})
    return kind if computed_alike == model.config else None


def _family_config(model: Pretrained) -> dict[str, Any]:
    """The source's config.json, with the head as the model has it now: a rotation unties it."""
    return {**model.source_config, "tie_word_embeddings": model.config.tied_head}


def written_config(model: Pretrained, kind: str | None, dtype: str) -> dict[str, Any]:
    """What config.json says: the source's own words where they are still true."""
    if kind:
        was_tied = read_model_config(dict(model.source_config), "config.json").tied_head
        changed = dict(model.source_config) if was_tied == model.config.tied_head else _family_config(model)
        name = "torch_dtype" if "torch_dtype" in changed else "dtype"
        return {**changed, name: dtype}
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["OasisDecoder"],
        "dtype": dtype,
        "vocab_size": model.config.vocab_size,
        "oasis": {
            "version": importlib.metadata.version("oasis_jax"),
            "model": dataclasses.asdict(model.config),
            "begin_token": model.begin_token,
        },
    }


def _host(x: jax.Array) -> np.ndarray:
    return np.asarray(jax.device_get(x))


def _at(params: Mapping[str, Any], parameter: str, layer: int | None) -> np.ndarray:
    for name in parameter.split("/"):
        params = params[name]
    return _host(params if layer is None else params[layer])


def _family_tensors(model: Pretrained, kind: str) -> Iterator[tuple[str, np.ndarray]]:
    config, specs = model.config, parameter_specs(model.config)
    for entry in FAMILIES[kind].tensors(config):
        own = file_specs(entry, specs, config.vocab_size)
        for layer in range(config.num_layers) if entry.of_layers else (None,):
            arrays = [fit_vocabulary(_at(model.params, name, layer), spec) for name, spec in zip(entry.parameters, own)]
            yield entry.name.format(layer=layer), join(arrays, entry, own)


def _own_tensors(model: Pretrained) -> Iterator[tuple[str, np.ndarray]]:
    """Every stacked parameter under its path: "layers.attention.query" is [L, D, N, H]."""
    for keys, x in jax.tree_util.tree_leaves_with_path(model.params):
        yield ".".join(key.key for key in keys), _host(x)


def _write_shards(path: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """One file, or numbered ones of at most `SHARD` bytes with an index; no more than one is in memory."""
    files: list[dict[str, int]] = []
    shard: dict[str, np.ndarray] = {}

    def flush() -> None:
        files.append({name: x.nbytes for name, x in shard.items()})
        save_file(shard, plain(path) / f"part{len(files)}", metadata={"format": "pt"})
        shard.clear()

    for name, x in tensors:
        if shard and sum(y.nbytes for y in shard.values()) + x.nbytes > SHARD:
            flush()
        shard[name] = x
    flush()
    if len(files) == 1:
        (path / "part1").rename(path / "model.safetensors")
        return
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    for i, name in enumerate(names, 1):
        (path / f"part{i}").rename(path / name)
    index = {
        "metadata": {"total_size": sum(sum(sizes.values()) for sizes in files)},
        "weight_map": {key: name for name, sizes in zip(names, files) for key in sizes},
    }
    _write_json(path / "model.safetensors.index.json", index)


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(model: Pretrained, kind: str | None) -> str:
    lines = [f"# {model.card.get('name', 'A model')}", "", f"From {model.card.get('source', 'parameters in memory')}."]
    lines += [f"- {change}" for change in model.card.get("changes", ())]
    if kind is None:
        lines += ["", "Read it with `oasis_jax.load_pretrained(folder)`: no other library computes this model."]
    config: ModelConfig = model.config
    lines += ["", f"{config.num_layers} layers, width {config.width}, {config.normalizer}, wiring {config.wiring}."]
    return "\n".join(lines) + "\n"
