"""Answers that can be compared without sympy: numbers, fractions, square roots, words, and sets and intervals of numbers.

    number      12   -3.50   1,200   3/4   \\frac{3}{4}   \\sqrt{8}   -2\\sqrt{3}
    set         \\{1,\\frac{1}{2}\\}           interval    [1,2)   (-3,\\sqrt{2}]
    word        \\text{east}

One idea: a value is exact (a fraction times the root of a square-free whole number), so equal is equal; and a decision is
made only where math-verify's own, which rounds to six places, is out of doubt: a test holds the two together on thousands of
pairs. Everything else is None: its decision. Left out: whatever is not in the list, however easy it looks.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

NEAR = 1e-5  # math-verify rounds to six places
LARGE = 1e9  # from here on a float has no six places to compare

_NUMBER = re.compile(r"-?(?:\d{1,12}|[1-9]\d{0,2}(?:,\d{3}){1,3})(?:\.\d{1,12})?")
_RATIO = re.compile(r"(-?)(?:\\frac\{(-?\d{1,9})\}\{(\d{1,9})\}|(\d{1,9})/(\d{1,9}))")
_ROOT = re.compile(r"(-?)(\d{0,6})\\sqrt\{(\d{1,6})\}")
_SET = re.compile(r"\\\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\\\}")
_INTERVAL = re.compile(r"([(\[])(.*)([)\]])")
_WORD = re.compile(r"\\text\{((?![a-z]*(?:and|or|inf|percent))[a-z]{3,20})\}")  # those mean something to math-verify


_SPACE = r"(?:\s|\\[,!;: ])"
_SPACED = re.compile(rf"\\\\|[A-Za-z\d.\\]{_SPACE}+[A-Za-z\d.]|[A-Za-z]{_SPACE}+[{{}}(\[]|\\text\{{{_SPACE}")
_LISTED = re.compile(rf"\d,{_SPACE}+\d")
_BRACKETED = re.compile(r"\s*(?:\\left\s*)?(?:\\\{|[(\[])")
_NOISE = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[,!;: ]|\s+|\\displaystyle(?![a-z])")


@dataclass(frozen=True, slots=True)
class Value:
    """coefficient * sqrt(radicand), the radicand square-free; 1 for a fraction."""

    coefficient: Fraction
    radicand: int = 1

    def __float__(self) -> float:
        return float(self.coefficient) * self.radicand**0.5


@dataclass(frozen=True, slots=True)
class Plain:
    """What an answer says. kind: number, set, interval (its brackets in `mark`) or word (its letters in `mark`)."""

    kind: str
    values: tuple[Value, ...] = ()
    mark: str = ""


def decide(gold: Plain | None, found: Plain | None) -> bool | None:
    """Whether they are the same; None where that is not for us to say."""
    if gold is None or found is None:
        return None
    if gold.kind != found.kind:
        return False if "number" in (gold.kind, found.kind) and not (_one_number(gold) and _one_number(found)) else None
    if gold.kind == "word":
        if gold.mark == found.mark:
            return True
        return None if sorted(gold.mark) == sorted(found.mark) else False  # math-verify reads products of letters
    if gold.kind == "interval" and gold.mark != found.mark:
        return None if "()" in (gold.mark, found.mark) else False  # (1,2) can be a point
    if gold.values == found.values:
        return True
    sides = [[float(value) for value in side.values] for side in (gold, found)]
    if any(abs(value) >= LARGE for side in sides for value in side):
        return None
    if len(sides[0]) != len(sides[1]):  # of a set; elements that are near count as one, perhaps
        return None if any(b - a <= NEAR for side in sides for a, b in pairwise(side)) else False
    return False if max(abs(a - b) for a, b in zip(*sides, strict=True)) > NEAR else None


def ambiguous(answer: str) -> bool:
    """Whether letters or digits would run together that had a space between, as in 1 1/2, a list pass for a number: 2, 345,
    or a line break (two backslashes) for a space."""
    return _SPACED.search(answer) is not None or (_LISTED.search(answer) is not None and not _BRACKETED.match(answer))


def normalised(answer: str) -> str:
    """An answer without spaces, \\left and \\right, and with \\frac as its only fraction: what `read` takes."""
    plain = _NOISE.sub("", answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    return plain.removesuffix(".")


def _one_number(answer: Plain) -> bool:
    """Whether it can be called a number: one is, and so is a set whose elements are near each other."""
    if answer.kind != "set":
        return answer.kind == "number"
    values = [float(value) for value in answer.values]
    return values[-1] - values[0] <= NEAR or values[-1] >= LARGE or values[0] <= -LARGE


@lru_cache(maxsize=8192)
def read(normalised: str) -> Plain | None:
    """A normalised answer; None if it is not plain."""
    if (value := _value(normalised)) is not None:
        return Plain("number", (value,))
    if match := _WORD.fullmatch(normalised):
        return Plain("word", mark=match[1])
    if match := _SET.fullmatch(normalised):
        values = _values(match[1])
        return Plain("set", tuple(sorted(set(values), key=float))) if values else None
    if match := _INTERVAL.fullmatch(normalised):
        values = _values(match[2])
        if values and len(values) == 2 and float(values[0]) < float(values[1]):
            return Plain("interval", values, match[1] + match[3])
    return None


def _values(text: str) -> tuple[Value, ...] | None:
    """Values with commas between; None if one is not plain, or if a comma could be that of thousands."""
    if re.search(r"(?<!\d)\d{1,3},\d{3}(?!\d)", text):
        return None
    values = [_value(part) for part in text.split(",")]
    return None if None in values else tuple(value for value in values if value is not None)


def _value(text: str) -> Value | None:
    if _NUMBER.fullmatch(text):
        return Value(Fraction(text.replace(",", "")))
    if match := _RATIO.fullmatch(text):
        over, under = (int(match[2]), int(match[3])) if match[2] else (int(match[4]), int(match[5]))
        return Value(Fraction(-over if match[1] else over, under)) if under else None
    if match := _ROOT.fullmatch(text):
        outside, inside = _square_free(int(match[3]))
        coefficient = Fraction(int(match[2] or 1) * outside * (-1 if match[1] else 1))
        return Value(coefficient, inside) if coefficient and inside else Value(Fraction(0))
    return None


@lru_cache(maxsize=4096)
def _square_free(n: int) -> tuple[int, int]:
    """(a, b) with n = a^2 b and b square-free; (0, 0) for 0."""
    if n == 0:
        return 0, 0
    outside, factor = 1, 2
    while factor * factor <= n:
        while n % (factor * factor) == 0:
            n //= factor * factor
            outside *= factor
        factor += 1
    return outside, n
