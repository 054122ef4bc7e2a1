"""Adjustments of the routed rows (train.method.adjust) through the real command: what is stored, trained on, and made again."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from pipeline.context import load
from pipeline.stages import grade
from tests.tiny_runs import dypo, table, write_recipe

ALL = '["posterior", "contrast", "leave_one_out", "teacher_by_coverage"]'
METHOD = 'method = { type = "dypo", lr = 1e-3 }'


def recipe(folder: Path, adjust: str) -> Path:
    method = f'method = {{ type = "dypo", lr = 1e-3, supervise = ["mid", "hard"], adjust = {adjust} }}'
    settings = {METHOD: method, "rounds = 2": "rounds = 3", "prompts_per_round = 40\n": "", "steps = 6": "steps = 2"}
    return write_recipe(folder, **settings, **{"checkpoint_every = 2": "checkpoint_every = 1"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds in which every prompt comes again, with all adjustments."""
    folder = tmp_path_factory.mktemp("adjusted")
    dypo("run", recipe(folder, ALL), "--set", "eval.suites=[]")
    return folder / "run"


def test_border_prompts_are_supervised_in_part(run: Path) -> None:
    rows = table(run, "shards").join(table(run, "grades"), on=["round", "prompt_id"], validate="m:1")
    by_grade = {key[0]: mine for key, mine in rows.filter(pl.col("route") == "sft", pl.col("round") == 0).group_by("grade")}
    assert 0 < by_grade["mid"]["w_sft"].min() <= by_grade["mid"]["w_sft"].max() < by_grade["hard"]["w_sft"].min() < 1
    groups = rows.filter(pl.col("route") == "rl")
    assert groups["w_grpo"].is_between(0, 1, closed="none").all()


def test_advantages_leave_one_out_and_no_group_is_without_contrast(run: Path) -> None:
    groups = table(run, "shards").filter(pl.col("route") == "rl")
    assert groups.height > 0
    for _, group in groups.group_by("round", "prompt_id"):
        rewards = group["reward"].to_list()
        assert len(set(rewards)) > 1
        want = [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]
        assert group["advantage"].to_list() == pytest.approx(want)


def test_a_prompt_is_supervised_by_the_one_teacher_that_covers_most_prompts_of_the_round(run: Path) -> None:
    sft = table(run, "shards").filter(pl.col("route") == "sft")
    assert sft.group_by("round", "prompt_id").agg(pl.col("teacher").n_unique())["teacher"].unique().to_list() == [1]
    verified = table(run, "scores").filter(pl.col("kind") == "trace", pl.col("status") == "ok")
    taught = table(run, "traces").join(verified, left_on="trace_id", right_on="id").group_by("teacher")
    coverage = dict(taught.agg(pl.col("prompt_id").n_unique()).iter_rows())  # each round has every prompt
    assert len(set(coverage.values())) == len(coverage) > 1, "no teacher covers more than another: the test shows nothing"
    best = max(coverage, key=lambda teacher: coverage[teacher])
    theirs = set(taught.agg(pl.col("prompt_id")).filter(pl.col("teacher") == best)["prompt_id"].explode())
    assert {r["teacher"] == best for r in sft.to_dicts() if r["prompt_id"] in theirs} == {True}
    assert all(r["prompt_id"] not in theirs for r in sft.to_dicts() if r["teacher"] != best)


def test_grading_again_makes_nothing(run: Path) -> None:
    assert {o.action for o in grade.run(load(run), 2)} == {"nothing"}
    planned = [json.loads(line) for line in dypo("plan", run, "--json").stdout.splitlines()]
    states = {row["partition"]: row["state"] for row in planned if "partition" in row}
    assert {state for partition, state in states.items() if "eval" not in partition} == {"done"}


def test_shards_depend_on_what_an_adjustment_reads_of_other_rounds_and_on_nothing_else(run: Path, tmp_path: Path) -> None:
    def parents(round: int, adjust: str) -> set[str]:
        return set(grade.route_spec(load(run, [f"train.method.adjust={adjust}"]), round, "rl", "g").parents)

    mine = tmp_path / "mine.sql"
    mine.write_text(
        "select routed.* from routed semi join rollouts on rollout_id = item_id order by route, prompt_id, item_id"
    )
    assert parents(2, '["posterior"]') == {"grades/round=0", "grades/round=1", "grades/round=2"}
    of_rollouts = {f"{table}/round={n}" for table in ("rollouts", "scores/kind=rollout") for n in (0, 1)}
    assert parents(2, f'["{mine}"]') == {"grades/round=2", *of_rollouts}
    assert parents(0, f'["{mine}"]') == {"grades/round=0"}
    assert parents(2, "[]") == {"grades/round=2"}
    plain = grade.route_spec(load(run, ["train.method.adjust=[]"]), 2, "rl", "g")
    assert "adjust" not in plain.config, "shards of runs from before adjustments are not stale"


def test_a_what_if_tells_what_another_adjustment_would_train_on(run: Path) -> None:
    asked = 'train.method.adjust=["leave_one_out"]'
    found = json.loads(dypo("grade", run, "--round", 1, "--what-if", asked, "--json").stdout)
    routes = {row["route"]: row for row in found["routes"]}
    assert routes["sft"]["sequences_then"] > routes["sft"]["sequences_now"], "traces of all teachers then"
    assert routes["sft"]["prompts_then"] == routes["sft"]["prompts_now"]
    fewer = json.loads(dypo("grade", run, "--round", 1, "--what-if", "teachers=noisy", "--json").stdout)
    assert fewer["routes"][1]["prompts_then"] < fewer["routes"][1]["prompts_now"]


def test_a_query_of_the_users_own_adjusts_and_one_that_breaks_a_group_is_refused(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "half.sql"
    mine.write_text(
        "select * replace (w_sft / 2 as w_sft) from routed order by route, prompt_id, source_round, sample, item_id"
    )
    found = dypo("grade", run, "--round", 0, "--what-if", f'train.method.adjust=["{mine}"]', "--json")
    assert json.loads(found.stdout)["prompts"] == 60
    mine.write_text("select * from routed where sample > 0")
    told = dypo("grade", run, "--round", 0, "--what-if", f'train.method.adjust=["{mine}"]', check=False)
    assert told.returncode == 2
    assert "the group is not whole" in told.stderr
    told = dypo("grade", run, "--round", 0, "--what-if", 'train.method.adjust=["leave_one_oot"]', check=False)
    assert told.returncode == 2
    assert "leave_one_oot: no such query file" in told.stderr
    assert "none of ours is named so (contrast, leave_one_out," in told.stderr


def test_a_query_of_the_users_own_adds_the_round_before_s_rollouts_to_groups_with_their_samplers_log_probs(
    run: Path, tmp_path: Path
) -> None:
    mine, copied = tmp_path / "enlarged.sql", tmp_path / "run"
    mine.write_text("""
        with members as (
            select r.*, g.group_size, w_grpo, w_gal
            from rollouts as r
            inner join (select distinct prompt_id, group_size, w_grpo, w_gal from routed where route = 'rl') as g using (prompt_id)
            where r.round = $round - 1
        )
        select * replace (if(route = 'rl', 2 * group_size, group_size) as group_size) from routed
        union all by name
        select
            cast($round as integer) as round, m.round as source_round, 'rl' as route, m.prompt_id, m.rollout_id as item_id, m.sample,
            cast(null as varchar) as teacher, m.policy, m.temperature, m.finish_reason, s.reward, s.correct, s.reward - 0.5 as advantage,
            2 * m.group_size as group_size, 0e0 as w_sft, m.w_grpo, m.w_gal
        from members as m
        inner join scores as s on s.kind = 'rollout' and s.id = m.rollout_id
        order by route, prompt_id, source_round, sample, item_id
    """)
    shutil.copytree(run, copied)
    dypo("grade", copied, "--round", 2, "--set", f'train.method.adjust=["{mine}"]')
    groups = table(copied, "shards").filter(pl.col("route") == "rl", pl.col("round") == 2)
    assert set(groups["group_size"]) == {8}
    assert sorted(groups.group_by("prompt_id", "source_round").len()["len"].unique()) == [4]
    stored = groups.join(
        table(copied, "rollouts"), left_on="item_id", right_on="rollout_id", suffix="_drawn", validate="m:1"
    )
    assert stored["old_logprobs"].to_list() == stored["logprobs"].to_list()
    assert stored["source_round"].to_list() == stored["round_drawn"].to_list()
    dypo("train", copied, "--round", 2, "--regenerate", "--set", f'train.method.adjust=["{mine}"]')
    drawn = table(copied, "draws").filter(pl.col("round") == 2).join(groups, on=["round", "item_id"])
    assert set(drawn["round"] - drawn["source_round"]) == {0, 1}
