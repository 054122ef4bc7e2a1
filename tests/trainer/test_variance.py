"""The estimators against plain definitions, their expectations over many draws, and how often the intervals hold the truth."""

from collections.abc import Callable

import numpy as np
import pytest

from trainer.variance import (
    Interval,
    Moments,
    correlation,
    covariance,
    cross_product,
    direction_variance,
    eq19,
    interval,
    mean_product,
    moments,
    noise_to_signal,
    ratio,
    resample_weights,
    split_moments,
    with_mix,
)

D = 6
MEAN_A, MEAN_B = np.array([1.0, -0.5, 0, 0.2, 0, 0.1]), np.array([0.6, 0.2, -0.4, 0, 0, 0.3])
MIX_A = np.random.default_rng(1).standard_normal((D, D)) * 0.7
MIX_B = 0.8 * MIX_A + np.random.default_rng(2).standard_normal((D, D)) * 0.4
NOISE = {("grpo", "grpo"): (MIX_A**2).sum(), ("grpo", "gal"): (MIX_A * MIX_B).sum(), ("gal", "gal"): (MIX_B**2).sum()}
SIGNAL = {("grpo", "grpo"): MEAN_A @ MEAN_A, ("grpo", "gal"): MEAN_A @ MEAN_B, ("gal", "gal"): MEAN_B @ MEAN_B}
ONE = np.ones((1, 1))


def drawn(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Gradients of n prompts, two components, with the covariance and means above."""
    z = rng.standard_normal((n, D))
    return {"grpo": MEAN_A + z @ MIX_A, "gal": MEAN_B + z @ MIX_B}


def ones(n: int) -> np.ndarray:
    return np.ones((1, n))


def test_the_pair_averages_are_the_textbook_estimators() -> None:
    a, b = drawn(9, np.random.default_rng(0)).values()
    n = len(a)
    trace = sum((a[i] - a.mean(0)) @ (b[i] - b.mean(0)) for i in range(n)) / (n - 1)
    assert covariance(a @ b.T, ones(n))[0] == pytest.approx(trace)
    assert covariance(a @ a.T, ones(n))[0] == pytest.approx(np.trace(np.cov(a.T)))
    debiased = a.mean(0) @ a.mean(0) - np.trace(np.cov(a.T)) / n
    assert mean_product(a @ a.T, ones(n))[0] == pytest.approx(debiased)
    units = a / np.linalg.norm(a, axis=1, keepdims=True)
    centre = units.mean(0) @ units.mean(0) - np.trace(np.cov(units.T)) / n
    assert direction_variance(a @ a.T, ones(n))[0] == pytest.approx(1 - centre)


def test_weights_are_what_repeating_a_prompt_would_be_without_pairs_of_it_with_itself() -> None:
    a, b = drawn(5, np.random.default_rng(3)).values()
    counts = [2, 0, 1, 3, 1]
    chosen = [i for i, count in enumerate(counts) for _ in range(count)]
    pairs = [(i, j) for i in chosen for j in chosen if i != j]
    products = np.mean([a[i] @ b[j] for i, j in pairs])
    differences = np.mean([(a[i] - a[j]) @ (b[i] - b[j]) / 2 for i, j in pairs])
    weights = np.array([counts], dtype=float)
    assert mean_product(a @ b.T, weights)[0] == pytest.approx(products)
    assert covariance(a @ b.T, weights)[0] == pytest.approx(differences)
    other = np.array([[1.0, 0, 2]])
    expected = np.mean([a[i] @ b[j] for i in chosen for j in (0, 2, 2)])
    assert cross_product(a @ b[:3].T, weights, other)[0] == pytest.approx(expected)


def test_noise_and_signal_are_right_on_average_however_few_prompts() -> None:
    rng = np.random.default_rng(4)
    found = [moments(drawn(3, rng), ones(3)) for _ in range(6000)]
    for truth, kind in ((NOISE, "noise"), (SIGNAL, "signal")):
        for pair, true in truth.items():
            values = np.array([getattr(of, kind)[pair][0] for of in found])
            assert abs(values.mean() - true) < 4 * values.std() / len(values) ** 0.5, (kind, pair)


def test_the_plain_square_of_the_mean_would_fail_that_test() -> None:
    rng = np.random.default_rng(4)
    plain = np.array([np.square(drawn(3, rng)["grpo"].mean(0)).sum() for _ in range(6000)])
    assert plain.mean() - SIGNAL["grpo", "grpo"] > 20 * plain.std() / len(plain) ** 0.5


def test_the_mix_of_moments_is_the_moments_of_the_mix() -> None:
    given = drawn(12, np.random.default_rng(5))
    weights = resample_weights(12, seed=0, resamples=5)
    extended = with_mix(moments(given, weights), 0.3, 0.9)
    direct = moments(given | {"mix": 0.3 * given["grpo"] + 0.9 * given["gal"]}, weights)
    for pair in direct.noise:
        np.testing.assert_allclose(extended.noise[pair], direct.noise[pair])
        np.testing.assert_allclose(extended.signal[pair], direct.signal[pair])


def test_eq_19_is_the_ratio_of_traces_and_independence_predicts_its_formula() -> None:
    rng = np.random.default_rng(6)
    given = drawn(4000, rng)
    independent = given | {"gal": drawn(4000, rng)["gal"]}
    weights = resample_weights(4000, seed=0, resamples=60)
    traces = {n: np.trace(np.cov(g.T)) for n, g in given.items()}
    mix = 0.4 * given["grpo"] + 0.6 * given["gal"]
    found = eq19(with_mix(moments(given, weights), 0.4, 0.6), 0.4, 0.6)
    assert found["variance_ratio"].value == pytest.approx(np.trace(np.cov(mix.T)) / traces["grpo"])
    assert found["if_independent"].value == pytest.approx(0.16 + 0.36 * traces["gal"] / traces["grpo"])
    without = eq19(with_mix(moments(independent, weights), 0.4, 0.6), 0.4, 0.6)
    assert without["variance_ratio"].value == pytest.approx(without["if_independent"].value, rel=0.03)
    assert abs(without["noise_correlation"].value or 1) < 0.03
    assert found["noise_correlation"].value == pytest.approx(
        NOISE["grpo", "gal"] / np.sqrt(NOISE["grpo", "grpo"] * NOISE["gal", "gal"]), abs=0.02
    )


def test_the_noise_to_signal_ratio_does_not_change_with_the_scale_of_a_loss() -> None:
    given = drawn(30, np.random.default_rng(7))
    weights = resample_weights(30, seed=0, resamples=50)
    whole, half = (
        eq19(with_mix(moments({n: scale * g for n, g in given.items()}, weights), 0.5, 0.5), 0.5, 0.5) for scale in (1, 0.5)
    )
    for name, found in whole.items():
        assert vars(half[name]) == pytest.approx(vars(found)), name
    same = eq19(with_mix(moments({"grpo": given["grpo"], "gal": given["grpo"]}, weights), 0.5, 0.0), 0.5, 0.0)
    assert same["variance_ratio"].value == pytest.approx(0.25)  # half of GRPO "varies less" than GRPO ...
    assert vars(same["noise_to_signal_ratio"]) == pytest.approx({"value": 1, "ci_low": 1, "ci_high": 1})  # ... and is it


def test_the_best_alpha_has_the_least_noise_to_signal_of_all_mixes() -> None:
    given = {
        name: drawn(400, np.random.default_rng(seed))["grpo"] for name, seed in (("grpo", 8), ("gal", 9))
    }  # independent
    weights = resample_weights(400, seed=0, resamples=40)
    of = moments(given, weights)
    tried = {a / 100: float(noise_to_signal(with_mix(of, a / 100, 1 - a / 100), "mix")[0]) for a in range(101)}
    found = eq19(with_mix(of, 0.5, 0.5), 0.5, 0.5)
    best = min(tried, key=lambda a: tried[a])
    assert found["best_alpha"].value == pytest.approx(best)
    assert 0.4 < best < 0.6
    assert found["noise_to_signal_best"].value == pytest.approx(tried[best] / tried[1.0])
    same = moments({"grpo": given["grpo"], "gal": 2 * given["grpo"]}, weights)  # every mix is GRPO: nothing to choose
    assert vars(eq19(with_mix(same, 0.5, 0.5), 0.5, 0.5)["noise_to_signal_best"]) == pytest.approx(
        {"value": 1, "ci_low": 1, "ci_high": 1}
    )


STATISTICS: dict[str, Callable[[Moments], np.ndarray]] = {
    "tr Cov": lambda of: of.noise["grpo", "grpo"],
    "signal": lambda of: of.signal["grpo", "grpo"],
    "noise to signal": lambda of: noise_to_signal(of, "grpo"),
    "noise correlation": lambda of: correlation(of.noise, "grpo", "gal"),
    "cosine": lambda of: correlation(of.signal, "grpo", "gal"),
    "variance ratio": lambda of: ratio(of.noise["mix", "mix"], of.noise["grpo", "grpo"]),
}


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(8)
    true = with_mix(Moments({k: ONE[0] * v for k, v in NOISE.items()}, {k: ONE[0] * v for k, v in SIGNAL.items()}), 0.5, 0.5)
    hits = dict.fromkeys(STATISTICS, 0)
    trials = 300
    for trial in range(trials):
        of = with_mix(moments(drawn(40, rng), resample_weights(40, seed=trial, resamples=400)), 0.5, 0.5)
        for name, statistic in STATISTICS.items():
            found, truth = interval(statistic(of)), statistic(true)[0]
            low = -np.inf if found.ci_low is None else found.ci_low
            hits[name] += low <= truth <= (np.inf if found.ci_high is None else found.ci_high)
    for name, held in hits.items():
        assert 0.89 <= held / trials <= 0.995, (name, held / trials)


def test_a_signal_below_its_noise_is_not_measurable_and_has_no_upper_bound() -> None:
    given = np.random.default_rng(9).standard_normal((20, 50))
    of = moments({"sft": given - given.mean(0)}, resample_weights(20, seed=0))
    found = interval(noise_to_signal(of, "sft"))
    assert found.value is None
    assert found.ci_high is None


def test_an_undefined_resample_widens_and_never_narrows() -> None:
    values = np.concatenate([[0.5], np.linspace(0, 1, 200)])
    sound = interval(values)
    values[[100, 101, 102, 103, 104, 105]] = np.nan
    few = interval(values, -1, 1)
    assert few.ci_low is not None
    assert sound.ci_low is not None
    assert few.ci_low == -1
    assert few.ci_high == 1
    assert interval(values) == Interval(0.5, None, None)


def test_zero_gradients_have_no_direction_and_break_nothing() -> None:
    given = drawn(12, np.random.default_rng(10))["grpo"]
    given[:3] = 0
    weights = resample_weights(12, seed=0, resamples=20)
    assert np.isfinite(direction_variance(given @ given.T, weights)).all()
    nothing = moments({"grpo": given * 0, "gal": given}, weights)
    found = eq19(with_mix(nothing, 0.5, 0.5), 0.5, 0.5)
    assert found["variance_ratio"].value is None
    assert found["noise_correlation"].value is None
    nowhere = eq19(with_mix(moments({"grpo": given * 0, "gal": given * 0}, weights), 0.5, 0.5), 0.5, 0.5)
    assert [nowhere[n].value for n in ("noise_to_signal_grpo", "best_alpha", "noise_to_signal_best")] == [None] * 3


def test_halves_are_averaged_by_the_chance_of_their_split() -> None:
    pair = ("grpo", "grpo")
    of = split_moments({pair: np.array([1.0, 5.0])}, {pair: np.array([2.0, 0.0])}, np.array([0.75, 0.25]), ones(2))
    assert of.noise[pair][0] == pytest.approx(2.0)
    assert of.signal[pair][0] == pytest.approx(1.5)


def test_resamples_are_seeded_and_of_one_prompt_less() -> None:
    weights = resample_weights(11, seed=4, resamples=30)
    assert weights.shape == (31, 11)
    assert (weights[0] == 1).all()
    assert (weights[1:].sum(1) == 10).all()
    assert (weights == resample_weights(11, seed=4, resamples=30)).all()
    assert not (weights == resample_weights(11, seed=5, resamples=30)).all()
