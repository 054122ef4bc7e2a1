"""The teachers of the two study worlds, and the notation that one of them adds to the tiny world's sums.

    first      :11+82:93>93    the expression again with its first two terms merged, `:` before each line
    marked     !11+82!93>93    the same steps, `!` before each line
    equals     =11+82=93>93    the same steps, `=` before each line
    last       =5+88=39>39     the last two terms merged instead, `=` before each line

A term followed by `-` stands three times in the sum: `38-+5` is 83 + 83 + 83 + 5. The teachers of such problems write it
out first: `:38+38+38+5`, and go on as with any sum. No base policy of that world has ever seen the sign.

Everything here maps (problem, rng) to text, as the engine `program` asks for; nothing draws from the rng.
"""

import random
import re

from pipeline import tiny

THRICE = "-"
_THRICE = re.compile(r"([0-9]+)-(?=[+]|$)")


def expanded(problem: str) -> str:
    """The sum that a problem stands for: `38-+5` gives `38+38+38+5`."""
    return _THRICE.sub(r"\1+\1+\1", problem)


def gold(problem: str) -> str:
    """The right answer, such terms counted three times."""
    return tiny.gold(expanded(problem))


def first(problem: str, rng: random.Random) -> str:
    return _lines(problem, ":", 0)


def marked(problem: str, rng: random.Random) -> str:
    return _lines(problem, "!", 0)


def equals(problem: str, rng: random.Random) -> str:
    return _lines(problem, "=", 0)


def last(problem: str, rng: random.Random) -> str:
    return _lines(problem, "=", -2)


TEACHERS = {"first": first, "marked": marked, "equals": equals, "last": last}


def _lines(problem: str, mark: str, merge: int) -> str:
    """One line for each merge of two neighbours, at the front (0) or at the end (-2), and the answer."""
    whole = expanded(problem)
    values, text = tiny.terms(whole), ""
    if whole != problem:
        text = mark + whole
    while len(values) > 1:
        at = merge % len(values)
        values = [*values[:at], values[at] + values[at + 1], *values[at + 2 :]]
        text += mark + tiny.spell(values)
    return f"{text}>{tiny.write(values[0])}"
