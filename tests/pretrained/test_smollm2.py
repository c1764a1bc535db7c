"""A real model: SmolLM2-135M-Instruct as this library and as transformers read the same GGUF file."""

import pathlib
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from oasis_jax.errors import UserError

pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch", reason="torch is not installed; make test-parity installs it")
transformers = pytest.importorskip("transformers", reason="transformers is missing; make test-parity installs it")

from pretrained.against_transformers import compare, ours, theirs  # noqa: E402

from oasis_jax.decoding.chat import encode, render  # noqa: E402
from oasis_jax.pretrained import Pretrained, load_pretrained  # noqa: E402
from oasis_jax.pretrained.smollm2 import fetch  # noqa: E402

LENGTH = 600
ODD = (
    "Naïve café – “quotes”, ellipsis… 1234567890, 3.14159, -7e-3\n\n\n    indented\t\ttabs   trailing   \r\n"
    "日本語のテキスト, 한국어, العربية, עברית, Ελληνικά, русский; 🙂👩‍👩‍👧‍👦🏳️‍🌈 Å Å ﬁ ½ ² Ⅷ\u00a0\u2009\u200b\ufeff\n"
    "don't I'LL we've it'S O'Neill; def f(x_1, *args): return x_1 ** 2  # !!! ??? ...\n"
    "<|im_end|> \x00\x01 zebra😀123 ١٢٣ ₁₂\n"
)


@pytest.fixture(scope="module")
def file() -> pathlib.Path:
    try:
        return fetch()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(file) -> Pretrained:
    return load_pretrained(file)


@pytest.fixture(scope="module")
def text() -> str:
    root = pathlib.Path(__file__).parents[2]
    return (root / "README.md").read_text() + ODD * 3 + pathlib.Path(__file__).read_text()


@pytest.fixture(scope="module")
def their_tokenizer(file):
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_logits_and_perplexity_of_real_text(file, model, text):
    their_model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = np.concatenate([[model.begin_token], model.tokenizer.encode(text)])[None, :LENGTH].astype(np.int64)
    assert ids.shape == (1, LENGTH)
    found = compare(ours(model, ids), theirs(their_model, ids), ids, np.ones(ids.shape, bool), 2e-4)
    print(f"SmolLM2: logits {found['logits']:.1e}, perplexity {found['perplexity']:.1e}")


def test_the_tokenizer_gives_the_ids_of_transformers(model, text, their_tokenizer):
    """But for the names of special tokens, which a text cannot turn into here, and beside numerals: transformers leaves
    out what the file says of them (pre = smollm), that each is a piece of its own.
    """
    text = text.replace("<|", "")
    without = "".join(x for x in text if not x.isnumeric())
    pieces = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    for case, pre_tokenizer in ((without, None), (text, pre_tokenizers.Sequence(pieces))):
        if pre_tokenizer is not None:
            their_tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
        expected = their_tokenizer(case, add_special_tokens=False)["input_ids"]
        assert model.tokenizer.encode(case).tolist() == expected
        assert model.tokenizer.decode(np.array(expected)).decode() == case


def test_messages_become_the_text_and_the_ids_of_transformers(model, their_tokenizer):
    talk = [
        ("system", "Be brief.\n"),
        ("user", "What's a sink?\n\n def f(x): 3 + 4"),
        ("assistant", " A drain. "),
        ("user", "?"),
    ]
    messages = [{"role": role, "content": content} for role, content in talk]
    pieces = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    their_tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    for some in (messages, messages[1:], messages[1:2], messages[1:3]):
        for answer in (True, False):
            theirs = partial(their_tokenizer.apply_chat_template, some, add_generation_prompt=answer)
            assert render(model, some, answer=answer) == theirs(tokenize=False)
            assert encode(model, some, answer=answer) == theirs(tokenize=True, return_dict=False)


def test_a_text_cannot_spell_a_special_token(model):
    ids = model.tokenizer.encode("<|im_end|><|endoftext|>")
    assert len(ids) > 2 and not set(ids.tolist()) & {0, 1, 2}


def test_the_model_is_what_is_known_of_it(model):
    """Its family's sizes; half of the heads' mass on the first token."""
    config = model.config
    assert (config.num_layers, config.width, config.num_heads, config.key_heads) == (30, 576, 9, 3)
    assert config.tied_head and config.vocab_size == 49152 and model.begin_token == 0
    _, statistics = model.decoder()(jnp.asarray(np.arange(0, 3000, 50)[None] % config.vocab_size))
    mass = np.mean([layer.first_token_mass[..., 1:].mean() for layer in statistics.attention])
    assert 0.3 < mass < 0.9
