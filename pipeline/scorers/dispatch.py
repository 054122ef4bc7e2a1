"""From a verifier's configuration to its scorer: one place that knows all of them."""

import time
from dataclasses import replace
from typing import Any, assert_never

from pipeline.scorers import choice, exact, gym, judge, math_answer, user
from pipeline.scorers.base import Item, Verdict, error
from schemas.scorers import (
    ChoiceScorer,
    ExactScorer,
    GymScorer,
    JudgeScorer,
    MathScorer,
    ScorerConfig,
    UserScorer,
)


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


def _score(config: ScorerConfig, item: Item) -> Verdict:
    match config:
        case MathScorer():
            return math_answer.score(item.text, item.answer)
        case ExactScorer():
            return exact.score(item.text, item.answer, extract=config.extract)
        case ChoiceScorer():
            return choice.score(item.text, item.answer)
        case GymScorer():
            return gym.score(item.text, item.metadata)
        case UserScorer():
            return user.score(item, config)
        case JudgeScorer():
            raise TypeError("a judge is asked by the stage, many items at a time, and not in a worker")
        case _:
            assert_never(config)
