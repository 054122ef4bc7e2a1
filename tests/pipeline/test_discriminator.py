"""PRISM's discriminator: its objective in loops, its two folds, and what makes its scores worth a reward."""

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.discriminator import features, fit, score
from pipeline.rating import Rating
from schemas.methods.terms import Discriminator
from schemas.tables import ARROW

SMALL = Discriminator(bits=8, steps=30, l2=1e-2)
Texts = list[list[int]]


def phi(tokens: list[int], how: Discriminator = SMALL) -> tuple[np.ndarray, np.ndarray]:
    return features(np.array(tokens, np.int32), how)


def dense(tokens: list[int]) -> list[float]:
    places, values = phi(tokens)
    out = [0.0] * (1 << SMALL.bits)
    for place, value in zip(places, values, strict=True):
        out[place] = value
    return out


def some_prompts(n: int, seed: int = 0) -> list[tuple[Texts, Texts]]:
    """Traces say 7 a lot, rollouts say 9: a habit that holds across prompts."""
    rng = np.random.default_rng(seed)

    def text(habit: int) -> list[int]:
        return [habit if rng.random() < 0.4 else int(rng.integers(20, 60)) for _ in range(int(rng.integers(3, 15)))]

    return [([text(7) for _ in range(1 + i % 3)], [text(9) for _ in range(4)]) for i in range(n)]


def phis(prompts: list[tuple[Texts, Texts]], how: Discriminator = SMALL) -> list:
    return [([phi(t, how) for t in traces], [phi(r, how) for r in rollouts]) for traces, rollouts in prompts]


def objective(prompts: list[tuple[Texts, Texts]], w: list[float]) -> float:
    """The module's formula, in loops over dense vectors."""

    def d(tokens: list[int]) -> float:
        return sum(a * b for a, b in zip(dense(tokens), w, strict=True))

    total = 0.0
    for traces, rollouts in prompts:
        of_prompt = [math.log1p(math.exp(d(r) - d(t))) for t in traces for r in rollouts]
        total += sum(of_prompt) / len(of_prompt) / len(prompts)
    return total + SMALL.l2 / 2 * sum(x * x for x in w)


def test_one_step_is_the_objective_s_gradient_by_finite_differences() -> None:
    prompts = some_prompts(3)
    start = fit(phis(prompts), SMALL)
    end = fit(phis(prompts), SMALL.model_copy(update={"steps": SMALL.steps + 1}))
    for place in np.flatnonzero(start)[:: len(np.flatnonzero(start)) // 8]:
        up, down = start.copy(), start.copy()
        up[place] += 1e-5
        down[place] -= 1e-5
        slope = (objective(prompts, up.tolist()) - objective(prompts, down.tolist())) / 2e-5
        assert start[place] - end[place] == pytest.approx(slope, rel=1e-6, abs=1e-10)


def test_the_objective_falls_at_every_step() -> None:
    prompts = some_prompts(4)
    values = [
        objective(prompts, fit(phis(prompts), SMALL.model_copy(update={"steps": s})).tolist()) for s in (1, 2, 5, 20, 80)
    ]
    assert values == sorted(values, reverse=True)
    assert values[0] < math.log(2)


@given(st.lists(st.integers(0, 200_000), max_size=30), st.integers(1, 4))
@settings(deadline=None)
def test_phi_counts_the_n_grams_that_are_there_and_has_length_one(tokens: list[int], ngram: int) -> None:
    how = Discriminator(ngram=ngram, bits=24)
    places, values = phi(tokens, how)
    grams = Counter(tuple(tokens[i : i + n]) for n in range(1, ngram + 1) for i in range(len(tokens) - n + 1))
    assert sorted(places) == list(places)
    if tokens:
        assert np.square(values).sum() == pytest.approx(1)
        counts = np.sort(values / values.min() * min(grams.values()))
        if len(places) == len(grams):  # no two share a place
            assert counts == pytest.approx(sorted(grams.values()))
    else:
        assert (len(places), score(phi(tokens, how), np.ones(1 << 24))) == (0, 0.0)


def test_same_rows_same_weights_to_the_bit_and_nothing_to_learn_from_is_zero() -> None:
    prompts = phis(some_prompts(5))
    assert fit(prompts, SMALL).tobytes() == fit(prompts, SMALL).tobytes()
    assert not fit([], SMALL).any()


# ---------------------------------------------------------------- ratings
def batches(prompts: dict[str, tuple[Texts, Texts]], rows: int = 3) -> list[pa.RecordBatch]:
    """What rated.sql gives, in batches that cut through prompts."""
    found = [
        {"prompt_id": p, "kind": kind, "item_id": f"{p}-{kind}{i}", "tokens": tokens}
        for p, texts in sorted(prompts.items())
        for kind, those in (("rollout", texts[1]), ("trace", texts[0]))
        for i, tokens in enumerate(those)
    ]
    kinds = pa.schema(
        [("prompt_id", pa.string()), ("kind", pa.string()), ("item_id", pa.string()), ("tokens", pa.list_(pa.int32()))]
    )
    return pa.Table.from_pylist(found, kinds).to_batches(max_chunksize=rows)


def rated(prompts: dict[str, tuple[Texts, Texts]], how: Discriminator = SMALL, rows: int = 3) -> tuple[list[dict], dict]:
    rating = Rating(how, seed=3, round=1)
    chosen = set(rating.chosen(prompts))
    learned = batches({p: t for p, t in prompts.items() if p in chosen}, rows)
    made = list(rating.rows(learned, lambda: batches(prompts, rows)))
    return pa.Table.from_batches(made, ARROW["ratings"]).to_pylist(), rating.facts


def test_a_prompt_is_rated_by_the_discriminator_of_the_other_half_whatever_its_own_texts_taught() -> None:
    prompts = {f"p{i:02d}": texts for i, texts in enumerate(some_prompts(12))}
    rows, _ = rated(prompts)
    assert len(rows) == sum(len(t) + len(r) for t, r in prompts.values())
    fold = {r["prompt_id"]: r["fold"] for r in rows}
    assert set(fold.values()) == {0, 1}
    for side in (0, 1):
        w = fit(phis([prompts[p] for p in sorted(prompts) if fold[p] != side]), SMALL)
        for row in rows:
            if row["fold"] == side:
                index = int(row["item_id"][-1])
                tokens = prompts[row["prompt_id"]][0 if row["kind"] == "trace" else 1][index]
                assert row["score"] == score(phi(tokens), w)
    assert len({(r["fold"], r["model"]) for r in rows}) == 2


def test_what_is_learned_carries_over_to_prompts_not_seen_and_noise_does_not() -> None:
    habits = {f"p{i:03d}": texts for i, texts in enumerate(some_prompts(40))}
    assert rated(habits)[1]["trace_outscores"] > 0.9
    rng = np.random.default_rng(1)
    noise = {p: tuple([[int(x) for x in rng.integers(0, 60, 8)] for _ in t] for t in texts) for p, texts in habits.items()}
    assert 0.3 < rated(noise)[1]["trace_outscores"] < 0.7  # in its own sample it would be near 1


def test_how_the_stream_is_cut_and_the_order_of_ids_change_nothing() -> None:
    prompts = {f"p{i}": texts for i, texts in enumerate(some_prompts(7))}
    assert rated(prompts, rows=1) == rated(prompts, rows=1000)
    few = SMALL.model_copy(update={"prompts": 2})
    rating = Rating(few, 3, 1)
    chosen = rating.chosen(prompts)
    assert chosen == rating.chosen(reversed(prompts))
    assert sorted(rating.fold(p) for p in chosen) == [0, 0, 1, 1]
    assert Rating(few, 4, 1).chosen(prompts) != chosen or Rating(few, 3, 2).chosen(prompts) != chosen


def test_one_prompt_alone_or_none_is_rated_zero_or_not_at_all() -> None:
    (only,) = some_prompts(1)
    rows, facts = rated({"p": only})
    assert {r["score"] for r in rows} == {0.0}
    assert facts == {"prompts": 1, "trace_outscores": 0.5}
    assert rated({}) == ([], {"prompts": 0, "trace_outscores": None})
