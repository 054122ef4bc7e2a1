"""Equality of strings. With `extract`, of the last match's group; without it, of the whole text."""

import re

from pipeline.scorers.base import Verdict, gold_bad, judged, unparseable

VERSION = 1


def bad_gold(answer: str) -> str | None:
    return None if answer.strip() else "the gold answer is empty"


def score(text: str, answer: str, *, extract: str | None = None) -> Verdict:
    if reason := bad_gold(answer):
        return gold_bad(reason)
    found: str | None = text
    if extract is not None:
        found = None
        for match in re.finditer(extract, text):
            found = match.group(1)  # None where the group is optional and took no part
        if found is None:
            return unparseable("nothing matches the extract pattern")
    elif not text.strip():
        return unparseable("the text is empty")
    return judged(found.strip() == answer.strip(), found.strip())
