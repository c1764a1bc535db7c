"""Answers in generated text: where they stand, and what number they are.

Numbers are compared as values, exactly, as fractions: 3.0 is 3, 1/2 is 0.5, 150 000 is 150,000. lm-evaluation-harness
0.4.13 compares strings and reads other numbers in places; `tests/evaluation/tasks/test_answers.py` names where.
"""

import re
from collections.abc import Callable
from fractions import Fraction

# Digits in groups of three behind commas or blanks, or as they come; then decimals.
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:[ \u00a0\u202f]\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.\d+)?|\.\d+)"
_MINUS = "-\u2212"
_CURRENCY = r"[$\u20ac\u00a3\u00a5]"
# What a subtraction stands behind.
_CLOSING = ")]}%$\u20ac\u00a3\u00a5"
_NUMBER = re.compile(
    rf"(?P<sign>[-+\u2212]\s?)?(?:{_CURRENCY}\s?)?(?P<inner>[-+\u2212])?"
    rf"(?P<first>{_DECIMAL})(?:(?P<mixed>\s\d+)?\s?/\s?(?P<second>\d+)(?![\d.]|\s?/))?"
)
_MARK = "####"


def numbers(text: str) -> list[Fraction]:
    """All numbers of a text in order; units, currencies and percent signs are left out: 25% is 25."""
    text = _plain(text)
    return [_value(found, text[: found.start()]) for found in _NUMBER.finditer(text)]


def _value(found: re.Match, before: str) -> Fraction:
    """A number; "10 - 3" holds 10 and 3, "= -3" holds -3."""
    value = Fraction(re.sub(r"[,\s]", "", found["first"]))
    if found["second"] is not None and int(found["second"]):  # "1 1/2", "3/4"; nothing is divided by zero
        mixed = found["mixed"]
        value = value + Fraction(int(mixed), int(found["second"])) if mixed else value / int(found["second"])
    sign, inner = found["sign"] or "", found["inner"] or ""
    signs = sign.strip() + inner if _binds(before, spaced=sign != sign.strip()) else inner if sign else ""
    return -value if signs and set(signs) <= set(_MINUS) else value


def _binds(before: str, *, spaced: bool) -> bool:
    """Whether a sign belongs to the number behind it; if not, it is a subtraction, a dash or a hyphen."""
    last = before.rstrip(" \t")[-1:]
    if last.isdigit() or (last and last in _CLOSING):
        return False
    apart = last != before[-1:]
    return (apart and not spaced) if last.isalpha() else (apart or last != ".")


def _plain(text: str) -> str:
    """LaTeX as text: fractions with a slash, no commands, groups of digits with commas."""
    text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
    text = re.sub(r"\\[,!;: ]", "", text)
    text = re.sub(r"(\d)\s*\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1 \2/\3", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\[dt]?frac\s*(\d)\s*(\d)", r"\1/\2", text)
    return re.sub(r"\\[a-zA-Z]+", " ", text)


def strict(text: str) -> Fraction | None:
    """The number behind the first "####", on the same line; None: there is none. A model that goes on to recite its
    examples is not scored on their answers.
    """
    _, mark, rest = text.partition(_MARK)
    found = numbers(rest.lstrip("#").partition("\n")[0]) if mark else []
    return found[0] if found else None


def flexible(text: str) -> Fraction | None:
    """The last number of a text; None: there is none."""
    found = numbers(text)
    return found[-1] if found else None


def boxed(text: str) -> Fraction | None:
    """The last number of the last \\boxed{...}, braces balanced; None: there is none."""
    for start in reversed([found.end() for found in re.finditer(r"\\f?boxed\s*\{", text)]):
        content = _balanced(text[start:])
        if content is not None:
            return flexible(re.sub(r"\\text(?:bf|rm)?\s*\{[^{}]*\}(?:\s*\^\{?\d+\}?)?", _digits_alone, content))
    return None


def _digits_alone(found: re.Match) -> str:
    """\\text{...} holds the unit, unless it holds the number."""
    after, before = found.string[found.end() :], found.string[: found.start()]
    return " " if re.search(r"\d", before + after) else found[0].partition("{")[2].partition("}")[0]


def _balanced(text: str) -> str | None:
    """What stands before the brace that closes one opened already; None: it never closes."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return text[:place]
    return None


# Name -> where an answer is looked for.
EXTRACTIONS: dict[str, Callable[[str], Fraction | None]] = {"strict": strict, "flexible": flexible, "boxed": boxed}
