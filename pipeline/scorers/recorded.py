"""Verdicts that came with recorded traces (engine `replay`), where the recipe takes them instead of its verifier's."""

import json

from pipeline.scorers.base import Verdict, judged

VERSION = 0


def columns(sampling: str) -> set[str]:
    """Under which columns something was recorded."""
    return set(json.loads(sampling).get("recorded", {}))


def verdict(sampling: str, column: str) -> Verdict | None:
    """What was recorded under `column`: true, or a number from 1 on, is right. None if nothing was."""
    value = json.loads(sampling).get("recorded", {}).get(column)
    return None if value is None else judged(value >= 1, None, reward=float(value))
