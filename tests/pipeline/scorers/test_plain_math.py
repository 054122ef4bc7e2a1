"""What is decided without sympy is what math-verify decides: thousands of pairs, and the cases that once differed."""

import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.scorers import math_answer
from pipeline.scorers.plain_math import Value, decide, normalised, read
from tests.pipeline.scorers.answers import PLAIN, by_math_verify, small, spaced


def agrees(text: str, gold: str) -> bool:
    """Whether the verdict is the one that math-verify comes to on its own."""
    return math_answer.score(text, gold).correct == by_math_verify(text, gold)


def pairs(count: int, seed: int) -> list[tuple[str, str, bool]]:
    """(gold, found, our decision) of pairs that are decided here."""
    r, made = random.Random(seed), []
    while len(made) < count:
        kind = r.choice(PLAIN)
        gold = kind(r)
        found = gold if r.random() < 0.2 else r.choice([kind, kind, kind, small, r.choice(PLAIN)])(r)
        decision = decide(*(read(normalised(answer)) for answer in (gold, found)))
        if decision is not None:
            made.append((gold, found, decision))
    return made


def differing(made: list[tuple[str, str, bool]]) -> list[tuple[str, str, bool]]:
    return [(g, f, said) for g, f, said in made if by_math_verify(f"\\boxed{{{f}}}", g) != said]


def test_what_is_decided_is_what_math_verify_decides() -> None:
    made = pairs(300, seed=0)
    assert min(Counter(said for *_, said in made).values()) > 60
    assert differing(made) == []


def test_a_space_anywhere_changes_no_verdict() -> None:
    r, quick = random.Random(5), 0
    for _ in range(250):
        kind = r.choice(PLAIN)
        gold = kind(r)
        found = gold if r.random() < 0.4 else r.choice([kind, kind, small])(r)
        gold, found = (spaced(gold, r), found) if r.random() < 0.3 else (gold, spaced(found, r))
        if math_answer.bad_gold(gold) is None:
            text = f"So \\boxed{{{found}}}."
            assert agrees(text, gold), (gold, found)
            quick += math_answer._quick(found, gold) is not None
    assert quick > 80


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_decided_is_what_math_verify_decides_on_5000_pairs() -> None:
    made = pairs(5000, seed=1)
    kinds = Counter((read(normalised(g)).kind, said) for g, _, said in made)  # type: ignore[union-attr]
    assert {kind for kind, _ in kinds} == {"number", "set", "interval", "word"}
    assert min(kinds.values()) > 20
    assert differing(made) == []


@pytest.mark.parametrize("box", ["", " ", "I think so", "?? + !!", r"\sqrt{}"])
def test_where_the_box_says_nothing_math_verify_looks_on(box: str) -> None:
    for gold in ("89", "7"):
        text = f"We get \\[ x = 89 \\] after substitution.\n\n\\boxed{{{box}}}"
        assert agrees(text, gold)


SPACED = [
    ("5.5", "1 1/2"), ("11/2", "1 1/2"), (r"\sqrt{12}", r"\sqrt{1 2}"), (r"\frac{11}{2}", r"\frac{1 1}{2}"), (r"\{12\}", r"\{1 2\}"),
    ("[1 0,20]", "[10,20]"), ("12", "1 2"), ("10100", "10, 100"), ("2,345", "2, 345"), ("1000000", r"1\,000\,000"), ("1 2", "12"),
    (r"\{4\}", r"\\ {4\}"), ("[1,2)", r"[1\\ ,2)"), ("10, 100", "10, 100"), (r"\{1, 2\}", r"\{ 2,\,1 \}"), ("[1, 20)", r"\left[ 1,20 \right)"), ("3 ", " 3"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "found"), SPACED)
def test_spaces_between_digits_are_math_verifys_to_read(gold: str, found: str) -> None:
    """Each was once called the same, or is near one that was."""
    text = f"So \\boxed{{{found}}}."
    assert agrees(text, gold)


@pytest.mark.parametrize(
    "before",
    [r"First \boxed{9}.", r"\boxed{9}. Then ", r"\boxed{3} and so ", r"We have $\boxed{9}$. Thus ", r"First \fbox{9}.", ""],
)
@pytest.mark.parametrize(("gold", "found"), [("0.5", r"\frac{1}{2}"), ("7", "7"), (r"\{1,2\}", r"\{2, 1\}")])
def test_a_box_before_the_last_one_is_math_verifys_to_read(before: str, gold: str, found: str) -> None:
    text = f"{before}\n\nWait, so the answer is \\boxed{{{found}}}."
    assert agrees(text, gold)


@pytest.mark.parametrize(
    ("gold", "found"),
    [
        (r"\text{and}", r"\text{and}"),  # a comma to math-verify
        (r"\text{percent}", r"\text{percent}"),  # a sign of its own
        (r"\text{inf}", r"\text{infinity}"),  # the same to it
        (r"\text{east}", r"\text{seat}"),  # a product of letters, so the same to it
        (r"(1,2)", r"[1,2]"),  # a point, or an interval
        (r"\{1,200\}", r"\{1200\}"),  # a comma of thousands, or two numbers
        (r"(2,1)", r"(1,2)"),
        (r"\{1\}", r"\{1, 1.000001\}"),  # perhaps one element to it
        ("0.333333", r"\frac{1}{3}"),  # equal in six places
        ("1234567890.5", "1234567890.6"),  # too large for six places
        (r"\frac{1}{0}", "1"),
        (r"2\frac{1}{3}", r"\frac{7}{3}"),
        ("x", "x"),
        ("3", r"\{3\}"),
        ("50", r"50\%"),
    ],
)
def test_where_there_is_doubt_nothing_is_decided(gold: str, found: str) -> None:
    assert decide(read(gold), read(found)) is None


@settings(deadline=None)
@given(st.integers(-999, 999), st.integers(0, 9999))
def test_a_root_is_its_own_value_and_square_free(outside: int, inside: int) -> None:
    found = read(rf"{outside}\sqrt{{{inside}}}")
    assert found is not None
    (value,) = found.values
    assert float(value) == pytest.approx(outside * inside**0.5)
    assert all(value.radicand % (n * n) for n in range(2, 100))
    assert (value.coefficient == 0) == (outside * inside == 0)


@given(st.fractions(max_denominator=10**6))
def test_a_fraction_is_exact(value: Fraction) -> None:
    found = read(rf"\frac{{{value.numerator}}}{{{value.denominator}}}")
    if abs(value.numerator) < 10**9:
        assert found is not None
        assert found.values == (Value(value),)
