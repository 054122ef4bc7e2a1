"""Answers made to hang, to fill the memory or to break the parser: a verdict for each, within the limit, for one worker at most."""

import time
from typing import Any

import pytest

from pipeline.scorers import Item, VerdictPool
from pipeline.scorers.clean_fork import CleanForkContext
from schemas.scorers import MathScorer

POWERS = [f"x^{{{n}}}" for n in range(40)]
ANSWERS = {
    "tower": "10^{10^{10}}",
    "taller tower": "9^{9^{9^{9}}}",
    "tower that fills the memory": "9^{9^9}",
    "factorial": "(10^9)!",
    "a smaller one": "9999999!",
    "factorial of factorials": "5!!!!!!!!",
    "binomial": r"\binom{10^9}{10^8}",
    "sum": r"\sum_{n=1}^{10^9} \frac{1}{n^3}",
    "product": r"\prod_{n=1}^{10^8} n",
    "integral": r"\int_0^{10} e^{-x^{x}} \sin(x^x) dx",
    "brackets": "(" * 400 + "7" + ")" * 400,
    "braces": "{" * 2000 + "7" + "}" * 2000,
    "fractions": r"\frac{1}{1+" * 60 + "7" + "}" * 60,
    "roots": r"\sqrt{" * 200 + "7" + "}" * 200,
    "300 boxes in each other": r"\boxed{" * 300 + "3" + "}" * 300,
    "300 boxes that do not close": r"\boxed{" * 300,
    "300 boxes": "} ".join(rf"\boxed{{{n}" for n in range(300)),
    "digits": "9" * 19_000,
    "decimals": "0." + "3" * 19_000,
    "digits to the power of digits": "9" * 9_000 + "^{" + "9" * 9_000 + "}",
    "a set of 800": r"\{" + ",".join(f"{n}x" for n in range(800)) + r"\}",
    "a chain of equations": "=".join(f"{n}x" for n in range(200)),
    "a dense polynomial": "(x+y+z+1)^{200}",
    "a matrix": r"\begin{pmatrix}" + r"\\".join("&".join(POWERS[n : n + 20]) for n in range(20)) + r"\end{pmatrix}",
    "only dollars": "$" * 19_000,
}


def item(said: str, gold: str = "7") -> Item:
    return Item(said[:20], said, gold, "math", "stop", "?", None, "made")


def test_each_ends_within_the_limit_for_one_worker_at_most_and_its_neighbours_keep_their_verdicts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[float] = []
    process = CleanForkContext.Process

    def counted(self: CleanForkContext, *args: Any, **kwargs: Any) -> Any:
        started.append(time.monotonic())
        return process(self, *args, **kwargs)

    monkeypatch.setattr(CleanForkContext, "Process", counted)
    items = [each for said in ANSWERS.values() for each in (item(r"\boxed{7}"), item(rf"\boxed{{{said}}}"), item("so $8$"))]
    with VerdictPool({"math": MathScorer()}, workers=2, timeout_s=0.3, memory_mb=256) as pool:
        at_first = len(started)
        statuses = [verdict.status for verdict in pool.score(items)]
    hostile = dict(zip(ANSWERS, statuses[1::3], strict=True))
    assert statuses[0::3] == ["ok"] * len(ANSWERS)
    assert statuses[2::3] == ["wrong"] * len(ANSWERS)
    assert set(hostile.values()) <= {"timeout", "unparseable", "wrong"}, hostile
    timeouts = [name for name, status in hostile.items() if status == "timeout"]
    assert "tower" in timeouts
    assert len(started) - at_first <= len(timeouts)


def test_an_answer_that_fills_the_memory_costs_its_verdict_only() -> None:
    with VerdictPool({"math": MathScorer()}, workers=1, timeout_s=1, memory_mb=64) as pool:
        verdicts = pool.score([item(r"\boxed{7}"), item(r"\boxed{9^{9^9}}"), item(r"\boxed{7}")])
    assert [verdicts[0].status, verdicts[2].status] == ["ok", "ok"]
    assert not verdicts[1].correct
