"""What an evaluation may claim: avg@n, unbiased pass@k, and 95 % intervals whose unit is the problem.

One idea: samples of one problem are alike, so they are not so many independent trials. The interval is Wilson's, with
the number of trials that would give the variance seen BETWEEN problems (a cluster-robust effective sample size):

    n_eff = p (1 - p) / (s^2 / P)       p: mean over the P problems, s^2: variance of the problems' values over P - 1
    n_eff = P                           where s^2 is 0 (all problems alike: 0/200 does not prove that p is 0)
    n_eff <= P * samples                where the caller says how many samples each problem's value rests on

Names carry axes: P problems, N samples. Pure functions of numbers; no tables, no I/O. It leaves out multiple testing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

Z95 = 1.959963984540054  # the normal's 97.5 % point


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


def estimate(values_P: Sequence[float], *, samples: int | None = None) -> Estimate:
    """Mean of the problems' values (each in [0, 1]) with its interval; `samples` a problem bounds what they can tell."""
    problems = len(values_P)
    if problems == 0:
        raise ValueError("an estimate needs at least one problem, found none")
    if not all(0.0 <= v <= 1.0 for v in values_P):
        raise ValueError("a problem's value lies in [0, 1]; found " + str([v for v in values_P if not 0 <= v <= 1][:3]))
    p = math.fsum(values_P) / problems
    spread = variance(values_P) if problems > 1 and min(values_P) != max(values_P) else 0.0
    n_eff = p * (1 - p) * problems / spread if spread > 0 else float(problems)
    if samples is not None:
        n_eff = min(n_eff, float(problems * samples))
    low, high = _wilson(p, n_eff)
    return Estimate(p, low, high, problems)


def eval_metrics(correct_PN: Sequence[Sequence[bool]], pass_k: Sequence[int] = ()) -> dict[str, Estimate]:
    """`avg@n` and each `pass@k` of one suite, every problem with the same number of samples n."""
    sizes = {len(correct_N) for correct_N in correct_PN}
    if len(sizes) != 1:
        raise ValueError(f"avg@n needs equally many samples for each problem, found {sorted(sizes) or 'no problem'}")
    n = sizes.pop()
    out = {f"avg@{n}": estimate(avg_at_n(correct_PN), samples=n)}
    for k in pass_k:
        out[f"pass@{k}"] = estimate([pass_at_k(n, sum(correct_N), k) for correct_N in correct_PN], samples=n)
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
