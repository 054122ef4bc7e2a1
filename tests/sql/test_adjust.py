"""Queries over the routed rows (train.method.adjust): rows in, rows out, each against the dumbest version of itself."""

import itertools
import math
from fractions import Fraction
from typing import Any

import duckdb
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.grading import ROUTED
from pipeline.store import ask, sql
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
    known = {"round": round, "k": 4, "max_tokens": 10, "advantage": "std", "eps": 1e-6}
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


# ---------------------------------------------------------------- teachers
def taught(rows: list[dict]) -> dict[str, list[str]]:
    sft = [r for r in rows if r["route"] == "sft"]
    return {p: [r["item_id"] for r in sft if r["prompt_id"] == p] for p in sorted({r["prompt_id"] for r in sft})}


HARD = {"a": ["wrong"] * 4, "b": ["wrong"] * 4, "c": ["ok", "wrong", "ok", "wrong"]}
TRACES = [trace("a", "u"), trace("a", "t"), trace("a", "t", sample=1), trace("b", "u")]


@pytest.mark.parametrize(
    ("round", "chosen"),
    [(0, ["a-t0", "a-t1"]), (1, ["a-u0"]), (2, ["a-t0", "a-t1"])],
)
def test_by_round_a_prompt_has_its_next_teacher_in_each_round(round: int, chosen: list[str]) -> None:
    rows = adjusted("teacher_by_round", route(verdicts(HARD), TRACES), round)
    assert taught(rows) == {"a": chosen, "b": ["b-u0"]}
    assert len(of_group(rows, "c")) == 4


@pytest.mark.parametrize(("u", "chosen"), [(5, ["a-u0"]), (3, ["a-t0", "a-t1"]), (2, ["a-t0", "a-t1"])])
def test_by_coverage_the_teacher_with_most_verified_prompts_is_taken_and_of_equals_the_first(
    u: int, chosen: list[str]
) -> None:
    coverage = [{"teacher": "t", "prompts": 3}, {"teacher": "u", "prompts": u}]
    rows = adjusted("teacher_by_coverage", route(verdicts(HARD), TRACES), coverage=coverage)
    assert taught(rows) == {"a": chosen, "b": ["b-u0"]}


@pytest.mark.parametrize(
    ("logps", "chosen"),
    [((-1.0, -0.5, -2.0), "a-t1"), ((-0.1, -0.5, -2.0), "a-t0"), ((-3.0, -3.0, -2.0), "a-u0"), ((-1.0, -1.0, -1.0), "a-t0")],
)
def test_by_fit_the_trace_that_the_policy_finds_most_likely_is_taken(logps: tuple[float, ...], chosen: str) -> None:
    fits = [{"trace_id": i, "logp": x} for i, x in zip(("a-t0", "a-t1", "a-u0", "b-u0"), (*logps, -9.0), strict=True)]
    rows = adjusted("teacher_by_fit", route(verdicts(HARD), TRACES), fits=fits)
    assert taught(rows) == {"a": [chosen], "b": ["b-u0"]}
    assert len(of_group(rows, "c")) == 4


def test_a_fit_is_the_mean_log_prob_of_a_token() -> None:
    con = duckdb.connect()
    rows = [{"round": 0, "role": "fit", "item_id": "x", "model": "m", "temperature": 1.0, "logprobs": [-1.0, -2.0, -6.0]}]
    con.register("fit_logprobs", pa.Table.from_pylist(rows, schema=ARROW["logprobs"]))
    assert ask(con, sql("fits")).to_pylist() == [{"trace_id": "x", "logp": -3.0}]


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
    reused = [graded("a", "mid", round=1, successes=4, source=0)]  # the same rollouts again: they count once
    rows = adjusted("posterior", routed, 2, grades=[now], earlier_grades=earlier + reused * (not before))
    n, s, t = 4 * (1 + len(before)), right + sum(before), Fraction(1, 5)
    hard, easy = below(t, s, n), below(t, n - s, n)
    for r in rows:
        assert r["w_sft"] == pytest.approx(float(hard) if r["route"] == "sft" else 0.0, abs=1e-9)
        assert r["w_grpo"] == pytest.approx(float(1 - hard - easy) if r["route"] == "rl" else 0.0, abs=1e-9)
        assert r["w_gal"] == r["w_grpo"]
    assert len(rows) == 5


# ---------------------------------------------------------------- earlier rollouts
def earlier(prompt: str, round: int, statuses: list[str], rewards: list[float] | None = None) -> dict[str, list[dict]]:
    found = verdicts({prompt: statuses}, {prompt: rewards} if rewards else None)
    for row in itertools.chain(found["rollouts"], found["scores"]):
        row["round"] = round
        key = "rollout_id" if "rollout_id" in row else "id"
        row[key] = f"{round}-{row[key]}"
    for row in found["rollouts"]:
        row["policy"] = f"p{round}"
    return found


def together(*tables: dict[str, list[dict]]) -> dict[str, list[dict]]:
    return {name: [row for t in tables for row in t[name]] for name in ("rollouts", "scores")}


def enlarged(*before: dict[str, list[dict]], groups: dict[str, list[str]] = MIXED, round: int = 3) -> list[dict]:
    now: Any = verdicts(groups)
    routed = [{**r, "round": round, "source_round": round} for r in route(now, [trace("b")])]
    for row in itertools.chain(*now.values()):
        row["round"] = round
    return adjusted("earlier_rollouts", routed, round, **together(now, *before))


def test_a_mid_group_has_the_rollouts_of_the_two_rounds_before_as_members_with_advantages_over_all() -> None:
    rows = enlarged(
        earlier("a", 2, ["ok", "ok", "wrong", "wrong"]),
        earlier("a", 1, ["wrong", "truncated", "wrong", "ok"]),
        earlier("a", 0, ["ok"] * 4),  # three rounds ago
        earlier("b", 2, ["ok"] * 4),  # supervised: it has no group
    )
    mine = of_group(rows, "a")
    assert [(r["source_round"], r["sample"]) for r in mine] == [(n, i) for n in (1, 2, 3) for i in range(4)]
    assert {r["round"] for r in mine} == {3}
    assert [r["policy"] for r in mine] == ["p1"] * 4 + ["p2"] * 4 + ["p"] * 4
    want = grpo_advantages([0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0]).tolist()
    assert [r["advantage"] for r in mine] == pytest.approx(want, abs=1e-5)
    assert {(r["group_size"], r["w_grpo"], r["w_gal"], r["w_sft"]) for r in mine} == {(12, 1.0, 1.0, 0.0)}
    assert {r["group_size"] for r in of_group(rows, "c")} == {4}
    assert len(rows) == 12 + 4 + 1


def test_what_earlier_rounds_could_not_judge_or_have_longer_than_the_limit_stays_out() -> None:
    long = earlier("a", 2, ["ok"] * 4)
    for row in long["rollouts"]:
        row["tokens"], row["logprobs"] = [5] * 9, [-0.5] * 9
    rows = enlarged(long, earlier("c", 2, ["timeout", "error", "gold_bad", "unparseable"]))
    assert len(of_group(rows, "a")) == 4
    assert [r["item_id"] for r in of_group(rows, "c")] == ["2-c3", "c0", "c1", "c2", "c3"]


def test_without_earlier_rounds_nothing_changes() -> None:
    routed = route(verdicts(MIXED), [trace("b")])
    same = adjusted("earlier_rollouts", routed, 0, **verdicts(MIXED))
    assert same == routed
