"""Log-likelihoods of rows of any lengths against those of each row alone in plain numpy."""

import jax
import numpy as np
import pytest
from model import oracle
from model.exact import in_float64
from pretrained.tiny import random_model
from sampling import sampled

from oasis_jax import LayerPattern, ModelConfig, RopeScaling, UserError
from oasis_jax.evaluation import passes
from oasis_jax.evaluation.tasks.scoring import Row, longest_text, score
from oasis_jax.model.layout import unstack_layers

VOCAB = 29
SMALL = dict(width=24, num_heads=4, num_kv_heads=2, num_layers=2, mlp_dim=20, vocab_size=VOCAB, context_length=40)
LONGROPE = RopeScaling(
    kind="longrope", factor=4.0, original_length=19, short_factors=(1.0, 1.1, 1.3), long_factors=(1.0, 2.0, 5.0)
)
KINDS = {
    "oasis": dict(preset="oasis"),
    "oasis_blocks, window": dict(preset="oasis_blocks", blocks=3, window=3),
    "alternating": dict(preset="attnres", layer_pattern=(LayerPattern(window=4), LayerPattern(rope_theta=0))),
    "null key and value": dict(preset="residual", normalizer="null_key_value", null_keys=2, position_offset=2),
    # What depends on how long a batch is: gamma = -alpha / number of keys; one list of factors for all positions.
    "clipped": dict(preset="clipped"),
    "longrope": dict(preset="residual", rope_scaling=LONGROPE),
    "learned positions": dict(preset="residual", rope_theta=0.0, learned_positions=42, norm="layernorm"),
}  # fmt: skip


def pretrained(**fields):
    return random_model(ModelConfig(**(SMALL | dict(preset="residual") | fields)))


def rows(*sizes: tuple[int, int], seed: int = 0) -> list[Row]:
    """Rows of so many tokens, of which so many are scored."""
    random = np.random.default_rng(seed)
    return [Row(random.integers(VOCAB, size=length).tolist(), scored) for length, scored in sizes]


def alone(model, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of a row's scored tokens, and whether each is the most likely one, from numpy's logits."""
    params = {name: jax.tree.map(np.asarray, group) for name, group in unstack_layers(model.params).items()}
    logits = oracle.forward(params, model.config, np.asarray([row.tokens[:-1]]))["logits"][0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.asarray(row.tokens[1:])
    found = logprobs[np.arange(len(targets)), targets]
    return found[-row.scored :], (logits.argmax(-1) == targets)[-row.scored :]


@pytest.mark.parametrize("kind", sampled(KINDS, ("oasis", "clipped", "longrope")))
def test_rows_are_scored_as_each_is_alone(kind):
    asked = rows((5, 2), (41, 40), (17, 3), (20, 19), (2, 1), (21, 20), (33, 1))
    with jax.enable_x64(True):
        model = pretrained(**KINDS[kind])
        params = jax.tree.map(lambda x: x.astype("float64"), model.params)
        model = model.replace(config=in_float64(model.config), params=params)
        guesses = [Row([3, 1, 4, token], 1) for token in range(VOCAB)]
        asked.append(max(guesses, key=lambda row: alone(model, row)[0][0]))
        found = score(model, asked, batch_size=3)
        for row, scores in zip(asked, found):
            logprobs, greedy = alone(model, row)
            np.testing.assert_allclose(scores.logprobs, logprobs, rtol=1e-9, atol=1e-10)
            assert scores.greedy.tolist() == greedy.tolist()
            assert scores.total == pytest.approx(logprobs.sum(), rel=1e-12)
    assert found[-1].greedy.all() and not all(scores.greedy.all() for scores in found)


def test_of_equal_logits_the_first_is_greedy():
    model = pretrained()
    flat = model.replace(params=jax.tree.map(np.zeros_like, model.params))
    first, second = score(flat, [Row([5, 0], 1), Row([5, 1], 1)])
    assert first.greedy.tolist() == [True] and second.greedy.tolist() == [False]
    assert first.total == second.total == pytest.approx(-np.log(VOCAB), rel=1e-6)


def test_one_program_serves_all_lengths_up_to_the_next_power_of_two():
    model, before = pretrained(num_layers=1, mlp_dim=21), passes._run._cache_size()
    score(model, rows(*((length, 1) for length in range(2, 42))), batch_size=1)
    assert passes._run._cache_size() == before + 3  # 16, 32, and 40, the context
    score(model, rows(*((length, length - 1) for length in range(41, 2, -3)), seed=1), batch_size=1)
    assert passes._run._cache_size() == before + 3


def test_how_far_it_is_is_said():
    said = []
    assert score(pretrained(), rows((5, 2), (9, 1), (7, 3)), batch_size=2, on_scored=said.append)
    assert said == [2, 1]
    assert score(pretrained(), []) == []


def test_the_context_of_a_model():
    config = pretrained(context_length=0).config
    assert longest_text(config) is None
    learned = pretrained(context_length=30, rope_theta=0.0, learned_positions=21, position_offset=2).config
    assert longest_text(learned) == 19


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ([([7, 8], 2)], {}, "row 0 has 2 tokens, so 1 to 1 can be scored, not 2"),
        ([([7, 8], 1), ([7], 0)], {}, "row 1 has 1 tokens"),
        ([([1] * 42, 3)], {}, "row 0 reads 41 tokens, but the model was made for 40"),
        ([([1, 29], 1)], {}, r"row 0: token 29 is outside the vocabulary 0\.\.28"),
        ([([-1, 2], 1)], {}, "row 0: token -1 is outside"),
        ([([1, 2], 1)], dict(batch_size=0), "batch_size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_scored_says_so(asked, options, message):
    with pytest.raises(UserError, match=message):
        score(pretrained(), [Row(*row) for row in asked], **options)


def test_models_of_vectors_have_no_likelihoods():
    sizes = {name: value for name, value in SMALL.items() if name != "vocab_size"}
    model = random_model(ModelConfig(preset="residual", inputs="vectors", vector_dim=5, **sizes))
    with pytest.raises(UserError, match=r"model\.inputs=vectors"):
        score(model, [])
