"""`dypo grade --what-if` says what the grading then does, and touches nothing."""

import json
from pathlib import Path

import polars as pl
import pytest

from pipeline.what_if import what_if
from schemas.errors import UserError
from tests.tiny_runs import dypo, table


def contents(run: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize(
    ("asked", "then"),
    [
        ("grade.easy_max_failures=1", ["grade.easy_max_failures=1"]),
        ("grade.hard_max_successes=1", ["grade.hard_max_successes=1"]),
        ("k=2", ["rollouts.k=2"]),
        ("grade.max_tokens=60", ["grade.max_tokens=60"]),
    ],
)
def test_the_answer_is_what_the_grading_then_does_and_nothing_was_touched(a_copy: Path, asked: str, then: list[str]) -> None:
    before = contents(a_copy)
    grades, shards = table(a_copy, "grades"), table(a_copy, "shards")
    found = json.loads(dypo("grade", a_copy, "--round", 0, "--what-if", asked, "--json").stdout)
    assert contents(a_copy) == before

    dypo("grade", a_copy, "--round", 0, *(word for key in then for word in ("--set", key)))
    keys = ["prompt_id", "successes", "grade", "reason"]
    old = grades.filter(pl.col("round") == 0).select(keys)
    new = table(a_copy, "grades").filter(pl.col("round") == 0).select(keys)
    both = old.join(new, on="prompt_id", suffix="_then", validate="1:1").sort("prompt_id")
    moved = both.filter((pl.col("grade") != pl.col("grade_then")) | (pl.col("reason") != pl.col("reason_then")))
    assert [row["prompt_id"] for row in found["changed"]] == moved["prompt_id"].to_list() != []
    for row, real in zip(found["changed"], moved.to_dicts(), strict=True):
        assert {k.removesuffix("_now"): v for k, v in row.items()} == real
    assert found["prompts"] == old.height == sum(row["prompts"] for row in found["moves"])

    for rows, when in ((shards, "now"), (table(a_copy, "shards"), "then")):
        mine = rows.filter(pl.col("round") == 0)
        for route in found["routes"]:
            of = mine.filter(pl.col("route") == route["route"])
            numbers = (of["prompt_id"].n_unique(), of.height, of["tokens"].list.len().sum())
            assert tuple(route[f"{name}_{when}"] for name in ("prompts", "sequences", "tokens")) == numbers
        assert sum(row[f"tokens_{when}"] for row in found["moves"]) == mine["tokens"].list.len().sum()


def test_fewer_teachers_leave_hard_prompts_with_fewer_traces_or_none(a_copy: Path) -> None:
    found = what_if(a_copy, [], 0, ["teachers=noisy"])
    (sft,) = [row for row in found.routes if row["route"] == "sft"]
    shards = table(a_copy, "shards").filter((pl.col("round") == 0) & (pl.col("route") == "sft"))
    assert sft["sequences_now"] == shards.height
    assert sft["sequences_then"] == shards.filter(pl.col("teacher") == "noisy").height < shards.height
    assert {(row["reason_now"], row["reason_then"]) for row in found.changed} <= {("sft", "no_verified_trace")}
    same = what_if(a_copy, [], 0, ["teachers=left,noisy"])
    assert same.changed == []


def test_what_is_set_holds_on_both_sides(a_copy: Path) -> None:
    asked = "grade.easy_max_failures=1"
    assert what_if(a_copy, [], 0, [asked]).changed != []
    assert what_if(a_copy, [asked], 0, [asked]).changed == []


def test_a_query_of_the_users_own_is_tried_out(a_copy: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.sql"
    mine.write_text(Path("pipeline/sql/grade.sql").read_text().replace("then 'hard'\n", "then 'mid'\n"))
    found = what_if(a_copy, [], 0, [f"grade.query={mine}"])
    assert {row["grade_then"] for row in found.moves} == {"easy", "mid"}
    assert {row["grade_now"] for row in found.changed} == {"hard"}


def test_more_samples_than_there_are_show_as_incomplete_groups(a_copy: Path) -> None:
    found = what_if(a_copy, [], 0, ["k=8"])
    assert {row["reason_then"] for row in found.moves} == {"incomplete_group"}
    assert [row["prompts_then"] for row in found.routes] == [0] * len(found.routes)


def test_the_terminal_shows_where_prompts_go(undisturbed: Path) -> None:
    said = dypo("grade", undisturbed, "--what-if", "k=2").stdout
    assert said.startswith("round 1 with k=2: ")
    assert "reason_then" in said
    assert "tokens_then" in said


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("teachers=left,nobody", "no teacher nobody; the recipe has left, noisy"),
        ("grade.easy_max_failure=1", "easy_max_failures"),
        ("k", "--what-if k: expected KEY=VALUE"),
        ("rollouts.temperature=0.5", "a grading reads grade.*, k, teachers"),
        ("train.method.alpha=0.25", "a grading reads grade.*, k, teachers"),
    ],
)
def test_what_is_no_setting_is_refused(undisturbed: Path, asked: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        what_if(undisturbed, [], 0, [asked])
