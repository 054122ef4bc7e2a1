"""From a verifier's configuration to its scorer: one place that knows all of them."""

import time
from collections.abc import Hashable
from dataclasses import replace
from typing import Any, assert_never

from pipeline.scorers import choice, exact, gym, judge, math_answer, user
from pipeline.scorers.base import Item, Verdict, error, unparseable
from schemas.scorers import (
    ChoiceScorer,
    ExactScorer,
    GymScorer,
    JudgeScorer,
    MathScorer,
    ScorerConfig,
    UserScorer,
)

END_OF_THOUGHT = "</think>"


def version(config: ScorerConfig) -> int:
    """The scorer's version, bumped by hand when its verdicts would change."""
    match config:
        case MathScorer():
            return math_answer.VERSION
        case ExactScorer():
            return exact.VERSION
        case ChoiceScorer():
            return choice.VERSION
        case GymScorer():
            return gym.VERSION
        case UserScorer():
            return user.VERSION
        case JudgeScorer():
            return judge.VERSION
        case _:
            assert_never(config)


def check_gold(verifier_config: ScorerConfig, answer: str, metadata: dict[str, Any] | None) -> str | None:
    """Why this gold answer cannot be judged against, or None. A user's function and a judge are trusted with any."""
    match verifier_config:
        case MathScorer():
            return math_answer.bad_gold(answer)
        case ExactScorer():
            return exact.bad_gold(answer)
        case ChoiceScorer():
            return choice.bad_gold(answer)
        case GymScorer():
            return gym.bad_gold(metadata)
        case UserScorer() | JudgeScorer():
            return None
        case _:
            assert_never(verifier_config)


def score_item(config: ScorerConfig, item: Item) -> Verdict:
    """One verdict, here and now. Whatever a scorer raises becomes status error, except running out of memory."""
    started = time.perf_counter()
    try:
        verdict = _score(config, item)
    except MemoryError:
        raise  # the worker is no longer fit for its other items: the pool replaces it
    except BaseException as reason:
        # SystemExit too: raised by a scorer, it is the scorer's failure and not the worker's end.
        verdict = error(f"{type(reason).__name__}: {reason}"[:500])
    return replace(verdict, elapsed_ms=(time.perf_counter() - started) * 1000)


def vote(config: ScorerConfig, extracted: str | None, correct: bool) -> Hashable:
    """What a sample votes for in maj@n: equal values are equal answers; None if it has none.

    Right answers of a verifier with one gold answer are equal to it, however they are written.
    """
    match config:
        case _ if extracted is None:
            return None
        case MathScorer() | ExactScorer() | ChoiceScorer() if correct:
            return True
        case MathScorer():
            return math_answer.same(extracted)
        case ChoiceScorer():
            return choice.letter(extracted)
        case _:
            return extracted.strip()


def judged_text(config: ScorerConfig, text: str) -> str | None:
    """The part of a text that is judged: all of it, or what follows its reasoning; None if that has no end and must have one."""
    think = getattr(config, "think", None)
    _, end, rest = text.rpartition(END_OF_THOUGHT)
    if think is None or (think == "optional" and not end):
        return text
    return rest if end else None


def _score(config: ScorerConfig, item: Item) -> Verdict:
    text = judged_text(config, item.text)
    if text is None:
        return unparseable(f"no {END_OF_THOUGHT} in the text, and the verifier has think = 'required'")
    match config:
        case MathScorer():
            return math_answer.score(text, item.answer)
        case ExactScorer():
            return exact.score(text, item.answer, extract=config.extract)
        case ChoiceScorer():
            return choice.score(text, item.answer)
        case GymScorer():
            return gym.score(text, item.metadata)
        case UserScorer():
            return user.score(item, config)
        case JudgeScorer():
            raise TypeError("a judge is asked by the stage, many items at a time, and not in a worker")
        case _:
            assert_never(config)
