"""How often 95 % intervals over problems cover the truth: plain bootstrap percentiles, ours (expanded), and Wilson's.

    python -m tests.bench.intervals [TRIALS]      2,000 by default, about a minute

Problems' true rates are drawn from a Beta distribution, each sample right with its problem's rate; docs/evaluation.md quotes it.
"""

import math
import sys
from statistics import variance

import numpy as np

from pipeline.statistics import _wilson, estimate

WORLDS = [  # what it stands for, problems, samples, Beta(a, b) of the rates
    ("AIME, avg@32", 30, 32, 0.3, 2.0),
    ("AIME, nearly all too hard", 30, 32, 0.1, 2.0),
    ("GPQA, one sample", 198, 1, 2.0, 4.0),
    ("MATH-500, one sample", 500, 1, 4.0, 1.0),
    ("tiny, avg@4", 1000, 4, 0.5, 0.5),
]


def covered(truth: float, low: float, high: float) -> bool:
    return low - 1e-12 <= truth <= high + 1e-12


def coverage(problems: int, samples: int, a: float, b: float, trials: int, seed: int = 0) -> dict[str, float]:
    """Share of trials whose interval holds a / (a + b), for each method."""
    rng = np.random.default_rng(seed)
    truth, hits = a / (a + b), {"plain percentile": 0, "ours": 0, "Wilson": 0}
    for _ in range(trials):
        values_P = rng.binomial(samples, rng.beta(a, b, problems)) / samples
        p, spread = float(values_P.mean()), variance(values_P.tolist())
        n_eff = min(p * (1 - p) * problems / spread if spread else problems, problems * samples)
        counts, weights = np.unique(values_P, return_counts=True)
        means_B = rng.multinomial(problems, weights / problems, size=2000) @ counts / problems
        ours = estimate(values_P.tolist(), samples=samples)
        hits["plain percentile"] += covered(truth, *np.quantile(means_B, [0.025, 0.975]))
        hits["ours"] += covered(truth, ours.ci_low, ours.ci_high)
        hits["Wilson"] += covered(truth, *_wilson(p, n_eff))
    return {name: n / trials for name, n in hits.items()}


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    error = math.sqrt(0.95 * 0.05 / trials)
    print(f"{trials} trials each; standard error of a coverage near 0.95: {error:.3f}")
    for name, problems, samples, a, b in WORLDS:
        found = coverage(problems, samples, a, b, trials)
        shares = "  ".join(f"{method} {share:.3f}" for method, share in found.items())
        print(f"{name}: {problems} problems, {samples} samples, Beta({a:g}, {b:g}): {shares}", flush=True)


if __name__ == "__main__":
    main()
