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


def test_a_trace_without_a_fit_is_refused_and_never_left_out() -> None:
    fits = [{"trace_id": i, "logp": -1.0} for i in ("a-t0", "a-u0", "b-u0")]
    with pytest.raises(duckdb.Error, match="trace a-t1 has no stored fit"):
        adjusted("teacher_by_fit", route(verdicts(HARD), TRACES), fits=fits)


def test_a_fit_is_the_mean_log_prob_of_a_token() -> None:
    con = duckdb.connect()
    rows = [{"round": 0, "role": "fit-t", "item_id": "x", "model": "m", "temperature": 1.0, "logprobs": [-1.0, -2.0, -6.0]}]
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


def test_a_group_of_an_earlier_round_that_is_not_all_judged_or_has_a_member_too_long_stays_out_whole() -> None:
    long = earlier("a", 2, ["ok"] * 4)
    long["rollouts"][1] |= {"tokens": [5] * 9, "logprobs": [-0.5] * 9}
    rows = enlarged(long, earlier("c", 2, ["ok", "error", "ok", "wrong"]), earlier("c", 1, ["unparseable"] * 4))
    assert len(of_group(rows, "a")) == 4
    assert [r["source_round"] for r in of_group(rows, "c")] == [1] * 4 + [3] * 4


def test_samples_past_k_stay_out() -> None:
    assert len(of_group(enlarged(earlier("a", 2, ["ok"] * 6)), "a")) == 8


def test_an_answer_without_a_reward_of_its_own_has_the_lowest_of_the_enlarged_group_whatever_its_round() -> None:
    now = {"a": ["ok", "wrong", "truncated", "wrong"]}
    rows = of_group(enlarged(earlier("a", 2, ["wrong", "truncated", "ok", "ok"], [-1.0, 0.0, 1.0, 1.0]), groups=now), "a")
    assert [r["reward"] for r in rows] == [-1.0, -1.0, 1.0, 1.0, 1.0, 0.0, -1.0, 0.0]
    assert [r["advantage"] for r in rows] == pytest.approx(grpo_advantages([-1, -1, 1, 1, 1, 0, -1, 0]).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ({"type": "luffy", "adjust": ["leave_one_out"]}, "trace as a member"),
        ({"type": "srft", "adjust": ["earlier_rollouts"]}, "trace as a member"),
        ({"type": "prism", "adjust": ["earlier_rollouts"]}, "discriminator"),
        ({"type": "hpt", "adjust": ["earlier_rollouts"]}, "unclipped"),
        ({"type": "dypo", "adjust": ["leave_one_out", "earlier_rollouts"]}, "behind it"),
    ],
)
def test_an_adjustment_that_a_methods_groups_cannot_take_is_refused_with_the_recipe(method: dict, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        TypeAdapter(AnyMethod).validate_python(method)
    TypeAdapter(AnyMethod).validate_python(
        {**method, "adjust": method["adjust"][::-1][:1] if "dypo" in method.values() else []}
    )


def test_without_earlier_rounds_nothing_changes() -> None:
    routed = route(verdicts(MIXED), [trace("b")])
    same = adjusted("earlier_rollouts", routed, 0, **verdicts(MIXED))
    assert same == routed


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
