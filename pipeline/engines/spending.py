"""What a teacher behind a server has used up, held against its budget.

One idea: the server's own `usage` is kept in the rows that it paid for (`sampling`), so a stage that was cut off counts on
from where it was. Left out: replies that gave no row count in the run that saw them, not in the next one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.store import read_parts
from schemas.recipe import Budget


@dataclass(frozen=True)
class Usage:
    """Tokens of some requests, as the server counts them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens)


def stored_usage(paths: Sequence[Path]) -> Usage:
    """What the rows in these parts of `traces` used up."""
    total = Usage()
    for path in paths:
        for text in read_parts([path], "traces", ["sampling"]).column("sampling").to_pylist():
            if usage := json.loads(text).get("usage"):
                total += Usage(**usage)
    return total


class Meter:
    """Counts usage; `refusal` says why no further request may begin, or is empty."""

    def __init__(self, budget: Budget | None, spent: Usage) -> None:
        self._budget, self._spent = budget, spent
        self.blind = False  # there is a budget, and a reply did not say what it used

    def add(self, usage: Usage | None) -> None:
        if usage is None:
            self.blind = self._budget is not None
        else:
            self._spent += usage

    @property
    def refusal(self) -> str:
        budget, used = self._budget, self._spent.completion_tokens
        if budget is None:
            return ""
        if budget.tokens is not None and used >= budget.tokens:
            return f"budget.tokens = {budget.tokens} is used up ({used} completion tokens so far)"
        if budget.cost is not None and (cost := self._cost(budget)) >= budget.cost:
            return f"budget.cost = {budget.cost:g} is used up ({cost:.4g} so far)"
        return ""

    @property
    def told(self) -> str:
        """What has been used up, in words; empty if nothing is known."""
        if self._spent == Usage():
            return ""
        told = f"{self._spent.prompt_tokens} prompt and {self._spent.completion_tokens} completion tokens"
        return told + (f", cost {self._cost(self._budget):.4g}" if self._budget and self._budget.cost is not None else "")

    def _cost(self, budget: Budget) -> float:
        prices = (budget.input_price or 0.0, budget.output_price or 0.0)
        return (self._spent.prompt_tokens * prices[0] + self._spent.completion_tokens * prices[1]) / 1e6
