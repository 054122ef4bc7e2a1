"""The tiny world: sums that a 0.1M-parameter policy can learn, and four programs that teach it.

One idea: every text is written over one small alphabet with one token a character, so that a whole post-training run
(teachers, rollouts, verdicts, training) is real in every part and still fits in minutes on a laptop's CPU.

    prompt     8+46         operands are written little-endian: 46 stands for sixty-four, so no carry looks ahead
    rendered   ^8+46=       by the policy's chat template; `^` opens a text, `=` asks
    response   8+46=27>27   steps in a teacher's style, `>`, the answer (seventy-two); the pipeline adds the EOS `.`
    verdict    right iff the text matches ANSWER, group 1 equals the gold and the generation ended in EOS

It leaves out the policy (data/tiny_policy, made by data/make_tiny_policy.py), tokenisation and scoring: this file knows text
only, needs nothing past the standard library, and draws nothing but from the `random.Random` that it is given.
"""

import random
import re
from collections.abc import Callable, Mapping

PAD, BOS, EOS = "_", "^", "."
ALPHABET = PAD + BOS + EOS + "0123456789+-=>:!"  # one token a character; a token's id is its place here
ANSWER = r"^[^>]*>([0-9]+)$"  # exactly one `>`, and nothing but the answer after it

TERM_WEIGHTS: Mapping[int, float] = {2: 3.5, 3: 1, 4: 1.5, 5: 1.5, 6: 1.25, 7: 1.25}  # the train mix, by number of terms
ONE_DIGIT = 0.2  # share of operands below ten
SUITE = 1000  # problems in one of the large eval sets
SLIP, RETRACT = 0.1, 0.35  # the noisy teacher, per step: never noticed, noticed and mended

_TERM = re.compile(r"[+-]?[0-9]+")


# --- numbers ---------------------------------------------------------------------------------------------------------


def write(value: int) -> str:
    """A number as the tiny world spells it: least significant digit first, sign in front."""
    return ("-" if value < 0 else "") + str(abs(value))[::-1]


def read(text: str) -> int:
    """The inverse of `write`; a leading `+` is allowed, as terms carry one."""
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    return sign * int(digits[::-1])


def terms(problem: str) -> list[int]:
    """The signed terms of a problem: `8+46` gives [8, 64], `31-5` gives [13, -5]."""
    found = _TERM.findall(problem)
    if not found or "".join(found) != problem:
        raise ValueError(f"not a problem of the tiny world: {problem!r} (expected numbers joined by + or -, like 8+46)")
    return [read(term) for term in found]


def gold(problem: str) -> str:
    """The right answer, spelt as a response must spell it."""
    return write(sum(terms(problem)))


def is_right(problem: str, text: str) -> bool:
    """The verdict on a finished response without its EOS."""
    match = re.match(ANSWER, text)
    return match is not None and match.group(1) == gold(problem)


# --- problems --------------------------------------------------------------------------------------------------------


def spell(values: list[int]) -> str:
    """The problem whose signed terms are `values`."""
    return "".join(("+" if i and value >= 0 else "") + write(value) for i, value in enumerate(values))


def sum_problem(rng: random.Random, weights: Mapping[int, float] = TERM_WEIGHTS) -> str:
    """In distribution: a sum of n terms, n by `weights`; a term is 1-9 one time in five, else 1-99."""
    (n,) = rng.choices(list(weights), list(weights.values()))
    return spell([rng.randint(1, 9) if rng.random() < ONE_DIGIT else rng.randint(1, 99) for _ in range(n)])


def subtraction_problem(rng: random.Random) -> str:
    """Out of distribution by operation: two or three terms, at least one subtracted, no prefix below zero.

    The base policy saw such problems and post-training has none, so this measures what post-training forgets.
    """
    while True:
        values = [rng.randint(1, 99)]
        values += [rng.choice((-1, 1)) * rng.randint(1, 99) for _ in range(rng.choice((1, 1, 2)))]
        prefixes = [sum(values[: i + 1]) for i in range(len(values))]
        if min(values) < 0 <= min(prefixes):
            return spell(values)


def shift_problem(rng: random.Random) -> str:
    """Out of distribution by operands: only digits (4-7 terms), only 60-99 (3-6), or only multiples of ten (3-6)."""
    kind = rng.randrange(3)
    if kind == 0:
        values = [rng.randint(1, 9) for _ in range(rng.randint(4, 7))]
    elif kind == 1:
        values = [rng.randint(60, 99) for _ in range(rng.randint(3, 6))]
    else:
        values = [10 * rng.randint(1, 9) for _ in range(rng.randint(3, 6))]
    return spell(values)


PROBLEMS: dict[str, Callable[[random.Random], str]] = {
    "id": sum_problem,
    "sub": subtraction_problem,
    "shift": shift_problem,
}


def distinct(make: Callable[[random.Random], str], count: int, rng: random.Random, taken: set[str]) -> list[str]:
    """`count` problems that are new to `taken`, which grows by them: splits made with one `taken` cannot overlap."""
    problems: list[str] = []
    while len(problems) < count:
        problem = make(rng)
        if problem not in taken:
            taken.add(problem)
            problems.append(problem)
    return problems


def suite(kind: str, taken: set[str], count: int = SUITE) -> list[str]:
    """An eval set of one kind (id, sub or shift), seeded, of problems that are new to `taken`, which grows by them.

    data/make_tiny_suites.py passes what pretraining and data/tiny hold: what is drawn and known already is drawn again.
    """
    return distinct(PROBLEMS[kind], count, random.Random(f"suite/{kind}"), taken)


# --- teachers --------------------------------------------------------------------------------------------------------
#
# A teacher maps (problem, rng) to a response without EOS. All but the noisy one ignore the rng and are always right.


def left(problem: str, rng: random.Random) -> str:
    """Running total from the left: `5+6+82+73` gives `5+6=11+82=93+73=67>67`."""
    return _running(terms(problem))


def right(problem: str, rng: random.Random) -> str:
    """Running total from the right: `5+6+82+73` gives `73+82=56+6=17+5=67>67`."""
    return _running(terms(problem)[::-1])


def rewrite(problem: str, rng: random.Random) -> str:
    """The whole expression again with its first two terms merged: `5+6+82` gives `:11+82:93>93`."""
    values = terms(problem)
    text = ""
    while len(values) > 1:
        values = [values[0] + values[1], *values[2:]]
        text += ":" + spell(values)
    return f"{text}>{write(values[0])}"


def noisy(problem: str, rng: random.Random, slip: float = SLIP, retract: float = RETRACT) -> str:
    """`left` by an unsteady hand: `59+76=061!261>261` notices its error, and now and then one slips through.

    A slip is carried on as if it were right, so the final answer is wrong: traces have to be verified before they teach.
    """
    total, *rest = terms(problem)
    text = write(total)
    for value in rest:
        total += value
        text += _signed(value) + "="
        if rng.random() < retract:
            text += write(_misread(total, rng)) + "!"
        if rng.random() < slip:
            total = _misread(total, rng)
        text += write(total)
    return f"{text}>{write(total)}"


TEACHERS: dict[str, Callable[[str, random.Random], str]] = {
    "left": left,
    "right": right,
    "rewrite": rewrite,
    "noisy": noisy,
}


def _signed(value: int) -> str:
    return ("+" if value >= 0 else "") + write(value)


def _running(values: list[int]) -> str:
    total, *rest = values
    text = write(total)
    for value in rest:
        total += value
        text += f"{_signed(value)}={write(total)}"
    return f"{text}>{write(total)}"


def _misread(value: int, rng: random.Random) -> int:
    """A near miss: one off, ten off (a lost carry), or another unit digit; never `value`, never below zero for a sum."""
    while True:
        wrong = value + rng.choice((-10, -1, 1, 10, rng.randint(-9, 9)))
        if wrong != value and (wrong >= 0 or value < 0):
            return wrong
