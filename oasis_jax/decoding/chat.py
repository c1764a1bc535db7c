"""Messages as the text that a chat model was trained on, by the template that came with it.

    messages = [{"role": "user", "content": "What is a sink?"}]
    generate(model, [encode(model, messages)])

Templates are files of others: they run in Jinja's sandbox, which lets them neither call what is not theirs nor change
what they are given.
"""

import datetime
import json
from collections.abc import Mapping, Sequence

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from oasis_jax.data.tokenizers import LibraryTokenizer
from oasis_jax.errors import UserError, unknown_name
from oasis_jax.pretrained.load import Pretrained

ROLES = ("system", "user", "assistant", "tool")

Message = Mapping[str, str]


def render(model: Pretrained, messages: Sequence[Message], *, answer: bool = True) -> str:
    """The messages as one text, special tokens written out.

    Args:
      model: with a chat template.
      messages: {"role": one of ROLES, "content": text}, oldest first.
      answer: the text ends where the model's answer begins, if the template knows how.

    Raises:
      UserError: the model has no template, or that one cannot take these messages; another role or content; a
        message that spells a special token, into which its text would turn.
    """
    if model.chat is None:
        raise UserError(f"chat: {model.card.get('name', 'this model')} came without a chat template")
    _check(messages, _specials(model))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.datetime.now().strftime}
    values = dict(tools=None, documents=None, bos_token=model.chat.begin, eos_token=model.chat.end)
    try:
        template = environment.from_string(model.chat.text)
        return template.render(messages=[dict(x) for x in messages], add_generation_prompt=answer, **values)
    except Exception as error:  # whatever a template does with what it is given
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"chat: the model's template cannot take these messages: {reason}") from None


def encode(model: Pretrained, messages: Sequence[Message], *, answer: bool = True) -> list[int]:
    """The tokens of `render`, its special tokens as such; no begin token but the template's own comes before them."""
    text = render(model, messages, answer=answer)
    return model.tokenizer.encode_with_specials(text).tolist()


def _specials(model: Pretrained) -> tuple[str, ...]:
    if not isinstance(model.tokenizer, LibraryTokenizer):
        raise UserError("chat: needs the tokenizer that the template was made for, and this model came without it")
    return model.tokenizer.specials


def _check(messages: Sequence[Message], specials: Sequence[str]) -> None:
    if not messages:
        raise UserError("chat: there is no message; give at least one")
    for number, message in enumerate(messages):
        where = f"chat: message {number}"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise UserError(f"{where}: must have the keys role and content, got {message!r}")
        if message["role"] not in ROLES:
            raise unknown_name(f"{where}: role", message["role"], ROLES)
        content = message["content"]
        if not isinstance(content, str) or not content.strip():
            raise UserError(f"{where}: content must be a text that is not empty, got {content!r}")
        for token in specials:
            if token in content:
                raise UserError(f"{where}: spells the special token {token!r}, into which its text would turn")


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value, indent: int | None = None) -> str:
    """As a text for a model, where Jinja's own filter writes for a web page."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
