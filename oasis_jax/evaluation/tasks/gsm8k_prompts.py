"""What a model is asked in GSM8K: after worked examples, for a boxed answer, or in its chat template."""

import itertools
from collections.abc import Sequence

from oasis_jax.data.pairs import Pair, prompt
from oasis_jax.pretrained import Pretrained

# Written for this library, not the eight that papers share (arXiv 2201.11903): scores with the two are not comparable.
FIXED = tuple(
    Pair(question, answer, "fixed")
    for question, answer in (
        (
            "A baker makes 24 rolls and sells them in bags of 4. Each bag costs $3. How much does he earn?",
            "He fills 24 / 4 = 6 bags. He earns 6 * 3 = 18 dollars.\n#### 18",
        ),
        (
            "Lena has 15 marbles. She gives 6 to her brother and finds 9 new ones. How many marbles does she have now?",
            "After giving 6 away she has 15 - 6 = 9 marbles. With the new ones she has 9 + 9 = 18 marbles.\n#### 18",
        ),
        (
            "A train goes 80 kilometers an hour. How many kilometers does it go in 2 hours and 15 minutes?",
            "15 minutes are 15 / 60 = 0.25 hours. The train goes 80 * 2.25 = 180 kilometers.\n#### 180",
        ),
        (
            "A coat of $120 is sold at a discount of 25%. How much does it cost?",
            "The discount is 120 * 0.25 = 30 dollars. The coat costs 120 - 30 = 90 dollars.\n#### 90",
        ),
        (
            "Omar reads 12 pages a day on 5 days and 20 a day on the other 2. How many pages does he read in a week?",
            "On 5 days he reads 12 * 5 = 60 pages. On 2 days he reads 20 * 2 = 40. Together these are 100.\n#### 100",
        ),
        (
            "A tank of 900 liters is a third full. Each minute 50 liters flow in. After how many minutes is it full?",
            "One third is 900 / 3 = 300 liters, so 600 are missing. That takes 600 / 50 = 12 minutes.\n#### 12",
        ),
        (
            "Three friends share a bill of $57 equally, and each adds $2 as a tip. How much does each of them pay?",
            "Each share is 57 / 3 = 19 dollars. With the tip each pays 19 + 2 = 21 dollars.\n#### 21",
        ),
        (
            "Ida is twice as old as Jon. In 4 years they will be 32 years old together. How old is Jon now?",
            "Now they are 32 - 2 * 4 = 24 years old together. Jon is one of three parts: 24 / 3 = 8.\n#### 8",
        ),
    )
)
_BOX = "Think step by step, and write the answer at the end, as \\boxed{answer}."


def few_shot(question: str, shots: Sequence[Pair], count: int) -> str:
    """`count` worked examples and the question; a question is never among its own examples."""
    others = itertools.islice((shot for shot in shots if shot.question != question), count)
    return "".join(f"{prompt(shot.question)} {shot.answer}\n\n" for shot in others) + prompt(question)


def boxed(question: str) -> str:
    """The question alone, asked for a boxed answer."""
    return f"{question}\n{_BOX}\n\nAnswer:"


def chat(model: Pretrained, question: str) -> list[int]:
    """The tokens of a message that asks for a boxed answer.

    Raises:
      UserError: the model has no chat template.
    """
    from oasis_jax.decoding.chat import encode

    return encode(model, [{"role": "user", "content": f"{question}\n{_BOX}"}])
