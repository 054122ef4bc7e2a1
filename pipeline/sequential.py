"""When a group of rollouts need not be drawn to its end: the chance that the full group would grade Easy, or Hard.

One idea: successes of the draws still to come follow a beta-binomial law. Its prior is the round's own: the beta law that makes the
first draws of all prompts likeliest (difficulty is U-shaped more often than not, and a flat prior would never be sure). What
earlier rounds saw of a prompt counts as evidence too, each round back for `memory` of what it would count for now, since the policy
has moved. A group stops once one of the two chances reaches `confidence`. Numbers in, numbers out: no table, no recipe.
"""

from collections.abc import Mapping
from math import exp, lgamma

import numpy as np

MEANS = np.linspace(0.02, 0.98, 49)
WEIGHTS = np.geomspace(0.05, 50.0, 61)  # draws that the prior is worth


def fit_prior(counts: Mapping[tuple[int, int], int]) -> tuple[float, float]:
    """(a, b) of the beta law under which counts are likeliest: prompts by (successes, draws). Searched on a grid; (1, 1) of nothing."""
    if not counts:
        return 1.0, 1.0
    best, found = -np.inf, (1.0, 1.0)
    for weight in WEIGHTS:
        for mean in MEANS:
            a, b = mean * weight, (1 - mean) * weight
            likelihood = sum(prompts * _log_beta_ratio(a, b, s, n - s) for (s, n), prompts in counts.items())
            if likelihood > best:
                best, found = likelihood, (float(a), float(b))
    return found


def chance(a: float, b: float, draws: int, low: int, high: int) -> float:
    """P(low <= successes <= high) in `draws` further draws, when the success rate is Beta(a, b)."""
    return float(
        sum(
            exp(lgamma(draws + 1) - lgamma(s + 1) - lgamma(draws - s + 1) + _log_beta_ratio(a, b, s, draws - s))
            for s in range(max(low, 0), min(high, draws) + 1)
        )
    )


def _log_beta_ratio(a: float, b: float, successes: int, failures: int) -> float:
    """log B(a + s, b + f) / B(a, b)."""
    return (
        lgamma(a + successes) - lgamma(a) + lgamma(b + failures) - lgamma(b)
        + lgamma(a + b) - lgamma(a + b + successes + failures)
    )  # fmt: skip
