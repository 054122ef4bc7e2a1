"""What a comparison of two methods may claim: a paired test over matched seeds, and Holm's correction over many of them.

One idea: two runs with the same seed, base policy and world differ by the method alone, so the unit is the seed and the datum is
the difference. The p value is exact: under "the method makes no difference" each difference could as well have had the other
sign, so p is the share of all 2^n sign assignments whose mean is at least as far from zero as the one seen (Fisher 1935). The
interval is Student's, whose assumption (differences about normal) is the usual one for so few seeds.

With n seeds no p is below 2^(1 - n): five cannot reach 0.05 whatever they show, six can. Pure functions of numbers; no tables, no
I/O. It leaves out which comparisons make up a family: whoever reports them says so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from pipeline.statistics import t_quantile

EXACT = 15  # seeds up to which all sign assignments are counted
DRAWS = 100_000  # beyond, that many are drawn
ROUNDING = 1e-12  # relative; sums that differ by less are equal


@dataclass(frozen=True)
class PairedTest:
    """The mean of paired differences, its 95 % interval (in the differences' unit), the two-sided p value, and the pairs."""

    mean: float
    ci_low: float
    ci_high: float
    p: float
    n: int


def paired_test(differences: Sequence[float]) -> PairedTest:
    """Tests the mean of per-seed differences (after - before, one a seed) against zero.

    p: exact sign-flip permutation test up to 15 pairs; beyond, of 100,000 drawn flips (seeded, so that the same numbers give the
    same p), counting the one seen. Interval: Student's t; unbounded for a single pair. ValueError for none or a NaN.
    """
    n = len(differences)
    if n == 0 or not all(math.isfinite(d) for d in differences):
        raise ValueError(f"a paired test needs at least one difference, all finite; found {list(differences)[:5]}")
    mean = fmean(differences)
    half = t_quantile(n - 1) * stdev(differences) / math.sqrt(n) if n > 1 else math.inf
    return PairedTest(mean, mean - half, mean + half, _sign_flip(np.asarray(differences, float)), n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values of a family of tests, in the order given (Holm 1979, step-down Bonferroni).

    Calling those at or below 0.05 different is wrong of any of them at most 5 % of the time, whatever their dependence.
    ValueError for a p outside [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"a p value lies in [0, 1]; found {[p for p in p_values if not 0 <= p <= 1][:3]}")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = largest
    return adjusted


def _sign_flip(d_N: np.ndarray) -> float:
    n = len(d_N)
    seen = abs(d_N.sum()) - ROUNDING * np.abs(d_N).sum()
    if n <= EXACT:
        flips_FN = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float(np.mean(np.abs((1 - 2 * flips_FN) @ d_N) >= seen))
    rng = np.random.default_rng(0)
    far = sum(int(np.sum(np.abs((1 - 2 * rng.integers(0, 2, (1000, n))) @ d_N) >= seen)) for _ in range(DRAWS // 1000))
    return (1 + far) / (1 + DRAWS)
