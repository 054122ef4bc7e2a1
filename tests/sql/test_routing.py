"""The routing query under each method's routing: which prompts' rows it takes, their advantages and gates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pipeline.grading import routing_parameters
from schemas.methods import AnyMethod
from tests.sql.test_grade_and_route import route, trace, verdicts
from trainer.losses import grpo_advantages

TYPES = [
    *("sft", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "sft_then_rl", "uniform_mix", "superrl", "hpt", "relift"),
    *("luffy", "srft", "chord", "bridge", "prism", "dypo", "grpo_flat"),
]
GROUPS = {"easy": ["ok"] * 4, "mid": ["ok", "wrong", "ok", "wrong"], "hard": ["wrong"] * 4}
EVERY = {"easy", "mid", "hard"}


def taken(name: str, round: int = 0, groups: dict | None = None, **changes: object) -> dict[str, set[str]]:
    """By route, the prompts that a method takes; each has a trace."""
    how = routing_parameters(TypeAdapter(AnyMethod).validate_python({"type": name}), round)
    groups = groups or GROUPS
    rows = route(verdicts(groups), [trace(p) for p in groups], routing=how, **changes)
    return {r: {row["prompt_id"] for row in rows if row["route"] == r} for r in ("rl", "sft")}


@pytest.mark.parametrize("name", TYPES)
def test_each_method_takes_the_grades_that_its_page_names(name: str) -> None:
    rl = {"sft": set(), "sft_then_rl": set(), "prism": set(), "dapo": {"mid"}, "dypo": {"mid"}, "grpo_flat": {"mid"}}
    rl |= {"superrl": {"easy", "mid"}, "hpt": {"easy", "mid"}}
    sft = {key: set() for key in ("grpo", "dr_grpo", "dapo", "gspo", "cispo")}
    sft |= {key: {"hard"} for key in ("superrl", "hpt", "relift", "dypo", "grpo_flat")}
    assert taken(name) == {"rl": rl.get(name, EVERY), "sft": sft.get(name, EVERY)}
    if name == "sft_then_rl":
        assert taken(name, round=1) == {"rl": EVERY, "sft": set()}


def rating(item: str, score: float) -> dict:
    named = {"prompt_id": item[0], "kind": "rollout", "item_id": item, "score": score}
    return {"round": 0, "fold": 0, "model": "d", **named}


def test_prism_aligns_on_every_rated_group_by_its_scores_and_then_takes_the_middle_of_the_pass_rates() -> None:
    prism = TypeAdapter(AnyMethod).validate_python({"type": "prism", "sft_rounds": 1, "align_rounds": 2})
    scores = {"a": [0.5, 0.1, -0.2, 0.3], "b": [0.0, 1.0, 2.0, 4.0]}
    ratings = [rating(f"{p}{i}", s) for p, group in scores.items() for i, s in enumerate(group)]
    stranger = [rating("c0", 9.0) | {"round": 5}, rating("c0", 9.0) | {"kind": "trace"}]  # not of this round's rollouts
    groups = {"a": ["wrong"] * 4, "b": ["ok", "truncated", "ok", "unparseable"], "c": ["ok"] * 4}
    for round in (1, 2):
        how = routing_parameters(prism, round)
        rows = route({**verdicts(groups), "ratings": ratings + stranger}, [trace("a"), trace("b")], routing=how)
        assert [(r["route"], r["item_id"], r["reward"]) for r in rows] == [
            ("rl", f"{p}{i}", s) for p, group in scores.items() for i, s in enumerate(group)
        ]
        want = [a for g in scores.values() for a in grpo_advantages(torch.tensor(g, dtype=torch.float64)).tolist()]
        assert [r["advantage"] for r in rows] == pytest.approx(want)
        assert [r["correct"] for r in rows] == [s == "ok" for p in "ab" for s in groups[p]]
    assert taken("prism", round=3) == {"rl": {"mid"}, "sft": set()}


@pytest.mark.parametrize("k", [4, 5, 8, 10, 15, 35])
def test_a_pass_rate_of_exactly_a_fifth_or_four_fifths_is_taken_and_one_rollout_less_or_more_is_not(k: int) -> None:
    how = routing_parameters(TypeAdapter(AnyMethod).validate_python({"type": "prism"}), 2)
    groups = {f"{right:02d}": ["ok"] * right + ["wrong"] * (k - right) for right in range(k + 1)}
    rows = route(verdicts(groups), [], routing=how, k=k)
    assert {int(r["prompt_id"]) for r in rows} == {right for right in range(k + 1) if k <= 5 * right <= 4 * k}


@pytest.mark.parametrize(("gamma", "successes", "supervised"), [(0, 0, True), (0, 1, False), (2, 2, True), (2, 3, False)])
def test_hpt_supervises_up_to_gamma_successes_and_not_one_more(gamma: int, successes: int, supervised: bool) -> None:
    """ALGORITHMS section 8, test 12: the gate compares the count of right rollouts."""
    group = {"a": ["ok"] * successes + ["wrong"] * (4 - successes)}
    got = taken("hpt", groups=group, hard_max_successes=gamma)
    assert got == ({"rl": set(), "sft": {"a"}} if supervised else {"rl": {"a"}, "sft": set()})


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4), st.sampled_from(["std", "none"]), st.booleans())
def test_a_union_s_advantages_are_over_the_rollouts_and_the_trace(rewards: list[float], scale: str, traced: bool) -> None:
    how = {"rl": ["easy", "mid", "hard"], "sft": [], "union": True, "advantage": scale}
    rows = route(
        verdicts({"a": ["ok", "wrong", "ok", "wrong"]}, {"a": rewards}), [trace("a")] if traced else [], routing=how
    )
    members = torch.tensor([*rewards, *([1.0] if traced else [])], dtype=torch.float64)
    want = grpo_advantages(members, scale=scale)
    got = torch.tensor([r["advantage"] for r in rows], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert {r["group_size"] for r in rows} == {4 + traced}
    assert [(r["w_sft"], r["w_grpo"]) for r in rows if r["route"] == "sft"] == [(0.0, 1.0)] * traced


def test_several_traces_of_a_union_stand_for_one_member() -> None:
    how = {"rl": ["mid"], "sft": [], "union": True}
    rows = route(verdicts({"a": ["ok", "wrong", "wrong", "wrong"]}), [trace("a"), trace("a", "u")], routing=how)
    want = grpo_advantages(torch.tensor([1.0, 0, 0, 0, 1.0])).tolist()
    assert [r["advantage"] for r in rows] == pytest.approx([*want[:4], want[4], want[4]])
    assert {r["group_size"] for r in rows} == {5}


def test_a_group_that_is_too_long_leaves_its_trace_to_be_supervised_alone() -> None:
    how = {"rl": ["easy", "mid", "hard"], "sft": ["mid"], "union": True}
    rows = route(verdicts({"a": ["ok", "wrong", "ok", "wrong"]}, tokens=20), [trace("a")], routing=how)
    assert [(r["route"], r["w_sft"], r["w_grpo"], r["group_size"], r["advantage"]) for r in rows] == [
        ("sft", 1.0, 0.0, 1, 0.0)
    ]


def test_a_round_without_rollouts_takes_every_trace_that_fits_with_the_round_s_policy() -> None:
    how = {"rl": [], "sft": ["easy", "mid", "hard"], "graded": False}
    rows = route({"prompts": [{"prompt_id": p} | PROMPT for p in "ab"]}, [trace("a"), trace("b", n=99)], routing=how)
    assert [(r["item_id"], r["policy"], r["round"], r["w_sft"]) for r in rows] == [("a-t0", "p", 0, 1.0)]


@pytest.mark.parametrize("status", ["timeout", "error", "gold_bad"])
def test_a_group_without_all_verdicts_is_taken_by_no_method(status: str) -> None:
    for name in ("grpo", "hpt", "luffy", "dypo"):
        assert taken(name, groups={"a": ["ok", "wrong", "wrong", status]})["rl"] == set()


PROMPT = {"messages": [], "answer": "", "verifier": "v", "source": "s", "split": "train", "metadata": None}


def test_a_mid_group_that_a_query_of_the_user_s_calls_too_long_is_taken_by_no_method() -> None:
    how = {"rl": ["easy", "mid", "hard"], "sft": [], "union": False}
    assert route(verdicts({"a": ["ok", "wrong", "ok", "wrong"]}, tokens=7), routing=how)
    long = route(verdicts({"a": ["ok", "wrong", "ok", "wrong"]}, tokens=9), routing=how)
    assert long == []
