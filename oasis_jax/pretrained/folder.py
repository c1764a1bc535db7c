"""A folder as Hugging Face's libraries write it: config.json, safetensors in one file or in shards, a tokenizer."""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from oasis_jax.errors import UserError
from oasis_jax.plain_names import plain
from oasis_jax.pretrained import chat_template
from oasis_jax.pretrained.keys import shortened
from oasis_jax.pretrained.source import ChatTemplate, Source, pickle_refused
from oasis_jax.reading import read_json, require_file

_TYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Folder(Source):
    """See `Source`. Files are links in a hub's cache, so links are followed; an index may not name files elsewhere."""

    def __init__(self, path: pathlib.Path):
        self.path, self.where = path, str(path / "config.json")
        self.config = read_json(path / "config.json")
        files = self._files()
        self._open = {
            file: self._opened(path / file) for file in sorted(set(files.values()) if files else self._single())
        }
        held = {file: set(handle.keys()) for file, handle in self._open.items()}
        for name, file in files.items():
            if name not in held[file]:
                raise UserError(f"{path}: the index names tensor {name!r}, which {file} does not hold")
        self._file_of = {name: file for file in held for name in sorted(held[file])} | files
        self.shapes = {name: tuple(self._slice(name).get_shape()) for name in self._file_of}

    def _files(self) -> dict[str, str]:
        """Tensor name -> file, as the index says; empty where there is no index."""
        index = self.path / "model.safetensors.index.json"
        if not index.exists():
            return {}
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise UserError(f"{index}: has no 'weight_map'")
        for file in files.values():
            if not isinstance(file, str) or pathlib.PurePath(file).name != file or file in ("", ".."):
                raise UserError(f"{index}: names the file {shortened(file)}, which does not lie in its own folder")
        for file in sorted(set(files.values())):
            if not (self.path / file).exists():
                raise UserError(f"{self.path}: shard {file} is missing; the index names it")
        return files

    def _single(self) -> list[str]:
        files = sorted(file.name for file in self.path.glob("*.safetensors"))
        if "model.safetensors" in files:  # another one beside it is the same model in another layout
            return ["model.safetensors"]
        if len(files) == 1:
            return files
        if files:
            raise UserError(f"{self.path}: {len(files)} safetensors files, but no model.safetensors.index.json")
        for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
            for file in sorted(self.path.glob(pattern)):
                raise UserError(pickle_refused(file))
        raise UserError(f"{self.path}: there is no *.safetensors file")

    @staticmethod
    def _opened(file: pathlib.Path):
        require_file(file)
        try:
            return safetensors.safe_open(str(plain(file)), framework="numpy")
        except Exception as error:  # SafetensorError is not always exported; OSError of the system
            raise UserError(f"{file}: cannot be read as safetensors: {str(error).splitlines()[0]}") from None

    def _slice(self, name: str):
        return self._open[self._file_of[name]].get_slice(name)

    def read(self, name: str) -> np.ndarray:
        kind = self._slice(name).get_dtype()
        if kind not in _TYPES:
            raise UserError(f"{self.path}: tensor {name!r} has type {kind}; readable: {', '.join(_TYPES)}")
        return np.asarray(self._open[self._file_of[name]].get_tensor(name))

    def tokenizer(self) -> dict[str, Any] | str | None:
        from oasis_jax.pretrained.tokenizer import from_folder

        trained = self.path / "oasis_tokenizer.json"
        if trained.exists():
            return json.dumps(read_json(trained))
        return from_folder(self.path, self.config)

    def chat_template(self) -> ChatTemplate | None:
        return chat_template.from_folder(self.path)
