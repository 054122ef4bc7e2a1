"""Rows in, rows out for the queries that decide what is trained on."""

import duckdb
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.grading import ROUTED
from pipeline.store import ask, sql
from pipeline.traces import FITTING
from schemas.tables import ARROW, TABLES
from trainer.losses import grpo_advantages

GRADE = {"round": 0, "k": 4, "hard_max_successes": 0, "easy_max_failures": 0, "max_tokens": 10, "unjudged_to_routes": False}


def verdicts(
    groups: dict[str, list[str]], rewards: dict[str, list[float]] | None = None, tokens: int = 3
) -> dict[str, list[dict]]:
    """A rollout and a verdict for each status; `rewards` may say something else than the status."""
    rollouts, scores = [], []
    for prompt, statuses in groups.items():
        for i, status in enumerate(statuses):
            reward = rewards[prompt][i] if rewards else float(status == "ok")
            rollouts.append(
                {
                    "rollout_id": f"{prompt}{i}", "prompt_id": prompt, "round": 0, "sample": i, "policy": "p", "text": "",
                    "prompt_tokens": [1, 2], "tokens": [5] * tokens, "logprobs": [-0.5] * tokens, "finish_reason": "stop",
                    "engine": "hf", "temperature": 0.7, "top_p": 1.0, "seed": 1,
                }
            )  # fmt: skip
            scores.append(
                {
                    "kind": "rollout", "id": f"{prompt}{i}", "prompt_id": prompt, "round": 0, "step": None, "suite": None,
                    "teacher": None, "status": status, "reward": reward, "correct": status == "ok", "extracted": None,
                    "verifier": "v", "verifier_version": 1, "elapsed_ms": 0.0, "detail": None,
                }
            )  # fmt: skip
    return {"rollouts": rollouts, "scores": scores}


def trace(prompt: str, teacher: str = "t", n: int = 5, sample: int = 0) -> dict:
    return {
        "trace_id": f"{prompt}-{teacher}{sample}", "prompt_id": prompt, "teacher": teacher, "sample": sample,
        "prompt_tokens": [1, 2], "tokens": [7] * (n - 2), "n_tokens": n, "finish_reason": "stop", "reward": 1.0,
    }  # fmt: skip


def database(tables: dict[str, list[dict]], traces: list[dict], k: object = 4) -> duckdb.DuckDBPyConnection:
    con = duckdb.connect()
    for name in ("rollouts", "scores", "grades", "prompts", "ratings"):
        rows = TABLES[name].counted(pa.Table.from_pylist(tables.get(name, []), schema=ARROW[name]))
        con.register(f"{name}_in", rows)
        con.execute(f"create table {name} as select * from {name}_in")
    asked = tables.get("prompts") or tables.get("rollouts", [])
    con.register("drawn", pa.table({"prompt_id": pa.array(sorted({r["prompt_id"] for r in asked}), pa.string())}))
    con.register("skipped", pa.Table.from_pylist(tables.get("skips", []), schema=ARROW["skips"]))
    con.execute(f"create table round_prompts as {sql('round_prompts')}", {"round": 0})
    con.register("fitting_in", pa.Table.from_pylist(traces, schema=FITTING))
    con.execute("create table fitting_traces as select * from fitting_in")
    con.execute(f"create table verdicts as {sql('verdicts')}", {"k": k})
    return con


def grade(tables: dict[str, list[dict]], traces: list[dict] | None = None, **changes: object) -> dict[str, dict]:
    asked = {**GRADE, **changes}
    rows = ask(database(tables, traces or [], asked["k"]), sql("grade"), **asked).to_pylist()
    return {r["prompt_id"]: r for r in rows}


def route(
    tables: dict[str, list[dict]],
    traces: list[dict] | None = None,
    scale: str = "std",
    routing: dict | None = None,
    **changes: object,
) -> list[dict]:
    graded = list(grade(tables, traces, **changes).values())
    con = database({**tables, "grades": graded}, traces or [], {**GRADE, **changes}["k"])
    how = {
        "rl": ["mid"],
        "sft": ["hard"],
        "union": False,
        "graded": True,
        "min_pass_rate": 0.0,
        "max_pass_rate": 1.0,
        "rated": False,
        "advantage": scale,
        "eps": 1e-6,
        **(routing or {}),
    }
    return ask(con, sql("route"), round=0, max_tokens=10, policy="p", **how).to_pylist()


@pytest.mark.parametrize(
    ("statuses", "changes", "grade_", "reason"),
    [
        (["ok"] * 4, {}, "easy", "easy"),
        (["wrong"] * 4, {}, "hard", "no_verified_trace"),
        (["ok", "wrong", "wrong", "wrong"], {}, "mid", "rl"),
        (["ok", "ok", "ok", "unparseable"], {}, "mid", "rl"),
        (["ok", "ok", "ok", "truncated"], {"easy_max_failures": 1}, "easy", "easy"),
        (["ok", "wrong", "wrong", "wrong"], {"hard_max_successes": 1}, "hard", "no_verified_trace"),
        (["ok", "wrong", "wrong", "timeout"], {}, "mid", "unjudged"),
        (["ok", "wrong", "wrong", "error"], {"unjudged_to_routes": True}, "mid", "rl"),
        (["gold_bad"] * 4, {}, "hard", "unjudged"),
        (["ok", "wrong", "wrong"], {}, "mid", "incomplete_group"),
        (["ok", "wrong", "wrong", "wrong"], {"max_tokens": 4}, "mid", "too_long"),
        (["ok", "wrong", "wrong", "wrong", "ok"], {"k": 4}, "mid", "rl"),
    ],
)
def test_a_group_gets_its_grade_and_reason(statuses: list[str], changes: dict, grade_: str, reason: str) -> None:
    row = grade(verdicts({"a": statuses}), **changes)["a"]
    assert (row["grade"], row["reason"]) == (grade_, reason)
    assert row["k"] == min(len(statuses), 4)


def test_lowering_k_counts_the_first_samples_only() -> None:
    assert grade(verdicts({"a": ["wrong", "wrong", "ok", "ok"]}), k=2)["a"]["grade"] == "hard"


def test_a_hard_prompt_is_routed_by_the_traces_that_fit() -> None:
    tables = verdicts({"a": ["wrong"] * 4, "b": ["wrong"] * 4, "c": ["wrong"] * 4})
    rows = grade(tables, [trace("a"), trace("a", "u"), trace("a", "u", 99, 1), trace("b", n=99)])
    assert {p: (r["traces"], r["reason"]) for p, r in rows.items()} == {
        "a": (2, "sft"), "b": (0, "too_long"), "c": (0, "no_verified_trace"),
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["ok", "wrong"]), min_size=4, max_size=4), st.floats(-3, 3))
def test_a_format_penalty_on_the_reward_moves_no_prompt(statuses: list[str], penalty: float) -> None:
    """ALGORITHMS test 19: routing reads correctness, never the shaped reward."""
    plain, shaped = verdicts({"a": statuses}), verdicts({"a": statuses}, {"a": [penalty * i for i in range(4)]})
    assert grade(plain, [trace("a")]) == grade(shaped, [trace("a")])
    routed = [[(r["route"], r["item_id"], r["correct"]) for r in route(t, [trace("a")])] for t in (plain, shaped)]
    assert routed[0] == routed[1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.floats(-100, 100, width=32)), min_size=4, max_size=4),
    st.sampled_from(["std", "none"]),
)
def test_the_advantage_in_sql_is_that_of_the_trainer(group: list[tuple[bool, float]], scale: str) -> None:
    statuses = ["ok" if ok else "wrong" for ok, _ in group]
    rows = route(verdicts({"a": statuses}, {"a": [r for _, r in group]}), scale=scale)
    if 0 < statuses.count("ok") < 4:
        want = grpo_advantages(torch.tensor([r for _, r in group], dtype=torch.float64), scale=scale)
        got = torch.tensor([r["advantage"] for r in rows], dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    else:
        assert rows == []


def test_shards_hold_whole_groups_and_every_fitting_trace() -> None:
    tables = verdicts({"a": ["ok", "wrong", "ok", "wrong"], "b": ["wrong"] * 4, "c": ["ok"] * 4})
    rows = route(tables, [trace("b"), trace("b", "u"), trace("b", "u", 99, 1), trace("a"), trace("c")])
    assert [(r["route"], r["item_id"]) for r in rows] == [
        ("rl", "a0"), ("rl", "a1"), ("rl", "a2"), ("rl", "a3"), ("sft", "b-t0"), ("sft", "b-u0"),
    ]  # fmt: skip
    rl, sft = rows[0], rows[-1]
    assert (rl["temperature"], rl["group_size"], rl["w_sft"], rl["w_grpo"], rl["w_gal"]) == (0.7, 4, 0.0, 1.0, 1.0)
    assert (sft["temperature"], sft["w_sft"], sft["w_grpo"], sft["teacher"]) == (1.0, 1.0, 0.0, "u")


def test_the_token_lists_are_joined_to_the_routed_keys_in_their_order() -> None:
    tables = verdicts({"b": ["ok", "wrong", "ok", "wrong"], "a": ["wrong"] * 4, "c": ["ok"] * 4})
    traces = [trace("a"), trace("a", "u"), trace("b")]
    con = database(tables, traces)
    routed = route(tables, traces)
    con.register("routed_in", pa.Table.from_pylist([{**row, "file_row_number": i} for i, row in enumerate(routed)]))
    con.execute("create table routed as select * from routed_in")
    rl, sft = (ask(con, sql("sequences"), route=r).to_pylist() for r in ("rl", "sft"))
    assert [routed[r["place"]]["item_id"] for r in [*rl, *sft]] == ["b0", "b1", "b2", "b3", "a-t0", "a-u0"]
    assert {(*r["prompt_tokens"], *r["tokens"], *r["old_logprobs"]) for r in rl} == {(1, 2, 5, 5, 5, -0.5, -0.5, -0.5)}
    assert [(r["tokens"], r["old_logprobs"]) for r in sft] == [([7] * 3, None)] * 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"prompt_id": "stranger"}, "not a train prompt of this round"),
        ({"prompt_id": "b"}, "the prompt stands twice"),
        ({"round": 3}, "another round"),
        ({"grade": "medium"}, "grade is not easy, mid or hard"),
        ({"reason": "whim"}, "reason is not one of those in docs/data.md"),
    ],
)
def test_the_check_on_grades_returns_the_offenders(change: dict, why: str) -> None:
    tables = verdicts({"a": ["ok", "wrong", "ok", "wrong"], "b": ["ok"] * 4})
    rows = list(grade(tables).values())
    con = database(tables, [])
    for graded, expected in ((rows, []), ([{**rows[0], **change}, rows[1]], [why])):
        con.register("graded_in", pa.Table.from_pylist(graded, schema=ARROW["grades"]))
        con.execute("create or replace table new_grades as select * from graded_in")
        assert sorted({r["why"] for r in ask(con, sql("checks/grades"), round=0).to_pylist()}) == expected


def test_a_truncated_answer_never_earns_more_than_a_wrong_one() -> None:
    rewards = {"a": [1.0, -1.0, 0.0, 0.0]}  # a verifier that gives -1 for wrong; truncated has no reward of its own
    rows = route(verdicts({"a": ["ok", "wrong", "truncated", "unparseable"]}, rewards))
    assert [r["reward"] for r in rows] == [1.0, -1.0, -1.0, -1.0]
    assert rows[1]["advantage"] == rows[2]["advantage"] == rows[3]["advantage"] < 0 < rows[0]["advantage"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"route": "x"}, "route is neither rl nor sft"),
        ({"group_size": 3}, "the group is not whole"),
        ({"w_grpo": float("nan")}, "a weight is not finite"),
        ({"w_gal": -1.0}, "a weight is negative"),
        ({"prompt_id": "stranger"}, "not a train prompt of this round"),
        ({"item_id": "a1"}, "the sequence stands twice"),
        ({"temperature": 0.0}, "an rl row sampled at temperature 0"),
        ({"w_sft": 0.7}, "w_sft on an rl row: only sft rows have that term"),
    ],
)
def test_the_check_on_shards_returns_the_offenders(change: dict, why: str) -> None:
    tables = verdicts({"a": ["ok", "wrong", "ok", "wrong"]})
    prompts = [
        {"prompt_id": "a", "messages": [], "answer": "", "verifier": "v", "source": "s", "split": "train", "metadata": None}
    ]
    con = database({"prompts": prompts}, [])
    rows = route(tables)
    for routed, expected in ((rows, 0), ([{**rows[0], **change}, *rows[1:]], 1)):
        con.register("routed_in", pa.Table.from_pylist(routed, schema=ROUTED))
        con.execute("create or replace table new_shards as select * from routed_in")
        found = [r["why"] for r in ask(con, sql("checks/shards")).to_pylist()]
        assert len(found) >= expected
        assert (why in found) == bool(expected)
