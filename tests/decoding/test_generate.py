"""`generate`: what rows get, what ends them, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from pretrained.tiny import random_model

from oasis_jax import ModelConfig, UserError
from oasis_jax.decoding import Sampling, generate
from oasis_jax.model.decoder import forward
from oasis_jax.pretrained import Pretrained, transplant_sink

VOCAB, SMALL = 29, dict(width=24, num_heads=4, num_kv_heads=2, num_layers=2, mlp_dim=20, vocab_size=29)


def pretrained(seed=0, **fields) -> Pretrained:
    return random_model(ModelConfig(**(SMALL | dict(preset="residual") | fields)), seed)


def tokens(rows, length, seed=1):
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length)).astype(np.int32)


def greedy(model: Pretrained, prompt, count: int) -> list[int]:
    """By the whole forward pass for every token, on one length: what follows a token never reaches it."""
    config = model.config
    run = jax.jit(lambda ids: forward(model.params, config, ids)[0])
    ids = [*map(int, prompt)]
    for _ in range(count):
        padded = np.zeros((1, len(prompt) + count), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(np.argmax(run(padded)[0, len(ids) - 1])))
    return ids[len(prompt) :]


def test_greedy_rows_are_what_each_is_alone():
    model, prompts = pretrained(preset="oasis"), [tokens(1, n, seed=n)[0].tolist() for n in (3, 11, 7)]
    found = generate(model, prompts, max_new_tokens=20)
    assert [row.tokens for row in found] == [greedy(model, prompt, 20) for prompt in prompts]
    assert [row.ended for row in found] == ["length"] * 3
    (alone,) = generate(model, prompts[1:2], max_new_tokens=20)
    assert alone.tokens == found[1].tokens
    np.testing.assert_allclose(alone.logprobs, found[1].logprobs, atol=1e-4)


def test_a_row_that_has_ended_changes_no_other():
    model, prompts = pretrained(), [tokens(1, n, seed=n)[0].tolist() for n in (4, 6, 9)]
    free = generate(model, prompts, max_new_tokens=24)
    end = free[0].tokens[2]
    found = generate(model, prompts, max_new_tokens=24, stop_tokens=[end, VOCAB - 1])
    for row, whole in zip(found, free):
        ends = [place for place, token in enumerate(whole.tokens) if token in (end, VOCAB - 1)]
        assert row.tokens == (whole.tokens[: ends[0]] if ends else whole.tokens)
        assert row.ended == ("token" if ends else "length")
    assert found[0].ended == "token"


def test_log_probabilities_are_those_of_the_model():
    model, prompt = pretrained(), tokens(1, 5)[0].tolist()
    (row,) = generate(model, [prompt], max_new_tokens=7, sampling=Sampling(temperature=2.0, top_k=5), seed=3)
    logits = forward(model.params, model.config, np.asarray([prompt + row.tokens]))[0][0]
    wanted = jax.nn.log_softmax(logits)[np.arange(4, 11), np.asarray(row.tokens)]
    np.testing.assert_allclose(row.logprobs, wanted, atol=1e-4)


def test_a_row_draws_the_same_whatever_its_neighbours_are():
    model, prompts = pretrained(), [tokens(1, n, seed=n)[0].tolist() for n in (4, 6, 9)]
    drawn = Sampling(temperature=1.5)
    found = generate(model, prompts, max_new_tokens=12, sampling=drawn, seed=[7, 8, 9])
    (alone,) = generate(model, prompts[2:], max_new_tokens=12, sampling=drawn, seed=[9])
    (other,) = generate(model, prompts[2:], max_new_tokens=12, sampling=drawn, seed=10)
    assert alone.tokens == found[2].tokens != other.tokens


def test_a_transplanted_model_writes_what_the_model_writes():
    model = pretrained().replace(begin_token=3)
    prompt = tokens(1, 6)[0].tolist()
    (wanted,) = generate(model, [[3, *prompt]], max_new_tokens=16)
    (found,) = generate(transplant_sink(model), [prompt], max_new_tokens=16)
    assert found.tokens == wanted.tokens


class Letters:
    """A tokenizer of letters."""

    kind, separator_id, vocab_size = "letters", 28, VOCAB

    def encode(self, text):
        return np.array([ord(letter) - ord("a") for letter in text], np.int32)

    def decode(self, ids):
        return "".join(chr(ord("a") + token) for token in ids).encode()


def test_stop_strings_end_a_row_before_them_and_text_is_said_once():
    model = pretrained().replace(tokenizer=Letters())
    options = dict(max_new_tokens=24, stop_tokens=[], sampling=Sampling(temperature=3.0), seed=5)
    (free,) = generate(model, ["cab"], **options)
    said, stop = [], free.text[9:12]
    (found,) = generate(model, ["cab"], stop=["zzzz", stop], on_text=lambda *x: said.append(x), **options)
    place = free.text.index(stop)
    assert place > 0 and (found.text, found.ended) == (free.text[:place], "string")
    assert "".join(text for _, text in said) == found.text and {row for row, _ in said} == {0}


def test_repetition_is_made_less_likely():
    model = pretrained()
    (row,) = generate(model, [[1, 2, 3]], max_new_tokens=20, sampling=Sampling(repetition_penalty=1e6))
    assert len({1, 2, 3, *row.tokens}) == 23


def test_no_prompt_is_nothing():
    assert generate(pretrained(), []) == []


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [2, 29]], {}, r"prompt 1: token 29 is outside the vocabulary 0\.\.28"),
        (["text"], {}, "text needs a tokenizer"),
        ([[1] * 30], dict(max_new_tokens=11), "prompt and new tokens are 41 together, but the model was made for 40"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (
            [[1]],
            dict(kv_cache="int4"),
            r"kv_cache: unknown name 'int4' \(did you mean 'int8'\?\); allowed: float, int8",
        ),
        ([[1]], dict(stop=[""]), "a stop string is empty"),
        ([[1]], dict(stop=["x"]), "stop strings and text need a tokenizer"),
        ([[1]], dict(seed=[1, 2], max_new_tokens=2), "seed must be one number or 1, one a prompt, got 2"),
    ],
)
def test_what_cannot_be_continued_says_so(prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(pretrained(context_length=40), prompts, **options)


def test_models_that_cannot_decode_say_so():
    clipped = pretrained(preset="clipped")
    with pytest.raises(UserError, match=r"set model\.clip_gamma"):
        generate(clipped, [[1]])
    fixed = dataclasses.replace(clipped.config, clip_gamma=-0.03)
    assert len(generate(clipped.replace(config=fixed), [[1]], max_new_tokens=3)[0].tokens) == 3
    learned = pretrained(rope_theta=0.0, learned_positions=16, position_offset=2)
    with pytest.raises(UserError, match="are 15 together, but the model has 14 positions"):
        generate(learned, [[1] * 4], max_new_tokens=11)


def test_nothing_is_compiled_over_a_hundred_requests_of_mixed_lengths():
    """Prompts of 1 to 32 tokens, 1 to 4 at once, behind two requests of each number of rows; every compilation of
    the process is counted, those of single operations too.
    """
    compiled, random = [], np.random.default_rng(0)
    count = lambda event, _, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    model = pretrained(num_layers=1)
    request = lambda *lengths: generate(model, [tokens(1, n, n)[0].tolist() for n in lengths], max_new_tokens=16)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for rows in (1, 2, 4):
            request(*[16] * rows), request(*[32] * rows)
        assert compiled
        compiled.clear()
        for _ in range(100):
            request(*random.integers(1, 33, random.integers(1, 5)))
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert not compiled


def test_a_row_alone_is_the_row_among_sixteen():
    model, prompts = pretrained(preset="oasis", window=5), [tokens(1, n, seed=n)[0].tolist() for n in range(1, 17)]
    found = generate(model, prompts, max_new_tokens=12)
    for prompt, row in zip(prompts, found):
        assert generate(model, [prompt], max_new_tokens=12)[0].tokens == row.tokens


def test_keys_and_values_in_8_bits_write_nearly_the_same():
    model, prompt = pretrained(preset="oasis"), tokens(1, 9)[0].tolist()
    (plain,) = generate(model, [prompt], max_new_tokens=1)
    (short,) = generate(model, [prompt], max_new_tokens=1, kv_cache="int8")
    assert short.logprobs == plain.logprobs  # the prompt itself is run in float
    (plain,), (short,) = (generate(model, [prompt], max_new_tokens=4, kv_cache=kind) for kind in ("float", "int8"))
    same = [a == b for a, b in zip(plain.tokens, short.tokens)].index(False) if plain.tokens != short.tokens else 4
    assert same >= 2 and 0 < np.abs(np.subtract(plain.logprobs[:same], short.logprobs[:same])).max() < 0.1
