"""What is read without sympy, anywhere in a text, is what math-verify would have read; and what differs at one point differs to it."""

import random

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.scorers import math_answer, math_reading, sample_point
from tests.pipeline.scorers.answers import PLAIN, by_math_verify, equation, formula, number, odd, text


def disagreements(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, gold answer) of those responses, of all kinds, on which we and math-verify come to different verdicts."""
    r, made, differ = random.Random(seed), 0, []
    while made < count:
        gold = r.choice([*PLAIN, odd, formula])(r)
        said = gold if r.random() < 0.3 else r.choice([*PLAIN, equation, equation, odd, odd, formula])(r)
        response = text(r, said)
        if math_answer.bad_gold(gold) is None:
            made += 1
            if math_answer.score(response, gold).correct != by_math_verify(response, gold):
                differ.append((response, gold))
    return differ


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # sympy, where a percent sign follows a set
def test_a_responses_verdict_is_math_verifys() -> None:
    assert disagreements(150, seed=3) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_responses_verdict_is_math_verifys_on_5000_responses() -> None:
    assert disagreements(5000, seed=4) == []


def test_an_equation_is_read_as_its_right_side_as_math_verify_does() -> None:
    r = random.Random(7)
    read = 0
    for _ in range(120):
        said = equation(r)
        if (plain := math_reading.read_latex(said)) is not None:
            read += 1
            parsed = math_reading.parse_latex(said)
            assert isinstance(parsed, sympy.Eq), said
            assert float(str(sympy.N(parsed.rhs))) == pytest.approx(float(plain.values[0])), said
    assert read > 80


def test_working_without_an_answer_needs_no_sympy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answer, "_verify", lambda *_: pytest.fail("asked math-verify"))
    monkeypatch.setattr(math_reading, "parse_latex", lambda latex: pytest.fail(f"parsed {latex}"))
    working = "Let $x = 3$.\nWe get \\[ \\frac{x + 3}{7} = 22 \\] and\nI am not sure how to go on"
    verdicts = [math_answer.score(working, gold).status for gold in ("22", "3", r"\{1,2\}", "[1,2)", r"\text{east}", "22.0")]
    assert verdicts == ["ok", "wrong", "wrong", "wrong", "wrong", "ok"]


@pytest.mark.parametrize(
    "said",
    [
        "x=y=3",
        "x=1,200",
        "x=",
        "=3",
        "x<=3",
        "i=3",
        "e=3",
        "f(2)=3",
        r"\sin x=3",
        "x=3.",
        "x=3 4",
        r"x \\ y=3",
        "pi=3",
        "x=3=",
        "d=3",
    ],
)
def test_an_equation_in_doubt_is_left_to_math_verify(said: str) -> None:
    assert math_reading.read_latex(said) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_the_same_in_another_form_never_differs(seed: int, by: int) -> None:
    x = math_reading.parse_latex(formula(random.Random(seed)))
    if (at := sample_point.value(x)) is not None and not at.imag:
        assert not sample_point.differs([at.real], sympy.expand(x))
        assert not sample_point.differs([at.real], sympy.Mul(by, x, sympy.Rational(1, by), evaluate=False))
        assert sample_point.differs([at.real + 1 + abs(at.real)], x)  # within a relative tolerance math-verify decides


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_what_differs_at_a_point_is_wrong_to_math_verify(seed: int) -> None:
    r = random.Random(seed)
    gold, said = number(r), r.choice([odd, formula])(r)
    found = math_reading.read(f"\\boxed{{{said}}}")
    plain = math_answer._plain(gold)
    if plain is not None and found.parsed is not None and sample_point.differs(map(float, plain.values), found.parsed):
        assert not by_math_verify(f"\\boxed{{{said}}}", gold)


@pytest.mark.parametrize("wrap", [r"So \boxed{%s}.", "It is $%s$.", r"\[ x = %s \]"])
@pytest.mark.parametrize(
    ("said", "gold", "same"),
    [
        (r"\textbf{5}", "5", True),
        (r"\mathbf{12}", "12", True),
        (r"\text{5}", "5", True),
        (r"\mathrm{-1}", "-1", True),
        (r"\mathbf{5}", "5", True),
        (r"\mathbf{1}2", "12", None),
        (r"\mathbf{0.5}", "0.5", None),
        (r"\textbf{1/2}", "0.5", None),
        (r"\text{6}", "5", False),
        (r"\text{5 cm}", "5", None),
        ("x_{1}", "1", False),
        ("x", "1", False),
    ],
)
def test_a_number_set_as_text_or_in_bold_is_math_verifys_to_compare(
    wrap: str, said: str, gold: str, same: bool | None
) -> None:
    """math-verify reads it as a letter of that name, and finds it equal to the number."""
    text = wrap % said
    found = math_answer.score(text, gold).correct
    assert found == by_math_verify(text, gold)
    assert same is None or found == same


@pytest.mark.parametrize(
    "said",
    [
        r"10^{10^{10}}",
        "9^{9^{9^{9}}}",
        r"\sin 3",
        r"50\%",
        r"\sqrt{x}-10^{15}+10^{15}",
        r"\frac{1}{x-x}",
        "(-8)^{1/3}",
        "10!",
    ],
)
def test_no_value_is_claimed_where_floats_cannot_hold_it(said: str) -> None:
    assert sample_point.value(math_reading.parse_latex(said)) is None
