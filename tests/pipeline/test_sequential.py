"""The chance of a whole group's grade, against counting and against drawing."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sequential import chance, fit_prior


@given(a=st.floats(0.1, 20), b=st.floats(0.1, 20), draws=st.integers(0, 16))
@settings(max_examples=50, deadline=None)
def test_the_chances_of_all_numbers_of_successes_are_one_together(a: float, b: float, draws: int) -> None:
    each = [chance(a, b, draws, s, s) for s in range(draws + 1)]
    assert math.isclose(sum(each), 1, rel_tol=1e-9)
    assert all(0 <= p <= 1 for p in each)
    assert math.isclose(chance(a, b, draws, 0, draws), 1, rel_tol=1e-9)


@pytest.mark.parametrize(("a", "b", "draws", "low", "high"), [(5.5, 0.5, 4, 4, 4), (0.5, 4.5, 4, 0, 0), (2.0, 3.0, 6, 1, 3)])
def test_a_chance_is_what_drawing_gives(a: float, b: float, draws: int, low: int, high: int) -> None:
    rng = random.Random(0)
    hits, n = 0, 40_000
    for _ in range(n):
        p = rng.betavariate(a, b)
        hits += low <= sum(rng.random() < p for _ in range(draws)) <= high
    assert abs(hits / n - chance(a, b, draws, low, high)) < 4 * math.sqrt(0.25 / n)


def test_a_flat_law_after_four_of_four_is_sure_of_four_more_in_five_of_nine() -> None:
    assert chance(1 + 4, 1, 4, 4, 4) == pytest.approx(5 / 9)


def test_bounds_beyond_the_draws_ask_for_nothing() -> None:
    assert chance(1, 1, 4, -3, 9) == pytest.approx(1)
    assert chance(1, 1, 4, 5, 9) == 0


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.3), (2.0, 2.0), (0.5, 3.0)])
def test_the_prior_that_made_many_groups_is_found(a: float, b: float) -> None:
    rng = random.Random(1)
    counts: Counter[tuple[int, int]] = Counter()
    for _ in range(20_000):
        p = rng.betavariate(a, b)
        counts[sum(rng.random() < p for _ in range(8)), 8] += 1
    found = fit_prior(counts)
    assert found[0] / sum(found) == pytest.approx(a / (a + b), abs=0.03)
    assert sum(found) == pytest.approx(a + b, rel=0.25)


def test_no_group_at_all_is_a_flat_prior() -> None:
    assert fit_prior({}) == (1.0, 1.0)
