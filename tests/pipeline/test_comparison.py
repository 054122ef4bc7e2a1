"""Paired tests and Holm's correction against enumeration, printed tables and simulation."""

import math
import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.comparison import holm, paired_test, t_quantile

differences = st.lists(st.integers(-20, 20).map(lambda i: i / 8), min_size=1, max_size=9)


@settings(max_examples=100, deadline=None)
@given(differences)
def test_p_is_the_share_of_sign_assignments_at_least_as_extreme(values):
    seen = abs(sum(values))
    flips = [abs(sum(s * d for s, d in zip(signs, values, strict=True))) for signs in product((-1, 1), repeat=len(values))]
    assert paired_test(values).p == sum(f >= seen for f in flips) / len(flips)


@settings(max_examples=100, deadline=None)
@given(differences)
def test_swapping_the_two_methods_mirrors_the_result(values):
    one, other = paired_test(values), paired_test([-d for d in values])
    assert one.p == other.p
    assert (one.mean, one.ci_low, one.ci_high) == pytest.approx((-other.mean, -other.ci_high, -other.ci_low))


def test_five_seeds_cannot_be_significant_and_six_can():
    assert paired_test([1.0] * 5).p == 2 / 2**5
    assert paired_test([1.0] * 6).p == 2 / 2**6 < 0.05


def test_rounding_does_not_hide_a_tie():
    """0.1 + 0.2 and 0.3 differ in the last bit; the flips that undo each other are as extreme as the one seen."""
    assert paired_test([0.1, 0.2, -0.3]).p == 1.0


def test_no_difference_at_all_is_no_evidence():
    assert paired_test([0.0] * 4).p == 1.0


def test_one_pair_has_an_unbounded_interval():
    one = paired_test([0.25])
    assert (one.mean, one.p, one.n) == (0.25, 1.0, 1)
    assert one.ci_low == -math.inf
    assert one.ci_high == math.inf


def test_many_pairs_are_drawn_and_give_the_same_p_each_time():
    rng = random.Random(5)
    values = [rng.gauss(0.4, 1) for _ in range(24)]
    p = paired_test(values).p
    assert p == paired_test(values).p
    z = sum(values) / math.sqrt(sum(v * v for v in values))  # the flips' sum is about normal
    assert p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.02)


@pytest.mark.parametrize("values", [[], [0.1, math.nan], [math.inf]])
def test_nothing_and_what_is_no_number_are_refused(values):
    with pytest.raises(ValueError, match="at least one difference"):
        paired_test(values)


def test_t_quantiles_are_those_of_the_printed_table():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 29: 2.045, 30: 2.042, 120: 1.980}
    assert {df: round(t_quantile(df), 3) for df in table} == table


@pytest.mark.parametrize("n", [3, 8])
def test_the_interval_covers_the_true_difference_about_95_times_in_100(n):
    rng = random.Random(n)
    covered = 0
    for _ in range(1000):
        t = paired_test([rng.gauss(0.3, 1) for _ in range(n)])
        covered += t.ci_low <= 0.3 <= t.ci_high
    assert 0.93 <= covered / 1000 <= 0.97


def test_the_test_errs_at_most_5_times_in_100_where_nothing_differs():
    rng = random.Random(2)
    false = sum(paired_test([rng.choice((-1, 1)) * rng.random() for _ in range(8)]).p <= 0.05 for _ in range(1000))
    assert false <= 65


def naive_holm(p_values):
    """Step down: at each step reject the smallest left at alpha / (how many are left), or stop."""

    def rejected(alpha):
        left, out = sorted(range(len(p_values)), key=lambda i: p_values[i]), set()
        while left and p_values[left[0]] * len(left) <= alpha:
            out.add(left.pop(0))
        return out

    steps = sorted({min(1.0, p * m) for p in p_values for m in range(1, len(p_values) + 1)} | {1.0})
    return [next((a for a in steps if i in rejected(a)), 1.0) for i in range(len(p_values))]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 64).map(lambda i: i / 64), max_size=7))
def test_an_adjusted_p_is_the_smallest_level_at_which_holm_rejects(p_values):
    assert holm(p_values) == naive_holm(p_values)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_refuses_what_is_no_p_value():
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        holm([0.1, math.nan])


def test_a_family_of_true_nulls_is_wrong_of_any_at_most_5_times_in_100():
    rng = random.Random(7)
    false = sum(min(holm([rng.random() for _ in range(12)])) <= 0.05 for _ in range(2000))
    assert false / 2000 <= 0.065  # 0.05 and three standard errors
