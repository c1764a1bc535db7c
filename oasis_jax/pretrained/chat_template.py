"""The chat template that comes with a model's tokenizer: in its folder or in the metadata of its GGUF file."""

import pathlib
from collections.abc import Mapping
from typing import Any

from oasis_jax.errors import UserError
from oasis_jax.pretrained.source import ChatTemplate
from oasis_jax.reading import read_bytes, read_json


def from_folder(folder: pathlib.Path) -> ChatTemplate | None:
    """From chat_template.jinja, or from tokenizer_config.json; None where neither has one.

    Of several named templates it is the one named "default".
    """
    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = read_json(file) if file.exists() else {}
    found = config.get("chat_template")
    if template.exists():
        try:
            found = read_bytes(template).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{template}: cannot be read: {error}") from None
    if isinstance(found, list):
        named = {x.get("name"): x.get("template") for x in found if isinstance(x, dict)}
        if "default" not in named:
            raise UserError(f"{file}: chat_template has the names {', '.join(map(str, named))}, but no 'default'")
        found = named["default"]
    if found is not None and not isinstance(found, str):
        raise UserError(f"{file}: chat_template must be a text, got {type(found).__name__}")
    return found and ChatTemplate(found, _written(config.get("bos_token")), _written(config.get("eos_token")))


def _written(token: Any) -> str:
    """A special token of tokenizer_config.json: a text, or an object with its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def from_gguf(fields: Mapping[str, Any]) -> ChatTemplate | None:
    """From a GGUF file's metadata; None where they have none."""
    found, tokens = fields.get("tokenizer.chat_template"), fields.get("tokenizer.ggml.tokens", ())
    ids = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    written = (tokens[i] if isinstance(i, int) and 0 <= i < len(tokens) else "" for i in ids)
    return ChatTemplate(found, *written) if isinstance(found, str) and found else None
