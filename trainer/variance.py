"""Variance, signal and correlation of gradients from their inner products, with bootstrap intervals over prompts.

    noise[a, b]   = tr Cov(a, b)      = mean over pairs i != j of (a_i - a_j) . (b_i - b_j) / 2
    signal[a, b]  = E a . E b         = mean over pairs i != j of a_i . b_j

a_i is the gradient of component a on prompt i. One idea: both are averages over pairs of different prompts, so they are
unbiased (noise[a, a] is the usual 1 / (n - 1) sum |a_i - mean|^2, signal[a, a] is |mean|^2 - noise / n), need only the n x n
inner products, and can be taken anew for any weights w of the prompts with w_i w_j in place of 1. Weights are rows of a
matrix W_RN: row 0 is all ones, the estimate; the others count how often a resample drew each prompt. A prompt drawn twice
is no pair with itself, or the bootstrap would bring back the bias. Everything else is arithmetic on these [R] arrays.
Axes: N prompts, R the estimate and its resamples. Left out: where gradients come from (probe.py); torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Pair = tuple[str, str]

RESAMPLES = 2000


@dataclass(frozen=True)
class Moments:
    """noise and signal of pairs of components (each pair in one order), [R] each."""

    noise: Mapping[Pair, Array]
    signal: Mapping[Pair, Array]


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval. None: not measurable (its signal is not above its noise), or no bound."""

    value: float | None
    ci_low: float | None
    ci_high: float | None


def resample_weights(prompts: int, *, seed: int, resamples: int = RESAMPLES) -> Array:
    """W_RN. A resample draws prompts - 1 of them with replacement, so that its spread is that of n - 1, not of n."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(prompts - 1, np.full(prompts, 1 / prompts), size=resamples)
    return np.vstack([np.ones(prompts), drawn]).astype(np.float64)


def covariance(gram_NN: Array, weights_RN: Array) -> Array:
    """[R] tr Cov(a, b) from the products a_i . b_j."""
    total_R, squares_RN = weights_RN.sum(-1), weights_RN**2
    own_R = (weights_RN @ np.diag(gram_NN)) * total_R - squares_RN @ np.diag(gram_NN)  # sum over i != j of a_i . b_i
    return (own_R - _across(gram_NN, weights_RN)) / (total_R**2 - squares_RN.sum(-1))


def mean_product(gram_NN: Array, weights_RN: Array) -> Array:
    """[R] E a . E b from the products a_i . b_j of gradients on the same prompts."""
    return _across(gram_NN, weights_RN) / (weights_RN.sum(-1) ** 2 - (weights_RN**2).sum(-1))


def cross_product(gram_NM: Array, weights_RN: Array, weights_RM: Array) -> Array:
    """[R] E a . E b from the products of gradients on prompts of two populations, which share no prompt."""
    return ((weights_RN @ gram_NM) * weights_RM).sum(-1) / (weights_RN.sum(-1) * weights_RM.sum(-1))


def _across(gram_NN: Array, weights_RN: Array) -> Array:
    """[R] sum over i != j of w_i w_j a_i . b_j."""
    return ((weights_RN @ gram_NN) * weights_RN).sum(-1) - weights_RN**2 @ np.diag(gram_NN)


def direction_variance(gram_NN: Array, weights_RN: Array) -> Array:
    """[R] 1 - |E a / |a||^2, debiased: 1 - mean cosine of two different prompts. A zero gradient has no direction: cosine 0."""
    norm_N = np.sqrt(np.diag(gram_NN))
    inverse_N = np.divide(1.0, norm_N, out=np.zeros_like(norm_N), where=norm_N > 0)
    return 1 - mean_product(gram_NN * inverse_N * inverse_N[:, None], weights_RN)


def moments(sketches_ND: Mapping[str, Array], weights_RN: Array) -> Moments:
    """Of every pair of components on the same prompts."""
    names = list(sketches_ND)
    pairs = [(a, b) for at, a in enumerate(names) for b in names[at:]]
    grams = {(a, b): sketches_ND[a] @ sketches_ND[b].T for a, b in pairs}
    return Moments(
        {pair: covariance(gram, weights_RN) for pair, gram in grams.items()},
        {pair: mean_product(gram, weights_RN) for pair, gram in grams.items()},
    )


def split_moments(
    noise_N: Mapping[Pair, Array], signal_N: Mapping[Pair, Array], chance_N: Array, weights_RN: Array
) -> Moments:
    """From each prompt's own noise and signal (of its halves), averaged over prompts with weights `chance_N`."""
    weighted_RN = weights_RN * chance_N
    total_R = weighted_RN.sum(-1)
    return Moments(
        {pair: ratio(weighted_RN @ values, total_R) for pair, values in noise_N.items()},
        {pair: ratio(weighted_RN @ values, total_R) for pair, values in signal_N.items()},
    )


def with_mix(of: Moments, grpo: float, gal: float) -> Moments:
    """Adds the component mix = grpo * GRPO + gal * GAL, exactly: both moments are bilinear."""

    def extended(given: Mapping[Pair, Array]) -> dict[Pair, Array]:
        rr, rl, ll = given["grpo", "grpo"], given["grpo", "gal"], given["gal", "gal"]
        return {
            **given,
            ("mix", "mix"): grpo**2 * rr + 2 * grpo * gal * rl + gal**2 * ll,
            ("grpo", "mix"): grpo * rr + gal * rl,
            ("gal", "mix"): grpo * rl + gal * ll,
        }

    return Moments(extended(of.noise), extended(of.signal))


def noise_to_signal(of: Moments, name: str) -> Array:
    """[R] tr Cov / |E g|^2; infinite where the estimate of the signal is not above 0."""
    return ratio(of.noise[name, name], of.signal[name, name])


def correlation(of: Mapping[Pair, Array], a: str, b: str) -> Array:
    """[R] of noise: the noise correlation. Of signal: the cosine of the mean gradients. NaN where a square is not above 0."""
    squares = of[a, a] * of[b, b]
    fit = (of[a, a] > 0) & (of[b, b] > 0)
    return np.divide(of[a, b], np.sqrt(np.where(fit, squares, 1.0)), out=np.full_like(squares, np.nan), where=fit)


def eq19(of: Moments, grpo: float, gal: float) -> dict[str, Interval]:
    """What the paper's Eq. 19 is about, measured. `of` has the mix; grpo and gal are its weights.

    variance_ratio: tr Cov(mix) / tr Cov(GRPO). if_independent: what it would be without correlation between the two.
    best_alpha: of a GRPO + (1 - a) GAL, the a with the least noise / signal (in hundredths); noise_to_signal_best: that over GRPO's.
    """
    r, m = noise_to_signal(of, "grpo"), noise_to_signal(of, "mix")
    alphas = np.linspace(1, 0, 101)  # of equals the one nearest to GRPO
    by_alpha = np.array([noise_to_signal(with_mix(of, a, 1 - a), "mix") for a in alphas])
    by_alpha[np.isnan(by_alpha)] = np.inf
    best_R = by_alpha.min(0)
    return {
        "variance_ratio": interval(ratio(of.noise["mix", "mix"], of.noise["grpo", "grpo"]), 0),
        "if_independent": interval(grpo**2 + gal**2 * ratio(of.noise["gal", "gal"], of.noise["grpo", "grpo"]), 0),
        "noise_correlation": interval(correlation(of.noise, "grpo", "gal"), -1, 1),
        "cosine": interval(correlation(of.signal, "grpo", "gal"), -1, 1),
        "noise_to_signal_grpo": interval(r, 0),
        "noise_to_signal_mix": interval(m, 0),
        "noise_to_signal_ratio": interval(ratio(m, r), 0),
        "best_alpha": interval(np.where(np.isfinite(best_R), alphas[by_alpha.argmin(0)], np.nan), 0, 1),
        "noise_to_signal_best": interval(np.where(np.isfinite(best_R + r), ratio(best_R, r), np.nan), 0, 1),
    }


def ratio(above_R: Array, below_R: Array) -> Array:
    """above / below, infinite where below is not above 0; NaN where both are infinite or neither is above 0."""
    out = np.where(above_R > 0, np.inf, np.nan)
    fit = (below_R > 0) & ~(np.isinf(above_R) & np.isinf(below_R))
    out[np.isinf(above_R) & np.isinf(below_R)] = np.nan
    return np.divide(above_R, below_R, out=out, where=fit)


def interval(values_R: Array, low: float = -np.inf, high: float = np.inf) -> Interval:
    """values[0], and the 2.5 and 97.5 % points of the resamples, within what the number can be.

    A resample where it is not defined counts as extreme on both sides, so it can only widen the interval.
    """
    value, draws = values_R[0], values_R[1:]
    undefined = np.isnan(draws)
    ends = (
        np.quantile(np.where(undefined, -np.inf, draws), 0.025, method="lower"),
        np.quantile(np.where(undefined, np.inf, draws), 0.975, method="higher"),
    )
    found: Sequence[float] = [float(np.clip(x, low, high)) for x in (value, *ends)]
    return Interval(*(x if np.isfinite(x) else None for x in found))
