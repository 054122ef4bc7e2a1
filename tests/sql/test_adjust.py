"""Queries over the routed rows (train.method.adjust): rows in, rows out, each against the dumbest version of itself."""

import math
from fractions import Fraction
from typing import Any

import duckdb
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pipeline.grading import ROUTED
from pipeline.store import ask, sql
from schemas.methods import AnyMethod
from schemas.tables import ARROW, TABLES
from tests.sql.test_curriculum import graded
from tests.sql.test_grade_and_route import route, trace, verdicts
from trainer.losses import grpo_advantages

MIXED = {"a": ["ok", "wrong", "wrong", "wrong"], "b": ["wrong"] * 4, "c": ["ok", "ok", "wrong", "wrong"]}


def adjusted(name: str, rows: list[dict], round: int = 0, **tables: list[dict]) -> list[dict]:
    con = duckdb.connect()
    con.register("routed", pa.Table.from_pylist(rows, schema=ROUTED))
    for table, given_rows in tables.items():
        view = "grades" if table == "earlier_grades" else table
        if view in TABLES:
            con.register(table, TABLES[view].counted(pa.Table.from_pylist(given_rows, schema=ARROW[view])))
        else:
            con.register(table, pa.Table.from_pylist(given_rows))
    text = sql(f"adjust/{name}")
    known = {
        "round": round,
        "k": 4,
        "max_tokens": 10,
        "advantage": "std",
        "eps": 1e-6,
        "hard_max_successes": 0,
        "easy_max_failures": 0,
    }
    return ask(con, text, **{k: v for k, v in known.items() if f"${k}" in text}).to_pylist()


def of_group(rows: list[dict], prompt: str) -> list[dict]:
    return [r for r in rows if r["route"] == "rl" and r["prompt_id"] == prompt]


# ---------------------------------------------------------------- leave one out
@given(st.lists(st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3)), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_leave_one_out_compares_a_rollout_with_the_mean_of_the_others(rewards: list[float]) -> None:
    rows = adjusted("leave_one_out", route(verdicts({"a": ["ok", "wrong", "ok", "wrong"]}, {"a": rewards}), []))
    want = [
        float(Fraction(r) - sum(map(Fraction, rewards[:i] + rewards[i + 1 :])) / 3) if len(set(rewards)) > 1 else 0.0
        for i, r in enumerate(rewards)
    ]
    assert [r["advantage"] for r in rows] == pytest.approx(want, abs=1e-12)
    centred = grpo_advantages(torch.tensor(rewards, dtype=torch.float64), scale="none")
    assert [r["advantage"] for r in rows] == pytest.approx((centred * 4 / 3).tolist(), abs=1e-9)


def test_leave_one_out_gives_a_group_without_contrast_exact_zeros_and_leaves_traces_alone() -> None:
    before = route(
        verdicts({"a": ["ok", "wrong", "ok", "wrong"], "b": ["wrong"] * 4}, {"a": [0.1] * 4, "b": [0.0] * 4}), [trace("b")]
    )
    rows = adjusted("leave_one_out", before)
    assert [r["advantage"] for r in of_group(rows, "a")] == [0.0] * 4
    assert [r for r in rows if r["route"] == "sft"] == [r for r in before if r["route"] == "sft"]


@pytest.mark.parametrize("method", ["luffy", "srft"])
def test_groups_with_the_trace_as_a_member_leave_none_out_and_the_recipe_is_refused(method: str) -> None:
    with pytest.raises(ValidationError, match="trace as a member"):
        TypeAdapter(AnyMethod).validate_python({"type": method, "adjust": ["leave_one_out"]})
    TypeAdapter(AnyMethod).validate_python({"type": method, "adjust": ["contrast"]})


# ---------------------------------------------------------------- teachers
def taught(rows: list[dict]) -> dict[str, list[str]]:
    sft = [r for r in rows if r["route"] == "sft"]
    return {p: [r["item_id"] for r in sft if r["prompt_id"] == p] for p in sorted({r["prompt_id"] for r in sft})}


HARD = {"a": ["wrong"] * 4, "b": ["wrong"] * 4, "c": ["ok", "wrong", "ok", "wrong"]}
TRACES = [trace("a", "u"), trace("a", "t"), trace("a", "t", sample=1), trace("b", "u")]


@pytest.mark.parametrize(("u", "chosen"), [(5, ["a-u0"]), (3, ["a-t0", "a-t1"]), (2, ["a-t0", "a-t1"])])
def test_by_coverage_the_teacher_with_most_verified_prompts_is_taken_and_of_equals_the_first(
    u: int, chosen: list[str]
) -> None:
    coverage = [{"teacher": "t", "prompts": 3}, {"teacher": "u", "prompts": u}]
    rows = adjusted("teacher_by_coverage", route(verdicts(HARD), TRACES), coverage=coverage)
    assert taught(rows) == {"a": chosen, "b": ["b-u0"]}


# ---------------------------------------------------------------- posterior
def below(t: Fraction, right: int, n: int) -> Fraction:
    """P(p < t) of Beta(right + 1, n - right + 1), by integrating its polynomial term by term."""
    a, b = right, n - right
    terms = [Fraction(math.comb(b, i) * (-1) ** i, a + i + 1) * t ** (a + i + 1) for i in range(b + 1)]
    return sum(terms) * Fraction(math.factorial(n + 1), math.factorial(a) * math.factorial(b))


@given(st.integers(0, 4), st.lists(st.integers(0, 4), max_size=2))
@settings(max_examples=40, deadline=None)
def test_the_posterior_weighs_a_trace_by_the_chance_of_a_low_pass_rate_and_a_group_by_what_both_ends_leave(
    right: int, before: list[int]
) -> None:
    both = {"rl": ["easy", "mid", "hard"], "sft": ["easy", "mid", "hard"]}
    routed = route(verdicts({"a": ["ok"] * right + ["wrong"] * (4 - right)}), [trace("a")], routing=both)
    now = graded("a", "mid", round=2, successes=right)
    earlier = [graded("a", "mid", round=n, successes=s) for n, s in enumerate(before)]
    rows = adjusted("posterior", routed, 2, grades=[now], earlier_grades=earlier)
    n, s, t = 4 * (1 + len(before)), right + sum(before), Fraction(1, 5)
    hard, easy = below(t, s, n), below(t, n - s, n)
    for r in rows:
        assert r["w_sft"] == pytest.approx(float(hard) if r["route"] == "sft" else 0.0, abs=1e-9)
        assert r["w_grpo"] == pytest.approx(float(1 - hard - easy) if r["route"] == "rl" else 0.0, abs=1e-9)
        assert r["w_gal"] == r["w_grpo"]
    assert len(rows) == 5


def gates(now: dict[str, Any], *before: dict[str, Any]) -> tuple[float, float]:
    both = {"rl": ["easy", "mid", "hard"], "sft": ["easy", "mid", "hard"]}
    routed = route(verdicts({"a": ["ok", "wrong", "wrong", "wrong"]}), [trace("a")], routing=both)
    rows = adjusted("posterior", routed, now["round"], grades=[now], earlier_grades=list(before))
    return next(r["w_sft"] for r in rows if r["route"] == "sft"), next(r["w_grpo"] for r in rows if r["route"] == "rl")


def test_a_rollout_counts_once_however_often_its_group_is_graded() -> None:
    alone = gates(graded("a", "mid", round=2, successes=1))
    drawn_before = graded("a", "mid", round=1, successes=1)
    assert gates(graded("a", "mid", round=2, successes=1, source=1), drawn_before) == alone
    again = graded("a", "mid", round=1, successes=1, source=0)
    twice = gates(graded("a", "mid", round=2, successes=1), graded("a", "mid", round=0, successes=1), again)
    assert twice == gates(graded("a", "mid", round=2, successes=1), drawn_before) != alone


def test_what_could_not_be_judged_counts_neither_way() -> None:
    half = {**graded("a", "mid", round=1, successes=2), "unjudged": 2}
    both_right = {**graded("a", "mid", round=1, successes=2), "k": 2}
    now = graded("a", "mid", round=2, successes=2)
    assert gates(now, half) == gates(now, both_right)


def test_a_round_without_grades_keeps_its_gates() -> None:
    routed = route(verdicts({}), [], routing={"rl": [], "sft": ["hard"], "graded": False})
    supervised = [{**r, "prompt_id": "z"} for r in route(verdicts(HARD), TRACES) if r["route"] == "sft"][:1]
    rows = adjusted("posterior", routed + supervised, 0, grades=[], earlier_grades=[])
    assert [(r["w_sft"], r["item_id"]) for r in rows] == [(1.0, supervised[0]["item_id"])]


# ---------------------------------------------------------------- contrast
def test_contrast_leaves_out_the_groups_that_have_no_gradient_and_nothing_else() -> None:
    every = {"rl": ["easy", "mid", "hard"], "sft": ["easy", "mid", "hard"]}
    shaped = {"a": [0.5, 0.5, 0.5, 0.5], "b": [0.0, 0.0, 0.0, 0.1], "c": [1.0, 0.0, 1.0, 0.0], "d": [0.0] * 4}
    statuses = {"a": ["ok"] * 4, "b": ["wrong"] * 4, "c": ["ok", "wrong"] * 2, "d": ["wrong"] * 4}
    routed = route(verdicts(statuses, shaped), [trace("a"), trace("d")], routing=every)
    rows = adjusted("contrast", routed)
    assert {r["prompt_id"] for r in rows if r["route"] == "rl"} == {"b", "c"}
    assert rows == [r for r in routed if r["route"] == "sft" or r["prompt_id"] in "bc"]
    assert {r["prompt_id"] for r in routed if r["route"] == "rl" and r["advantage"] != 0} == {"b", "c"}
