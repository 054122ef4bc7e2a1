"""What an evaluation may claim: avg@n, unbiased pass@k, maj@n, and 95 % intervals whose unit is the problem.

One idea: samples of one problem are alike, so they are not so many independent trials. Each problem is one number, and the
interval is the bootstrap's over problems: 10,000 times, as many problems as there are are drawn with replacement, and the middle
of the 10,000 means is the interval. Which part is the middle is BCa's answer (Efron 1987), which allows for skew, with Student's
t in the place of the normal's quantile, since there may be no more than AIME's 30 problems (Hesterberg 2015): plain percentiles
are too narrow there (tests/bench/intervals.py measures both).

Where problems differ less than their samples must, above all where all are alike, the bootstrap knows nothing: it would
conclude from 0 right of 200 that nothing ever is. Then the interval is Wilson's, with a number of trials that the variance
between problems would give (a cluster-robust effective sample size):

    n_eff = p (1 - p) / (s^2 / P)       p: mean over the P problems, s^2: variance of the problems' values over P - 1
    n_eff = P                           where s^2 is 0
    n_eff <= P * samples                where the caller says how many samples each problem's value rests on

Names carry axes: P problems, N samples, B resamples. Pure functions of numbers; no tables, no I/O. Tests and their correction for
many comparisons are in comparison.py.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, variance

import numpy as np

Z95 = 1.959963984540054  # the normal's 97.5 % point
RESAMPLES = 10_000
NORMAL = NormalDist()


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % interval."""

    value: float
    ci_low: float
    ci_high: float
    problems: int


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k samples drawn from n, of which c are right, hold a right one: 1 - C(n-c, k) / C(n, k).

    Counted in integers and divided once, so it is exact to the last bit for any n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, found n = {n}, c = {c}, k = {k}")
    total = math.comb(n, k)
    return (total - math.comb(n - c, k)) / total


def avg_at_n(correct_PN: Sequence[Sequence[bool]]) -> list[float]:
    """Each problem's share of right samples; the mean of the result is avg@n."""
    return [fmean(correct_N) for correct_N in correct_PN]


def maj_at_n(answers_N: Sequence[Hashable], correct_N: Sequence[bool]) -> float:
    """The chance that the commonest answer among one problem's samples is right, a tie being broken by lot.

    Equal answers are equal values; a sample whose answer is None votes for nothing. 0 if no sample has an answer.
    """
    votes, right = Counter[Hashable](), Counter[Hashable]()
    for answer, correct in zip(answers_N, correct_N, strict=True):
        if answer is not None:
            votes[answer] += 1
            right[answer] += correct
    if not votes:
        return 0.0
    most = max(votes.values())
    return fmean(right[answer] / most for answer, count in votes.items() if count == most)


def estimate(values_P: Sequence[float], *, samples: int | None = None) -> Estimate:
    """Mean of the problems' values (each in [0, 1]) with its interval; `samples` a problem bounds what they can tell.

    The same values give the same interval. ValueError for no problem, or a value outside [0, 1].
    """
    problems = len(values_P)
    if problems == 0:
        raise ValueError("an estimate needs at least one problem, found none")
    if not all(0.0 <= v <= 1.0 for v in values_P):
        raise ValueError("a problem's value lies in [0, 1]; found " + str([v for v in values_P if not 0 <= v <= 1][:3]))
    p = math.fsum(values_P) / problems
    if min(values_P) != max(values_P):
        low, high = bootstrap(values_P)
        least, most = _wilson(p, problems * samples) if samples is not None else (0.0, 0.0)
        if high - low >= most - least:
            return Estimate(p, min(low, p), max(high, p), problems)
    spread = variance(values_P) if problems > 1 and min(values_P) != max(values_P) else 0.0
    n_eff = p * (1 - p) * problems / spread if spread > 0 else float(problems)
    if samples is not None:
        n_eff = min(n_eff, float(problems * samples))
    low, high = _wilson(p, n_eff)
    return Estimate(p, low, high, problems)


def bootstrap(values_P: Sequence[float], *, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The BCa interval of the mean of values that are not all the same, with Student's t; seeded.

    A resample only says how often each distinct value came, so it is drawn as that: one multinomial.
    """
    problems = len(values_P)
    distinct_V, counts_V = np.unique(np.asarray(values_P, float), return_counts=True)
    draws_BV = np.random.default_rng(0).multinomial(problems, counts_V / problems, size=resamples)
    means_B = draws_BV @ distinct_V / problems
    mean = float(counts_V @ distinct_V / problems)
    spread = float(np.ptp(distinct_V))
    near = 1e-9 * spread
    below = (np.mean(means_B < mean - near) + np.mean(means_B <= mean + near)) / 2  # a mean that is equal counts half
    bias = NORMAL.inv_cdf(min(max(float(below), 1 / resamples), 1 - 1 / resamples))
    off_V = (distinct_V - mean) / spread  # the acceleration has no scale, and powers of the tiniest numbers are 0
    acceleration = float(counts_V @ off_V**3 / (6 * (counts_V @ off_V**2) ** 1.5))
    reach = t_quantile(problems - 1) * math.sqrt(problems / (problems - 1))
    shares = [NORMAL.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))) for z in (-reach, reach)]
    low, high = np.quantile(means_B, shares)
    return float(max(low, 0.0)), float(min(high, 1.0))


def eval_metrics(
    correct_PN: Sequence[Sequence[bool]],
    pass_k: Sequence[int] = (),
    answers_PN: Sequence[Sequence[Hashable]] | None = None,
) -> dict[str, Estimate]:
    """`avg@n`, each `pass@k` and, given answers, `maj@n` of one suite, every problem with the same number of samples n."""
    sizes = {len(correct_N) for correct_N in correct_PN}
    if len(sizes) != 1:
        raise ValueError(f"avg@n needs equally many samples for each problem, found {sorted(sizes) or 'no problem'}")
    n = sizes.pop()
    out = {f"avg@{n}": estimate(avg_at_n(correct_PN), samples=n)}
    for k in pass_k:
        out[f"pass@{k}"] = estimate([pass_at_k(n, sum(correct_N), k) for correct_N in correct_PN], samples=n)
    if answers_PN is not None:
        votes_P = [maj_at_n(answers, correct) for answers, correct in zip(answers_PN, correct_PN, strict=True)]
        out[f"maj@{n}"] = estimate(votes_P, samples=n)
    return out


def paired_difference(before_P: Sequence[float], after_P: Sequence[float]) -> Estimate:
    """Mean of after - before over the same problems, with its interval: the same estimate, mapped to [-1, 1].

    Pairing takes the problems' difficulty out, so this is narrower than the two intervals suggest.
    """
    e = estimate([(after - before + 1) / 2 for before, after in zip(before_P, after_P, strict=True)])
    return Estimate(2 * e.value - 1, 2 * e.ci_low - 1, 2 * e.ci_high - 1, e.problems)


def _wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's score interval for a share p seen in n independent trials."""
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p)


@lru_cache(maxsize=256)
def t_quantile(df: int) -> float:
    """The 97.5 % point of Student's t with `df` >= 1 degrees of freedom."""
    low, high = 1.9, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, df) < 0.95 else (low, middle)
    return (low + high) / 2


def _within(t: float, df: int) -> float:
    """P(|T| < t), in closed form (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    cos, odd = math.cos(angle), df % 2
    term = total = cos if odd else 1.0
    for k in range(3 if odd else 2, df - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if df > 1 else 0.0))
