"""The two records of scoring: what is judged, and the verdict.

A scorer is a pure function from a text and its gold answer to a Verdict. It knows nothing of pools,
time limits or truncation: the pool decides those.
"""

import re
from dataclasses import dataclass
from typing import Any

from schemas.scorers import STATUSES, Status

EXTRACT_CHARS = 500  # an extracted answer is kept for people to read, not for the whole text again


@dataclass(frozen=True, slots=True)
class Item:
    """One text to judge. `prompt` is the last user message, `verifier` a name from the recipe."""

    id: str
    text: str
    answer: str
    verifier: str
    finish_reason: str
    prompt: str
    metadata: dict[str, Any] | None
    source: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found: status ok means correct, every other status means not. `reward` may be partial credit."""

    status: Status
    reward: float = 0.0
    correct: bool = False
    extracted: str | None = None
    detail: str | None = None
    elapsed_ms: float = 0.0

    def __post_init__(self) -> None:
        assert self.status in STATUSES
        assert self.correct == (self.status == "ok")


def judged(correct: bool, extracted: str | None, *, reward: float | None = None) -> Verdict:
    """A verdict that was reached: ok or wrong."""
    if reward is None:
        reward = 1.0 if correct else 0.0
    return Verdict("ok" if correct else "wrong", reward, correct, _short(extracted))


def unparseable(detail: str, extracted: str | None = None) -> Verdict:
    return Verdict("unparseable", extracted=_short(extracted), detail=detail)


def gold_bad(detail: str) -> Verdict:
    return Verdict("gold_bad", detail=detail)


def error(detail: str, extracted: str | None = None) -> Verdict:
    return Verdict("error", extracted=_short(extracted), detail=detail)


_BRACES = re.compile(r"\\boxed\{|\\[{}]|[{}]")


def last_boxed(text: str) -> tuple[int, int, str] | None:
    """Start, end and content of the last \\boxed{...} whose braces close, or None. One pass, whatever the text."""
    last: tuple[int, int] | None = None
    opened: list[int | None] = []  # where each open brace's \boxed starts; None for a plain brace
    for match in _BRACES.finditer(text):
        match match.group():
            case "{":
                opened.append(None)
            case "}":
                start = opened.pop() if opened else None
                if start is not None and (last is None or start > last[0]):
                    last = start, match.end()
            case "\\{" | "\\}":
                pass  # a printed brace
            case _:
                opened.append(match.start())
    return None if last is None else (*last, text[last[0] + len("\\boxed{") : last[1] - 1])


def _short(extracted: str | None) -> str | None:
    if extracted is None or len(extracted) <= EXTRACT_CHARS:
        return extracted
    return extracted[:EXTRACT_CHARS]
