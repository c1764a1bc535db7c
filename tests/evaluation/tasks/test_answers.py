"""Answers read from text: known answers, every answer of the training file, and lm-evaluation-harness' own filters."""

import json
import pathlib
import re
from fractions import Fraction

import pytest

from oasis_jax.evaluation.tasks.answers import boxed, flexible, numbers, strict

TRAIN = pathlib.Path(__file__).parents[4] / "shared" / "data" / "gsm8k_train.jsonl"


@pytest.mark.parametrize(
    "text, value",
    [
        ("0", 0),
        ("3.0", 3),
        (".5", "1/2"),
        ("1,234,567.50", "1234567.5"),
        ("150 000", 150000),
        ("1\u202f500", 1500),
        ("$1,200", 1200),
        ("-$7", -7),
        ("$-7", -7),
        ("\u22124", -4),
        ("+5", 5),
        ("\u20ac 12", 12),
        ("25%", 25),
        ("25 \\%", 25),
        ("12 kg.", 12),
        ("18.", 18),
        ("7..", 7),
        ("3/4", "3/4"),
        ("-3/4", "-3/4"),
        ("1 1/2", "3/2"),
        ("-1 1/2", "-3/2"),
        ("\\frac{3}{4}", "3/4"),
        ("\\dfrac34", "3/4"),
        ("2\\tfrac{1}{2}", "5/2"),
        ("1{,}000", 1000),
        ("1\\,000", 1000),
        ("10 - 3", 3),
        ("10-3", 3),
        ("10 -3", 3),
        ("(2) - 3", 3),
        ("10 - 3 = -7", -7),
        ("a loss of -7", -7),
        ("Answer - 7", 7),
        ("covid-19", 19),
        ("= -3", -3),
        ("5 * -3", -3),
        ("5 - -3", -3),
        ("5$-3", 3),
        ("\u221210 \u2212 3", 3),
        ("5/0", 5),
        ("of 3, 4 and 12", 12),
        ("", None),
        ("none at all", None),
    ],
)
def test_the_last_number_is_a_value(text, value):
    assert flexible(text) == (None if value is None else Fraction(value))


def test_all_numbers_in_order():
    found = numbers("From 10 - 3 = 7 and 1,000 to -2.50: 1/3, then 12/4/2025")
    assert found[:6] == [10, 3, 7, 1000, Fraction("-2.5"), Fraction(1, 3)]


@pytest.mark.parametrize(
    "text, value",
    [
        ("so\n#### 72", 72),
        ("####12", 12),
        ("#### $5", 5),
        ("#### -5", -5),
        ("#### 0", 0),
        ("#### 1,000 dollars, not 7", 1000),
        ("#### 3\n\nQuestion: another\n#### 4", 3),
        ("#### none\n5", None),
        ("72", None),
    ],
)
def test_strict_is_the_number_behind_the_first_mark(text, value):
    assert strict(text) == value


@pytest.mark.parametrize(
    "text, value",
    [
        ("\\boxed{72}", 72),
        ("\\boxed{1} then \\boxed{2} and 3", 2),
        ("\\boxed{\\frac{3}{4}}", Fraction(3, 4)),
        ("\\boxed{\\dfrac{3}{4}\\text{ of 8 cups}}", Fraction(3, 4)),
        ("\\boxed{x = {{-5}}}", -5),
        ("\\boxed{1{,}250}", 1250),
        ("\\boxed{\\text{12 apples}}", 12),
        ("\\boxed{12\\text{ m}^{2}}", 12),
        ("\\boxed{\\$3.50}", Fraction(7, 2)),
        ("\\boxed{50\\%}", 50),
        ("\\boxed{0}", 0),
        ("\\boxed {8}", 8),
        ("\\boxed{4} or \\boxed{5", 4),
        ("\\boxed{}", None),
        ("boxed 5", None),
    ],
)
def test_boxed_is_the_last_closed_box(text, value):
    assert boxed(text) == value


# lm-evaluation-harness 0.4.13, written anew from what its gsm8k task says of itself: two patterns, the first match of
# one and the last of the other, and what it leaves out before two strings are compared.


def harness(text: str, kind: str) -> str | None:
    pattern, place = {
        "strict": (r"#### (\-?[0-9\.\,]+)", 0),
        "flexible": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    }[kind]
    found = [match.group() if kind == "flexible" else match.group(1) for match in re.finditer(pattern, text)]
    if not found:
        return None
    return re.sub(r",|\$|(?s:.*#### )|\.$", "", found[place])


def harness_value(text: str, kind: str) -> Fraction | None:
    found = harness(text, kind)
    return Fraction(found) if found and re.fullmatch(r"-?\d*\.?\d+", found) else None  # "7." is not the string "7"


SAME = (
    "It is 5.\n#### 5",
    "#### 1,234",
    "#### -12.5",
    "#### 0",
    "a total of $1,200.",
    "3 and then 44",
    "nothing",
    "#### 3\nQuestion: x\n#### 4",
    "she has -7",
    "costs $12.50, he said",
)
# Text, which of the two, what the harness reads, what is read here.
DIFFERENT = (
    ("####12", "strict", None, 12),
    ("#### $5", "strict", None, 5),
    ("#### +5", "strict", None, 5),
    ("#### \u22125", "strict", None, -5),
    ("#### 150 000", "strict", 150, 150000),
    ("#### 1/2", "strict", 1, Fraction(1, 2)),
    ("150 000", "flexible", 0, 150000),
    ("it is 1/2", "flexible", 2, Fraction(1, 2)),
    ("it is 1 1/2", "flexible", 2, Fraction(3, 2)),
    ("so 10-3", "flexible", -3, 3),
    ("it is 7..", "flexible", None, 7),
    ("it is 7 $.", "flexible", None, 7),
)


@pytest.mark.parametrize("kind, read", [("strict", strict), ("flexible", flexible)])
@pytest.mark.parametrize("text", SAME)
def test_the_same_as_the_harness(text, kind, read):
    assert read(text) == harness_value(text, kind)


@pytest.mark.parametrize("text, kind, theirs, ours", DIFFERENT)
def test_where_the_harness_reads_something_else(text, kind, theirs, ours):
    assert harness_value(text, kind) == theirs != ours
    assert {"strict": strict, "flexible": flexible}[kind](text) == ours


def test_the_harness_compares_strings_and_this_values():
    assert harness("#### 3.0", "strict") != harness("#### 3", "strict")
    assert strict("#### 3.0") == strict("#### 3")


@pytest.mark.skipif(not TRAIN.exists(), reason="the training file is not there")
def test_every_answer_of_the_training_file():
    answers = [json.loads(line)["answer"] for line in TRAIN.read_text().splitlines()]
    assert len(answers) == 7473
    for answer in answers:
        wanted = Fraction(answer.split("#### ")[1].replace(",", ""))
        assert strict(answer) == flexible(answer) == wanted, answer
        assert harness_value(answer, "strict") == wanted, answer
        assert boxed(f"\\boxed{{{answer.split('#### ')[1].strip()}}}") == wanted, answer
