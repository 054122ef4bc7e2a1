"""Multiple choice: the last letter that the text settles on, against the gold letter.

An explicit statement (\\boxed{B}, <answer>B</answer>, "ANSWER: B", "the answer is (B)") outranks a
letter that merely stands in brackets, and the last one of its kind counts. Digits are read as
choices only where the gold is a digit, so "the answer is 2" is no choice in a question with
letters. A text naming no choice is unparseable, never a guess.
"""

import re

from pipeline.scorers.base import Verdict, gold_bad, judged, unparseable

VERSION = 1
TAIL_CHARS = 20_000

# A bare letter must not run on into a word, and "A" and "I" are words themselves: "the answer is A good guess".
_REASON = r"(?:because|since|as|which|for|and|with)\b"
_ENDS = rf"(?![\w'\u2019])(?!(?<=[AIai])\s+(?!{_REASON})[a-z])"
_OPEN = r"[\s*_\"'`$]*(?:\\text(?:bf)?\{{|\\mathrm\{{|\\mathbf\{{)?[(\[]?\s*"
_LEAD = r"(?:answer|choice|option)\b[\s*_]*(?:is\b|:|=)"

_EXPLICIT = (
    r"\\boxed\{{" + _OPEN + r"(?P<a>{any})\s*[)\].:]?[^\w]*\}}" r"|<answer>" + _OPEN +
    r"(?P<b>{any})\s*[)\].:]?[^\w<]*</answer>" r"|(?i:" + _LEAD + r")[\s*_]*:?" + _OPEN +
    r"(?:(?i:option|choice)\s+)?[(\[]?(?P<c>{bare})" + _ENDS + r"|(?i:" + _LEAD +
    r")[\s*_]*:?[\s*_]*\((?P<d>{any})\)"
)  # fmt: skip
_BRACKETED = r"(?<![\w\\])\((?P<a>{any})\)|^[\s*_]*(?P<b>{any})[).]?[\s*_]*$"


def _compiled(pattern: str, *, digits: bool) -> re.Pattern[str]:
    # Lower-case letters count only inside delimiters: "the answer is a prime" names no choice.
    any_, bare = ("[1-9]", "[1-9]") if digits else ("[A-Za-z]", "[A-Z]")
    return re.compile(pattern.format(any=any_, bare=bare), re.MULTILINE)


_PATTERNS = {digits: [_compiled(pattern, digits=digits) for pattern in (_EXPLICIT, _BRACKETED)] for digits in (False, True)}


def bad_gold(answer: str) -> str | None:
    if not answer.strip():
        return "the gold answer is empty"
    if _gold(answer) is None:
        return f"the gold answer is neither a letter A-Z nor a digit 1-9: {answer[:60]!r}"
    return None


def score(text: str, answer: str) -> Verdict:
    gold = _gold(answer)
    if gold is None:
        return gold_bad(bad_gold(answer) or "the gold answer is no choice")
    tail = text[-TAIL_CHARS:]
    for use_digits in (False, True) if _is_digit(answer) else (False,):
        for pattern in _PATTERNS[use_digits]:
            if matches := list(pattern.finditer(tail)):
                found = next(group for group in matches[-1].groups() if group is not None)
                return judged(letter(found) == gold, found)
    return unparseable("the text names no choice")


def _bare(answer: str) -> str:
    return answer.strip().strip("().: ")


def _is_digit(answer: str) -> bool:
    return _bare(answer) in set("123456789")


def _gold(answer: str) -> str | None:
    bare = _bare(answer)
    if len(bare) != 1 or not (bare.isascii() and bare.isalnum()) or bare == "0":
        return None
    return letter(bare)


def letter(choice: str) -> str:
    """A choice as its upper-case letter; 1 is A."""
    return chr(ord("A") + int(choice) - 1) if choice.isdigit() else choice.upper()
