"""The eval arithmetic against the dumbest correct version: enumeration, and simulation for the intervals."""

import random
from itertools import combinations, permutations
from statistics import NormalDist, fmean

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.statistics import (
    avg_at_n,
    bootstrap,
    estimate,
    eval_metrics,
    maj_at_n,
    paired_difference,
    pass_at_k,
    t_quantile,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(case):
    n, c, k = case
    subsets = list(combinations([i < c for i in range(n)], k))
    assert pass_at_k(n, c, k) == sum(any(s) for s in subsets) / len(subsets)


def test_pass_at_k_neither_overflows_nor_rounds_away():
    assert pass_at_k(10_000, 1, 5_000) == 0.5
    assert pass_at_k(100_000, 0, 1_000) == 0.0
    assert pass_at_k(4096, 4096, 1) == 1.0
    assert pass_at_k(8, 3, 1) == 3 / 8


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


def test_avg_at_32_of_duplicated_rows_equals_the_mean_of_32_samples():
    """ALGORITHMS test 20: public eval files repeat a problem 8 times; 8 rows of 4 samples are 32 samples of one problem."""
    rng = random.Random(20)
    correct_32 = [rng.random() < 0.3 for _ in range(32)]
    rows = [correct_32[i : i + 4] for i in range(0, 32, 4)]
    assert sum(avg_at_n(rows)) / 8 == avg_at_n([correct_32])[0] == sum(correct_32) / 32


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["4", "5", "6", None]), st.booleans()), min_size=1, max_size=7))
def test_maj_at_n_is_what_voting_by_every_order_of_preference_gives_on_average(samples):
    """A tie is broken by lot: each order of the answers breaks it one way, and all orders are as likely."""
    gold = "4"
    answers = [a for a, _ in samples]
    said = [a for a in answers if a is not None]
    won = [max(order, key=said.count) == gold for order in permutations(sorted(set(said)))] if said else [False]
    assert maj_at_n(answers, [a == gold for a in answers]) == pytest.approx(sum(won) / len(won))


def test_a_sample_without_an_answer_never_wins():
    assert maj_at_n([None, None, None, "7"], [False, False, False, True]) == 1.0
    assert maj_at_n([None, None], [False, False]) == 0.0


def test_eval_metrics_name_what_they_hold():
    correct = [[True, False], [False, False], [True, True]]
    metrics = eval_metrics(correct, [1, 2], [["8", "9"], ["1", "2"], ["3", "3"]])
    assert list(metrics) == ["avg@2", "pass@1", "pass@2", "maj@2"]
    assert metrics["maj@2"].value == pytest.approx((0.5 + 0 + 1) / 3)
    assert list(eval_metrics(correct, [1, 2])) == ["avg@2", "pass@1", "pass@2"]
    assert metrics["avg@2"].value == metrics["pass@1"].value == 0.5
    assert metrics["pass@2"].value == pytest.approx(2 / 3)
    assert metrics["pass@2"].problems == 3


def test_eval_metrics_refuse_ragged_samples():
    with pytest.raises(ValueError, match="equally many samples"):
        eval_metrics([[True], [True, False]])
    with pytest.raises(ValueError, match="no problem"):
        eval_metrics([])


def test_no_success_in_200_problems_does_not_claim_certainty():
    none, every = estimate([0.0] * 200, samples=4), estimate([1.0] * 200, samples=4)
    assert (none.value, none.ci_low) == (0.0, 0.0)
    assert 0.015 < none.ci_high < 0.025  # the rule of three says 3 / 200
    assert (every.value, every.ci_high) == (1.0, 1.0)
    assert every.ci_low == pytest.approx(1 - none.ci_high)


def test_one_problem_has_a_wide_interval():
    one = estimate([0.5], samples=8)
    assert one.ci_low < 0.15
    assert one.ci_high > 0.85


def test_the_bootstrap_is_what_drawing_problems_one_by_one_gives():
    """Efron's BCa as it is written in books, the jackknife by leaving out each problem in turn."""
    rng = random.Random(4)
    values = [rng.choice((0.0, 0.0, 0.0, 0.25, 1.0)) for _ in range(25)]
    means = sorted(fmean(rng.choices(values, k=25)) for _ in range(20_000))
    z = NormalDist()
    bias = z.inv_cdf(sum(0.5 * (m == fmean(values)) + (m < fmean(values)) for m in means) / 20_000)
    without = [fmean(values[:i] + values[i + 1 :]) for i in range(25)]
    off = [fmean(without) - w for w in without]
    acceleration = sum(d**3 for d in off) / (6 * sum(d**2 for d in off) ** 1.5)
    assert acceleration > 0.03  # the values are skewed, so it matters
    slow = []
    for end in (-1, 1):
        reach = bias + end * t_quantile(24) * (25 / 24) ** 0.5
        slow.append(means[int(20_000 * z.cdf(bias + reach / (1 - acceleration * reach)))])
    assert bootstrap(values) == pytest.approx(slow, abs=0.011)


def test_an_interval_is_the_same_each_time_and_for_any_order_of_problems():
    values = [i % 5 / 4 for i in range(31)]
    assert estimate(values) == estimate(values[::-1]) == estimate(values)


def test_the_bootstrap_stands_in_the_table_unless_the_problems_are_all_alike():
    values = [0.0, 0.25, 1.0] * 10
    e = estimate(values, samples=4)
    assert (e.ci_low, e.ci_high) == bootstrap(values)
    alike = estimate([0.25] * 30, samples=4)
    assert alike.ci_low < 0.25 < alike.ci_high


def test_30_problems_as_hard_as_aime_are_covered_about_95_times_in_100():
    """tests/bench/intervals.py has more such worlds, and what plain percentiles cover."""
    rng = random.Random(24)
    covered = 0
    for _ in range(600):
        rates = [rng.betavariate(0.5, 2) for _ in range(30)]
        e = estimate([sum(rng.random() < q for _ in range(8)) / 8 for q in rates], samples=8)
        covered += e.ci_low <= 0.2 <= e.ci_high
    assert 0.925 <= covered / 600 <= 0.975


def test_an_estimate_refuses_nothing_and_values_past_the_unit_interval():
    with pytest.raises(ValueError, match="at least one problem"):
        estimate([])
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        estimate([0.5, 1.2])


def test_samples_within_a_problem_are_not_counted_as_independent():
    """All samples of a problem agree, so 50 problems of 32 samples tell as much as 50 samples."""
    values = [float(i % 2) for i in range(50)]
    clustered = estimate(values, samples=32)
    half = 1.96 * (0.25 / 50) ** 0.5
    assert clustered.ci_high - clustered.ci_low == pytest.approx(2 * half, rel=0.08)


def test_near_equal_problems_claim_no_more_than_their_samples():
    free = estimate([0.5, 0.5 + 1e-9] * 10)
    bounded = estimate([0.5, 0.5 + 1e-9] * 10, samples=4)
    assert free.ci_high - free.ci_low < 1e-6
    assert bounded.ci_high - bounded.ci_low == pytest.approx(2 * 1.96 * (0.25 / 80) ** 0.5, rel=0.05)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.one_of(st.none(), st.integers(1, 16)))
@example([0.0, 5e-324], None)
@example([0.0, 1e-200, 1.0], None)
@example([0.5, 0.5 + 2**-53], None)
def test_the_interval_holds_the_value_and_stays_in_range(values, samples):
    e = estimate(values, samples=samples)
    assert 0 <= e.ci_low <= e.value <= e.ci_high <= 1


@pytest.mark.parametrize(("a", "b", "n"), [(0.5, 0.5, 4), (2.0, 6.0, 8), (0.3, 3.0, 4)])
def test_95_percent_intervals_cover_the_truth_about_95_times_in_100(a, b, n):
    """Problems' true rates are Beta(a, b), samples Bernoulli: clustered, as in life."""
    rng = random.Random(f"{a} {b} {n}")
    trials, covered = 600, 0
    for _ in range(trials):
        rates = [rng.betavariate(a, b) for _ in range(80)]
        e = estimate([sum(rng.random() < q for _ in range(n)) / n for q in rates], samples=n)
        covered += e.ci_low <= a / (a + b) <= e.ci_high
    assert 0.925 <= covered / trials <= 0.975


def test_a_paired_difference_sees_what_two_intervals_cannot():
    rng = random.Random(3)
    before = [rng.random() * 0.8 for _ in range(100)]
    after = [b + 0.05 + 0.02 * rng.random() for b in before]
    gain = paired_difference(before, after)
    assert gain.value == pytest.approx(0.06, abs=0.003)
    assert gain.ci_low > 0.05
    assert estimate(after).ci_low < estimate(before).ci_high
    back = paired_difference(after, before)
    assert (back.value, back.ci_low) == pytest.approx((-gain.value, -gain.ci_high), abs=1e-4)  # other resamples


def test_paired_difference_covers_the_true_gain():
    rng = random.Random(11)
    trials, covered = 400, 0
    for _ in range(trials):
        q = [rng.betavariate(1, 2) for _ in range(80)]
        before = [sum(rng.random() < x for _ in range(4)) / 4 for x in q]
        after = [sum(rng.random() < x + 0.1 * (1 - x) for _ in range(4)) / 4 for x in q]
        d = paired_difference(before, after)
        covered += d.ci_low <= 0.1 * (2 / 3) <= d.ci_high
    assert 0.92 <= covered / trials <= 0.975


def test_a_paired_difference_of_nothing_is_not_certain():
    d = paired_difference([0.5] * 50, [0.5] * 50)
    assert d.value == 0
    assert d.ci_low < -0.1 < 0.1 < d.ci_high
