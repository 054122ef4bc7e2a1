"""The teachers of the two study worlds, and the notation that one of them adds to the tiny world's sums.

    first      :11+82:93>93    the expression again with its first two terms merged, `:` before each line
    marked     !11+82!93>93    the same steps, `!` before each line
    equals     =11+82=93>93    the same steps, `=` before each line
    last       =5+88=39>39     the last two terms merged instead, `=` before each line

World `skill` has two signs behind a term. `38-+5` is 83 + 83 + 83 + 5: every base policy learnt that in pretraining. `38!+5` was
83 + 5 there; now it is 83 + 83 + 83 + 5 too. The teachers of such problems write them out first, `:38+38+38+5`, and go on as with any
sum. So the skill is in the policy, and nothing that it samples for the new sign shows it.

Everything here maps (problem, rng) to text, as the engine `program` asks for; nothing draws from the rng.
"""

import random
import re
from collections.abc import Mapping

from pipeline import tiny

OLD, NEW = "-", "!"
TIMES = {OLD: 3, NEW: 3}  # how often a term with the sign stands in the sum
BEFORE = {OLD: 3, NEW: 1}  # in pretraining
_SIGNED = re.compile(f"([0-9]+)([{OLD}{NEW}])(?=[+]|$)")


def expanded(problem: str, times: Mapping[str, int] = TIMES) -> str:
    """The sum that a problem stands for: `38-+5` gives `38+38+38+5`."""
    return _SIGNED.sub(lambda found: "+".join([found[1]] * times[found[2]]), problem)


def gold(problem: str) -> str:
    """The right answer, terms with a sign counted as often as they stand."""
    return tiny.gold(expanded(problem))


def first(problem: str, rng: random.Random, times: Mapping[str, int] = TIMES) -> str:
    return _lines(problem, ":", 0, times)


def marked(problem: str, rng: random.Random, times: Mapping[str, int] = TIMES) -> str:
    return _lines(problem, "!", 0, times)


def equals(problem: str, rng: random.Random, times: Mapping[str, int] = TIMES) -> str:
    return _lines(problem, "=", 0, times)


def last(problem: str, rng: random.Random, times: Mapping[str, int] = TIMES) -> str:
    return _lines(problem, "=", -2, times)


TEACHERS = {"first": first, "marked": marked, "equals": equals, "last": last}


def _lines(problem: str, mark: str, merge: int, times: Mapping[str, int]) -> str:
    """One line for each merge of two neighbours, at the front (0) or at the end (-2), and the answer."""
    whole = expanded(problem, times)
    values, text = tiny.terms(whole), ""
    if whole != problem:
        text = mark + whole
    while len(values) > 1:
        at = merge % len(values)
        values = [*values[:at], values[at] + values[at + 1], *values[at + 2 :]]
        text += mark + tiny.spell(values)
    return f"{text}>{tiny.write(values[0])}"
