"""Mathematical equality with math-verify, and a quick decision before it where both must agree.

math-verify's own timers are off (they use signal.alarm, and a timed-out comparison reads as
"wrong"): the pool limits the time. Gold answers are parsed inside \\boxed{}, because without
delimiters math-verify reads 2\\sqrt{3} as 2. What is left out: words as gold answers are read as
products of letters, so anagrams are equal; use `exact` for words.
"""

import logging
import re
from functools import lru_cache
from typing import Any

from pipeline.scorers import plain_math
from pipeline.scorers.base import Verdict, gold_bad, judged, last_boxed, unparseable

VERSION = 2  # 2: where digits have a space between, there are several boxes or the box says nothing, math-verify reads
TAIL_CHARS = 20_000  # the answer stands at the end; math-verify's patterns slow down on long texts
GOLD_CHARS = 5_000


def bad_gold(answer: str) -> str | None:
    if not answer.strip():
        return "the gold answer is empty"
    if len(answer) > GOLD_CHARS:
        return f"the gold answer has {len(answer)} characters, more than {GOLD_CHARS}"
    if _plain(_unwrapped(answer)) is None and not _parsed_gold(answer):
        return f"math-verify cannot parse the gold answer: {answer[:60]!r}"
    return None


def score(text: str, answer: str) -> Verdict:
    if reason := bad_gold(answer):
        return gold_bad(reason)
    tail = text[-TAIL_CHARS:]
    box = last_boxed(tail)
    if box is None or not _box_stands_alone(tail, box):
        return _verified(tail, answer)
    content = box[2].strip().removesuffix(".")  # math-verify cannot parse \boxed{12.}
    return _quick(content, answer) or _verified_box(content, answer) or _verified(tail, answer)


@lru_cache(maxsize=8192)  # wrong answers are the slow ones, and a prompt's rollouts repeat them
def _verified_box(content: str, answer: str) -> Verdict | None:
    """math-verify's verdict on the box; None where it can read nothing in it and would look on in the text."""
    found = _parsed_box(content)
    return None if all(isinstance(each, str) for each in found) else _compared(found, answer)


@lru_cache(maxsize=8192)
def _parsed_box(content: str) -> list[Any]:
    return _parsed(f"\\boxed{{{content}}}")


def _parsed(tail: str) -> list[Any]:
    parse, _ = _math_verify()
    return parse(tail, parsing_timeout=None, raise_on_error=True)


def _verified(tail: str, answer: str) -> Verdict:
    """math-verify's verdict."""
    return _compared(_parsed(tail), answer)


def _compared(found: list[Any], answer: str) -> Verdict:
    _, verify = _math_verify()
    strings = [each for each in found if isinstance(each, str)]
    extracted = strings[0] if strings else None
    if not found:
        return unparseable("math-verify finds no answer in the text")
    if verify(_parsed_gold(answer), found, timeout_seconds=None, raise_on_error=True):
        return judged(True, extracted)
    if len(strings) == len(found):
        return unparseable("math-verify cannot parse the answer", extracted)
    return judged(False, extracted)


def _quick(content: str, answer: str) -> Verdict | None:
    """The verdict where the box settles it without sympy: the same string, or two plain answers."""
    gold = _unwrapped(answer)
    if not _normalised(content) or _ambiguous(gold) or _ambiguous(content):
        return None
    if _normalised(gold) == _normalised(content):
        return judged(True, content)
    same = plain_math.decide(_plain(gold), _plain(content))
    return None if same is None else judged(same, content)


_AFTER_BOX = re.compile(r"\s*(?:\$\$?|\\\]|\\\))?\s*(?:[.!,;*\n]|$|[A-Za-z](?!ercent|ct\b))")
_BEFORE_BOX = re.compile(r"(?:^|[$:.=\n*]|\\\[|\\\(|[A-Za-z])\s*$")
_JOINED = re.compile(r"\}[\s$)\]\\.]*(?:,?\s*and|,?\s*or|,)[\s$(\[\\]*$")


def warm_up() -> None:
    """Parse and compare, one right and one wrong: the wrong one loads half of sympy."""
    _verified(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")
    _verified(r"\boxed{2\sqrt{3}}", r"3\sqrt{2}")


def _box_stands_alone(tail: str, box: tuple[int, int, str]) -> bool:
    """Whether math-verify, too, would take this box, whole and nothing but it."""
    start, end, _ = box
    before, after = tail[max(0, start - 40) : start], tail[end:]
    return (
        _AFTER_BOX.match(after) is not None
        and _BEFORE_BOX.search(before) is not None
        and _JOINED.search(before) is None
        and "\\boxed" not in tail[:start]  # of several it may take all, as a set
        and "I hope" not in tail[:start]  # "The final answer is 3. I hope it is correct." outranks every box
        and "answer" not in after.lower()
        and not any(mark in after.lstrip(" ").removeprefix("$$").removeprefix("$") for mark in _MATH)
    )


_MATH = ("$", "\\(", "\\[", "\\boxed")

_SPACE = r"(?:\s|\\[,!;: ])"
_SPACED = re.compile(rf"[A-Za-z\d.\\]{_SPACE}+[A-Za-z\d.]|[A-Za-z]{_SPACE}+[{{}}(\[]|\\text\{{{_SPACE}")
_LISTED = re.compile(rf"\d,{_SPACE}+\d")
_BRACKETED = re.compile(r"\s*(?:\\left\s*)?(?:\\\{|[(\[])")
_NOISE = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[,!;: ]|\s+|\\displaystyle(?![a-z])")


def _unwrapped(answer: str) -> str:
    if box := last_boxed(answer):
        return box[2]
    stripped = answer.strip()
    if len(stripped) > 2 and stripped[0] == stripped[-1] == "$" and "$" not in stripped[1:-1]:
        return stripped[1:-1]
    return stripped


def _plain(answer: str) -> plain_math.Plain | None:
    return None if _ambiguous(answer) else plain_math.read(_normalised(answer))


def _ambiguous(answer: str) -> bool:
    """Whether letters or digits would run together that had a space between, as in 1 1/2, or a list pass for a number: 2, 345."""
    return _SPACED.search(answer) is not None or (_LISTED.search(answer) is not None and not _BRACKETED.match(answer))


def _normalised(answer: str) -> str:
    plain = _NOISE.sub("", answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    return plain.removesuffix(".")


@lru_cache(maxsize=4096)  # a prompt's k rollouts share one gold answer
def _parsed_gold(answer: str) -> list[Any]:
    """The gold answer as math-verify's objects; empty if nothing mathematical can be read."""
    parse, _ = _math_verify()
    as_is = "\\boxed" in answer or "$" in _unwrapped(answer)
    stripped = answer.strip().removesuffix(".")
    spellings = [answer] if as_is else [f"\\boxed{{{_unwrapped(stripped)}}}", answer]
    for spelling in spellings:
        parsed = parse(spelling, parsing_timeout=None)
        if any(not isinstance(each, str) for each in parsed):
            return parsed
    return []


@lru_cache(maxsize=1)
def _math_verify() -> tuple[Any, Any]:
    # Here, so that importing the scorers does not load sympy.
    from math_verify import parse, verify

    for name in (
        "math_verify",
        "math_verify.parser",
        "math_verify.grader",
        "latex2sympy2_extended",
    ):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return parse, verify
