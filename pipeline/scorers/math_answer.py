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

from pipeline.scorers import math_reading, plain_math, sample_point
from pipeline.scorers.base import Verdict, gold_bad, judged, last_boxed, unparseable
from pipeline.scorers.math_reading import Reading
from pipeline.scorers.plain_math import Plain

# 2: spaces between digits, several boxes and a box that says nothing are math-verify's to read
# 3: nor are a line break and an fbox ours; 4: nor is a number set as text or in bold
# 5: a gold answer of 6e14 is a number, which math-verify reads as a product of letters
VERSION = 5
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


def same(extracted: str) -> Plain | str:
    """What an extracted answer says, so that equal ones compare equal: its exact value if it is plain, else its normalised text."""
    plain = _plain(extracted)
    return plain_math.normalised(extracted) if plain is None else plain


def score(text: str, answer: str) -> Verdict:
    if reason := bad_gold(answer):
        return gold_bad(reason)
    gold, tail = _powers_of_ten(answer), text[-TAIL_CHARS:]
    box = last_boxed(tail)
    if box is not None and _box_stands_alone(tail, box):
        content = box[2].strip().removesuffix(".")  # math-verify cannot parse \boxed{12.}
        if (quick := _quick(content, answer)) is not None:
            return quick
        if (found := _read_box(content)).says_something:
            return _compared(found, gold)
    return _compared(math_reading.read(tail), gold)


@lru_cache(maxsize=8192)
def _read_box(content: str) -> Reading:
    return math_reading.read(f"\\boxed{{{content}}}")


def _quick(content: str, answer: str) -> Verdict | None:
    """The verdict where the box settles it without a look at the text: the same string, or two plain answers."""
    gold = _unwrapped(answer)
    if not plain_math.normalised(content) or plain_math.ambiguous(gold) or plain_math.ambiguous(content):
        return None
    if plain_math.normalised(gold) == plain_math.normalised(content):
        return judged(True, content)
    same = plain_math.decide(_plain(gold), _plain(content))
    return None if same is None else judged(same, content)


def _compared(found: Reading, answer: str) -> Verdict:
    if found.first is None and not found.says_something:
        return unparseable("math-verify finds no answer in the text")
    # math-verify also compares the first strings; where they are equal and the gold answer is plain, so are the values.
    gold = _plain(_unwrapped(answer))
    same = plain_math.decide(gold, found.plain)
    if same is None and gold is not None and gold.values and found.parsed is not None:
        same = False if sample_point.differs(map(float, gold.values), found.parsed) else None
    if same is None:
        same = _verified(found, answer)
    if same or found.says_something:
        return judged(same, found.first)
    return unparseable("math-verify cannot parse the answer", found.first)


def _verified(found: Reading, answer: str) -> bool:
    """What math-verify says."""
    if found.latex is not None:
        return _verified_latex(found.latex, found.first, answer)
    return _verify([each for each in (found.parsed, found.first) if each is not None], answer)


@lru_cache(maxsize=8192)  # what is equal but not plain, or wrong and slow, comes again among a prompt's rollouts
def _verified_latex(latex: str, first: str | None, answer: str) -> bool:
    return _verify([each for each in (math_reading.parse_latex(latex), first) if each is not None], answer)


def _verify(found: list[Any], answer: str) -> bool:
    _, verify = _math_verify()
    return verify(_parsed_gold(answer), found, timeout_seconds=None, raise_on_error=True)


_AFTER_BOX = re.compile(r"\s*(?:\$\$?|\\\]|\\\))?\s*(?:[.!,;*\n]|$|[A-Za-z](?!ercent|ct\b))")
_BEFORE_BOX = re.compile(r"(?:^|[$:.=\n*]|\\\[|\\\(|[A-Za-z])\s*$")
_JOINED = re.compile(r"\}[\s$)\]\\.]*(?:,?\s*and|,?\s*or|,)[\s$(\[\\]*$")


def warm_up() -> None:
    """Parse and compare, one right and one wrong: the wrong one loads half of sympy."""
    for said, answer in ((r"\sqrt{8}", r"2\sqrt{2}"), (r"2\sqrt{3}", r"3\sqrt{2}")):
        _verified_latex(said, said, answer)


def _box_stands_alone(tail: str, box: tuple[int, int, str]) -> bool:
    """Whether math-verify, too, would take this box, whole and nothing but it."""
    start, end, _ = box
    before, after = tail[max(0, start - 40) : start], tail[end:]
    return (
        _AFTER_BOX.match(after) is not None
        and _BEFORE_BOX.search(before) is not None
        and _JOINED.search(before) is None
        and "\\boxed" not in tail[:start]  # of several it may take all, as a set
        and "\\fbox" not in tail
        and "I hope" not in tail[:start]  # "The final answer is 3. I hope it is correct." outranks every box
        and "answer" not in after.lower()
        and not any(mark in after.lstrip(" ").removeprefix("$$").removeprefix("$") for mark in _MATH)
    )


_MATH = ("$", "\\(", "\\[", "\\boxed")


_E_NOTATION = re.compile(r"([+-]?\d+(?:\.\d*)?)[eE]([+-]?\d{1,3})")


def _powers_of_ten(answer: str) -> str:
    """A gold answer of 6e14 as 6 \\times 10^{14}; any other as it is."""
    match = _E_NOTATION.fullmatch(answer.strip())
    return f"{match[1]} \\times 10^{{{int(match[2])}}}" if match else answer


def _unwrapped(answer: str) -> str:
    if box := last_boxed(answer):
        return box[2]
    stripped = answer.strip()
    if len(stripped) > 2 and stripped[0] == stripped[-1] == "$" and "$" not in stripped[1:-1]:
        return stripped[1:-1]
    return stripped


def _plain(answer: str) -> Plain | None:
    return None if plain_math.ambiguous(answer) else plain_math.read(plain_math.normalised(answer))


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
