"""What math-verify takes for a text's answer, read no further than a verdict needs.

math-verify finds candidates with regular expressions, the most explicit kind first ("final answer is", a box, "answer", any
formula), normalises one and parses it (milliseconds), until one can be parsed. This is that same search on its own regular
expressions and its own normalisation. But what is plain (plain_math), or an equation with a plain right side, is not parsed; and
what has been parsed is remembered. Left out: its timers, the pool has them; percent signs and several formulas joined by commas
go to its own code as they are.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

from pipeline.scorers import plain_math
from pipeline.scorers.plain_math import Plain


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer: plain or parsed, or neither if nothing could be parsed. `first` is the first candidate's string, math-verify's
    second choice; `latex` is what was read, None where math-verify's own code did it."""

    first: str | None
    latex: str | None = None
    plain: Plain | None = None
    parsed: Any = None

    @property
    def says_something(self) -> bool:
        return self.plain is not None or self.parsed is not None


def read(text: str) -> Reading:
    """The first candidate that says something."""
    first = None
    for match, target in _candidates(text):
        reading = _read_match(match, target)
        first = first or reading.first
        if reading.says_something:
            return Reading(first, reading.latex, reading.plain, reading.parsed)
    return Reading(first)


def _candidates(text: str) -> Iterator[tuple[re.Match[str], Any]]:
    for patterns in _patterns():
        found = [(match, target) for pattern, target in patterns for match in pattern.finditer(text)]
        found.sort(key=lambda each: (each[0].end(), -each[0].start()), reverse=True)
        yield from found


def _read_match(match: re.Match[str], target: Any) -> Reading:
    from math_verify.parser import LatexExtractionConfig, extract_expr, extract_latex

    groups = {name: value for name, value in match.groupdict().items() if value}
    if not isinstance(target, LatexExtractionConfig):
        if "percent" in groups or not any(name.startswith(("integer", "decimal")) for name in groups):
            parsed, said = extract_expr(match)
            return Reading(said or None, parsed=parsed)
        parsed, said = extract_expr(match)
        return Reading(said, None, plain_math.read(said), parsed)
    latex = {name: value for name, value in groups.items() if "latex" in name}
    if len(latex) != 1 or any(name.endswith("percent") for name in groups):
        parsed, said = extract_latex(match, target)
        return Reading(said or None, parsed=parsed)
    [(name, said)] = latex.items()
    normalised = _normalised(said, last=name.endswith("latexBoxed"))
    plain = read_latex(normalised)
    return Reading(normalised or None, normalised, plain, None if plain else parse_latex(normalised))


@lru_cache(maxsize=1)
def _patterns() -> list[list[tuple[re.Pattern[str], Any]]]:
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig, get_extraction_regexes

    kinds = get_extraction_regexes([LatexExtractionConfig(), ExprExtractionConfig()])
    every = [(priority, pattern, target) for patterns, target in kinds for pattern, priority in patterns]
    every.sort(key=lambda each: each[0])
    return [[each[1:] for each in group] for _, group in groupby(every, key=lambda each: each[0])]


@lru_cache(maxsize=8192)
def _normalised(latex: str, *, last: bool) -> str:
    from dataclasses import replace

    from math_verify.parser import LatexExtractionConfig, normalize_latex

    config = LatexExtractionConfig().normalization_config
    return normalize_latex(latex, replace(config, boxed="last") if last else config)


@lru_cache(maxsize=8192)
def parse_latex(latex: str) -> Any:
    """math-verify's expression; None if it has none."""
    from math_verify.parser import parse_latex_cached

    try:
        return parse_latex_cached.__wrapped__(latex)  # its own cache holds 20
    except Exception:
        return None


_NUMBER = r"\d{1,9}(?:\.\d{1,9})?"
_LETTER = r"[abckmnpqrstuvwxyz]"
_POWER = r"(?:\^(?:\d|\{\d{1,3}\}))?"
_TERM = rf"-?(?:{_NUMBER}{_POWER}(?:{_LETTER}{_POWER}){{0,2}}|(?:{_LETTER}{_POWER}){{1,3}})"
_SUM = rf"{_TERM}(?:\s*[+-]\s*{_TERM}){{0,8}}"
_PART = rf"(?:{_TERM}|\\frac\{{{_SUM}\}}\{{{_SUM}\}}|\({_SUM}\))"
_LEFT = re.compile(rf"{_PART}(?:\s*(?:[+-]|\\times|\\cdot)\s*{_PART}){{0,8}}")


@lru_cache(maxsize=8192)
def read_latex(latex: str) -> Plain | None:
    """What a normalised formula says if it is plain; of an equation in a few letters, its right side, as math-verify takes it."""
    left, equals, right = latex.rpartition("=")
    if latex.endswith(".") or plain_math.ambiguous(right):
        return None
    plain = plain_math.read(plain_math.normalised(right))
    if plain is None or not equals:
        return plain
    return (
        plain if plain.kind == "number" and "," not in right and len(left) < 200 and _LEFT.fullmatch(left.strip()) else None
    )
