"""Before an engine samples: do its log-probs of a few tokens agree with the trainer's forward of the policy it should have?"""

import math
from collections.abc import Callable, Iterable, Sequence

from pipeline.engines.base import Ask

Reference = Callable[[list[int], list[int], float], list[float]]
"""(prompt_tokens, tokens, temperature) -> log softmax(logits / temperature) of each token: the trainer's forward."""

PROMPTS, TOKENS = 4, 16
LIMITS = {"float32": 2e-3, "float64": 2e-3, "bfloat16": 0.05}  # of the largest difference; the recipe may say another


def prompts_for(asks: Iterable[Ask], context: int) -> list[list[int]]:
    """The longest prompts of the work list that leave room for an answer: a prefix cache keeps only whole blocks of a prompt."""
    fit = {tuple(ask.prompt_tokens or ()) for ask in asks if 0 < len(ask.prompt_tokens or ()) < context}
    return [list(prompt) for prompt in sorted(fit, key=lambda p: (-len(p), p))[:PROMPTS]]


def differences(expected: Sequence[float], found: Sequence[float]) -> list[float]:
    """|expected - found| of each token; infinity where either is NaN."""
    apart = [abs(a - b) for a, b in zip(expected, found, strict=True)]
    return [math.inf if math.isnan(each) else each for each in apart]
