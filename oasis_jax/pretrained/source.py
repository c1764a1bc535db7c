"""Where a pretrained model comes from: a folder of safetensors, a GGUF file, or a name on a hub."""

import abc
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from oasis_jax.errors import UserError
from oasis_jax.storage import fetched

# What is read of a model.
_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*"),
    *("oasis_tokenizer.json", "chat_template.jinja"),
)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How messages become one text; see `oasis_jax.decoding.chat`.

    Attributes:
      text: in Jinja's language.
      begin, end: the begin and the end token as they are written, which a template knows as bos_token and eos_token;
        "" where there is none.
    """

    text: str
    begin: str = ""
    end: str = ""


class Source(abc.ABC):
    """The files of one model, read tensor by tensor.

    Attributes:
      where: for messages.
      config: as config.json says it, whatever the files are.
      shapes: of every tensor, by its name in Hugging Face's files.
    """

    where: str
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor in the type it is stored in, or as float32 where that is quantized."""

    @abc.abstractmethod
    def tokenizer(self) -> dict[str, Any] | str | None:
        """The fields of a `LibraryTokenizer`: model, its JSON; begin_id and separator_id. Or, of a model trained here,
        the tokenizer's `to_json`. None: there is none.
        """

    @abc.abstractmethod
    def chat_template(self) -> ChatTemplate | None:
        """How messages become a text; None: there is no such template."""


def open_source(source: str | pathlib.Path) -> Source:
    """The files behind a folder, a file ending in .gguf, here or in an object store, or a hub's owner/name.

    Raises:
      UserError: there is nothing that can be read, or the hub cannot be reached.
    """
    from oasis_jax.pretrained.folder import Folder

    path = fetched(source, "model", _FILES)
    if path.is_file():
        return _open_file(path)
    if path.is_dir():
        return Folder(path)
    return Folder(model_folder(str(source), _FILES))


def model_folder(text: str, wanted: Sequence[str]) -> pathlib.Path:
    """The folder of a model on a hub, with those of its files that match a pattern; see `open_source`."""
    if is_hub_name(text):
        return _from_hub(text, wanted)
    raise UserError(f"model {text!r}: no such folder or file, and not of the form owner/name, a name on a hub")


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a model's name on a hub, owner/name."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith("/")


def _open_file(path: pathlib.Path) -> Source:
    if path.suffix == ".gguf":
        from oasis_jax.pretrained.gguf_file import GGUFFile

        return GGUFFile(path)
    if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"):
        raise UserError(pickle_refused(path))
    if path.suffix == ".safetensors":
        raise UserError(f"model {str(path)!r}: give the folder, which holds config.json too")
    raise UserError(f"model {str(path)!r}: expected a folder with config.json and *.safetensors, or a .gguf file")


def pickle_refused(path: pathlib.Path) -> str:
    """Why a pickle is not opened, and what helps."""
    return (
        f"model {str(path)!r}: a pickle can run code when it is opened and is not read; convert it where it is "
        "trusted: transformers' save_pretrained(folder) writes safetensors"
    )


def _from_hub(name: str, wanted: Sequence[str]) -> pathlib.Path:
    local = "give a local folder of safetensors with config.json, or a .gguf file"
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"model {name!r}: no such folder, and huggingface_hub is not installed to fetch it; {local}"
        ) from None
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(wanted)))
    except Exception as error:  # many kinds, of several libraries underneath
        reason = str(error).strip().splitlines()
        raise UserError(
            f"model {name!r}: no such folder, and it cannot be fetched "
            f"({reason[0] if reason else type(error).__name__}); "
            f"{local}"
        ) from None
