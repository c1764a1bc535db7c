"""Messages as a text: known strings, templates from everywhere, and what a foreign template cannot do."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from pretrained.tiny import write

from oasis_jax import UserError, generate, load_pretrained
from oasis_jax.commands.generate import main
from oasis_jax.commands.parser import run_main
from oasis_jax.decoding.chat import encode, render
from oasis_jax.pretrained import save_pretrained, transplant_sink
from oasis_jax.pretrained.chat_template import from_gguf
from oasis_jax.pretrained.smollm2 import fetch
from oasis_jax.pretrained.source import ChatTemplate

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if true %}\n{{ '<|im_start|>' + message['role'] + ' ' + message.content | trim + '<|im_end|>' }}\n"
    "{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
ASK = [{"role": "user", "content": " w7 w9\n"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of words and two special tokens."""
    path = write(tmp_path_factory.mktemp("chat") / "llama", eos_token_id=202)
    names = ["<s>", "<|im_start|>", "<|im_end|>"]
    words = {f"w{i}": i for i in range(200)} | {name: 200 + i for i, name in enumerate(names)}
    words |= {"user": 203, "assistant": 204}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names])
    library.save(str(path / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load_pretrained(folder)


def with_template(model, text):
    return model.replace(chat=ChatTemplate(text, "<s>", "<|im_end|>"))


def test_a_known_text_and_its_tokens(model):
    """Lines of blocks alone leave nothing behind."""
    text = "<s><|im_start|>user w7 w9<|im_end|>\n"
    assert render(model, ASK, answer=False) == text
    assert render(model, ASK) == text + "<|im_start|>assistant "
    assert encode(model, ASK) == [200, 201, 203, 7, 9, 202, 201, 204]


def test_an_answer_is_what_follows_the_tokens(folder, model, capsys):
    (wanted,) = generate(model, [encode(model, ASK)], max_new_tokens=5)
    main(["w7 w9", "--chat", f"--model={folder}", "--max-new-tokens=5"])
    assert capsys.readouterr().out.strip() == wanted.text.strip()
    main(["w7 w9", "w1", "--chat", f"--model={folder}", "--max-new-tokens=5"])
    assert capsys.readouterr().out.startswith(f"w7 w9\n{wanted.text}\n")


def test_where_templates_come_from(folder, model, tmp_path):
    save_pretrained(model, tmp_path / "again")
    assert load_pretrained(tmp_path / "again").chat == model.chat == ChatTemplate(TEMPLATE, "<s>", "<|im_end|>")
    config = {"chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]}
    (tmp_path / "again" / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_pretrained(tmp_path / "again").chat == ChatTemplate("D")
    (tmp_path / "again" / "chat_template.jinja").write_text("J")
    assert load_pretrained(tmp_path / "again").chat == ChatTemplate("J")
    fields = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.bos_token_id": 1, "tokenizer.chat_template": "G"}
    assert from_gguf(fields) == ChatTemplate("G", "b", "") and from_gguf({}) is None


def test_a_transplanted_begin_token_is_not_written_again(model):
    moved = transplant_sink(model.replace(begin_token=200))
    assert encode(moved, ASK) == encode(model, ASK)[1:]
    assert transplant_sink(model, [3]).chat == model.chat


def test_what_templates_are_given():
    """Names that published templates use, as transformers gives them."""
    words = (
        "{{ tools is none }} {{ documents is none }} {{ eos_token }} {{ {'b': 'ü<'} | tojson }} {{ messages | length }}"
    )
    loop = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    loop += "{{ strftime_now('%Y') | length }}"
    found = render(with_template(FAKE, words + loop), ASK)
    assert found == 'True True <|im_end|> {"b": "ü<"} 1014'


class _Words:
    """As much of a model as rendering needs."""

    def __init__(self):
        library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
        library.add_special_tokens(["<|im_end|>"])
        from oasis_jax.data.tokenizers import LibraryTokenizer

        self.tokenizer, self.card, self.chat = LibraryTokenizer(library.to_str()), {"name": "fake"}, None

    def replace(self, chat):
        self.chat = chat
        return self


FAKE = _Words()


@pytest.mark.parametrize(
    "template, messages, message",
    [
        (TEMPLATE, [], "there is no message"),
        (TEMPLATE, [{"role": "usr", "content": "x"}], r"message 0: role: unknown name 'usr' \(did you mean 'user'\?\)"),
        (TEMPLATE, [*ASK, {"role": "user"}], "message 1: must have the keys role and content"),
        (TEMPLATE, [*ASK, {"role": "user", "content": " "}], "message 1: content must be a text that is not empty"),
        (TEMPLATE, [{"role": "user", "content": "x<|im_end|>"}], r"message 0: spells the special token '<\|im_end\|>'"),
        ("{{ raise_exception('roles must alternate') }}", ASK, "cannot take these messages: roles must alternate"),
        ("{% for x in messages %}", ASK, "cannot take these messages: Unexpected end of template"),
        ("{{ messages[0].content + 3 }}", ASK, "cannot take these messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", ASK, "cannot take these messages: .* is unsafe"),
        ("{{ messages.append(3) }}", ASK, "cannot take these messages: .* is unsafe"),
        ("{% include '/etc/passwd' %}", ASK, "cannot take these messages: no loader"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", ASK, "cannot take these messages"),
    ],
)
def test_what_cannot_be_rendered_says_so(template, messages, message):
    with pytest.raises(UserError, match=message):
        render(with_template(FAKE, template), messages)


def test_a_model_without_a_template_is_refused_by_name(folder, model, tmp_path, capsys):
    with pytest.raises(UserError, match="chat: llama came without a chat template"):
        render(model.replace(chat=None), ASK)
    with pytest.raises(UserError, match="chat: needs the tokenizer that the template was made for"):
        render(model.replace(tokenizer=None), ASK)
    path = write(tmp_path / "plain")
    with pytest.raises(SystemExit) as exit:
        run_main(main, ["w1", "--chat", f"--model={path}"], "oasis_jax generate")
    said = capsys.readouterr().err
    assert exit.value.code == 2 and "plain came without a chat template" in said and said.count("\n") == 1


@pytest.mark.parametrize("written", ['{"chat_template": 3}', '{"chat_template": [{"name": "tools", "template": "T"}]}'])
def test_a_template_that_is_none_says_so(tmp_path, written):
    path = write(tmp_path / "llama")
    (path / "tokenizer_config.json").write_text(written)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: chat_template"):
        load_pretrained(path)


@pytest.mark.slow
def test_smollm2_answers():
    try:
        model = load_pretrained(fetch())
    except UserError as error:
        pytest.skip(str(error))
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    assert render(model, ask) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = encode(model, ask)
    assert ids[0] == 1 and ids.count(1) == 3 and ids.count(2) == 2
    (found,) = generate(model, [ids], max_new_tokens=24)
    assert "Paris" in found.text and found.ended == "token"
    assert dataclasses.replace(model.chat, text="") == ChatTemplate("", "<|im_start|>", "<|im_end|>")
    assert np.isfinite(found.logprobs).all()
