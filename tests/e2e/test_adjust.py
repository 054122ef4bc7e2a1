"""Adjustments of the routed rows (train.method.adjust) through the real command: what is stored, trained on, and made again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from pipeline.context import load
from pipeline.grading import scratch
from pipeline.stages import fits, grade
from schemas.errors import UserError
from tests.tiny_runs import dypo, table, write_recipe
from trainer import api

ALL = '["posterior", "earlier_rollouts", "leave_one_out", "teacher_by_fit"]'
METHOD = 'method = { type = "dypo", lr = 1e-3 }'


def recipe(folder: Path, adjust: str) -> Path:
    method = f'method = {{ type = "dypo", lr = 1e-3, supervise = ["mid", "hard"], adjust = {adjust} }}'
    settings = {METHOD: method, "rounds = 2": "rounds = 3", "prompts_per_round = 40\n": "", "steps = 6": "steps = 2"}
    return write_recipe(folder, **settings, **{"checkpoint_every = 2": "checkpoint_every = 1"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds in which every prompt comes again, with all adjustments that fit together."""
    folder = tmp_path_factory.mktemp("adjusted")
    dypo("run", recipe(folder, ALL), "--set", "eval.suites=[]")
    return folder / "run"


def test_groups_have_the_rollouts_of_earlier_rounds_as_members_with_their_own_samplers_log_probs(run: Path) -> None:
    shards, rollouts = table(run, "shards"), table(run, "rollouts")
    groups = shards.filter(pl.col("route") == "rl")
    of_round = groups.filter(pl.col("round") == 2)
    assert set(of_round["group_size"]) == {12}
    assert sorted(of_round.group_by("prompt_id", "source_round").len()["len"].unique()) == [4]
    stored = groups.join(rollouts, left_on="item_id", right_on="rollout_id", suffix="_drawn", validate="m:1")
    assert stored.height == groups.height
    assert stored["old_logprobs"].to_list() == stored["logprobs"].to_list()
    assert stored["source_round"].to_list() == stored["round_drawn"].to_list()
    assert stored["policy"].to_list() == stored["policy_drawn"].to_list()
    means = groups.group_by("round", "prompt_id").agg(pl.col("advantage").sum(), pl.col("reward").sum(), pl.len())
    assert means["advantage"].to_list() == pytest.approx([0.0] * means.height, abs=1e-9)
    one = groups.filter(pl.col("prompt_id") == of_round["prompt_id"][0], pl.col("round") == 2)
    rewards = one["reward"].to_list()
    assert one["advantage"].to_list() == pytest.approx([r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards])
    drawn = table(run, "draws").join(groups, on=["round", "item_id"], validate="m:1")
    assert (drawn["round"] - drawn["source_round"]).max() == 2, "an older rollout was trained on"


def test_one_trace_a_prompt_is_supervised_the_one_that_the_rounds_policy_finds_most_likely(run: Path) -> None:
    ctx = load(run)
    sft = table(run, "shards").filter(pl.col("route") == "sft")
    assert sft.group_by("round", "prompt_id").len()["len"].max() == 1
    stored = (
        table(run, "logprobs")
        .filter(pl.col("role").str.starts_with("fit-"))
        .with_columns(pl.col("logprobs").list.mean().alias("logp"))
    )
    traces = table(run, "traces").join(stored, left_on="trace_id", right_on="item_id").filter(pl.col("round") == 1)
    best = traces.sort(["logp", "trace_id"], descending=[True, False]).group_by("prompt_id", maintain_order=True).first()
    chosen = dict(sft.filter(pl.col("round") == 1).select("prompt_id", "item_id").iter_rows())
    assert chosen == {p: t for p, t in best.select("prompt_id", "trace_id").iter_rows() if p in chosen} != {}
    assert traces["prompt_id"].n_unique() < traces.height, "no prompt had a choice: the test shows nothing"
    model = api.load_model(ctx.policy_of(1)[0], ctx.recipe.policy)
    for row in sft.filter(pl.col("round") == 1).head(3).to_dicts():
        want = api.sequence_logprobs(model, row["prompt_tokens"], row["tokens"], 1.0)
        (got,) = traces.filter(pl.col("trace_id") == row["item_id"])["logprobs"].to_list()
        assert got == pytest.approx(want, abs=1e-5)


def test_border_prompts_are_supervised_in_part(run: Path) -> None:
    rows = table(run, "shards").join(table(run, "grades"), on=["round", "prompt_id"], validate="m:1")
    by_grade = {key[0]: mine for key, mine in rows.filter(pl.col("route") == "sft", pl.col("round") == 0).group_by("grade")}
    assert 0 < by_grade["mid"]["w_sft"].min() <= by_grade["mid"]["w_sft"].max() < by_grade["hard"]["w_sft"].min() < 1
    groups = rows.filter(pl.col("route") == "rl")
    assert groups["w_grpo"].is_between(0, 1, closed="none").all()


def test_grading_again_makes_nothing_and_needs_no_model(run: Path) -> None:
    again = grade.run(load(run), 2, None)
    assert {o.action for o in again} == {"nothing"}
    assert {"logprobs/round=2/role=fit-left", "logprobs/round=2/role=fit-noisy"} <= {o.partition for o in again}
    planned = [json.loads(line) for line in dypo("plan", run, "--json").stdout.splitlines()]
    states = {row["partition"]: row["state"] for row in planned if "partition" in row}
    assert {state for partition, state in states.items() if "eval" not in partition} == {"done"}


def test_a_round_before_that_changes_makes_the_rows_stale_that_were_made_of_its_rollouts(run: Path) -> None:
    specs = {n: grade.route_spec(load(run), n, "rl", "g") for n in (0, 2)}
    assert {"rollouts/round=0", "scores/kind=rollout/round=1", "grades/round=1", "logprobs/round=2/role=fit-left"} <= set(
        specs[2].parents
    )
    assert not any("round=1" in p or "round=2" in p for p in specs[0].parents)
    plain = grade.route_spec(load(run, ["train.method.adjust=[]"]), 2, "rl", "g")
    assert set(plain.parents) == {"grades/round=2"}
    assert "adjust" not in plain.config, "shards of runs from before adjustments are not stale"


def test_a_what_if_tells_what_another_choice_of_teacher_would_supervise(run: Path) -> None:
    asked = 'train.method.adjust=["teacher_by_round"]'
    found = json.loads(dypo("grade", run, "--round", 1, "--what-if", asked, "--json").stdout)
    routes = {row["route"]: row for row in found["routes"]}
    assert routes["rl"]["sequences_then"] < routes["rl"]["sequences_now"], "no rollouts of round 0 then"
    assert routes["sft"]["prompts_then"] == routes["sft"]["prompts_now"]
    wanted = 'train.method.adjust=["teacher_by_fit"]'
    again = json.loads(
        dypo("grade", run, "--round", 1, "--what-if", wanted, "--json").stdout
    )  # of the log-probs that are there
    assert again["routes"][1]["sequences_then"] == again["routes"][1]["sequences_now"]
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


class Cut:
    """The trainer, which dies after its first table of log-probs."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def reference_logprobs(self, *args: Any, **options: Any) -> Iterator[pa.Table]:
        for got in api.reference_logprobs(*args, **options):
            yield got.slice(0, self.rows)
            raise KeyboardInterrupt


def test_fits_that_were_cut_off_go_on_and_end_in_the_same_rows(run: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, '["teacher_by_fit"]')
    for words in (["ingest"], ["generate"], ["score"]):
        dypo(*words, path)
    ctx = load(path)
    with pytest.raises(UserError, match="computes them"):
        fits.stored(ctx, 0)
    with pytest.raises(KeyboardInterrupt):
        grade.run(ctx, 0, lambda: Cut(7))
    assert len(ctx.part("logprobs", round=0, role="fit-left").loose(fits.spec(ctx, 0, "left").fingerprint)) == 1
    grade.run(ctx, 0, lambda: api)
    rows = {
        at: table(at, "logprobs").filter(pl.col("role").str.starts_with("fit-"), pl.col("round") == 0)
        for at in (run, tmp_path / "run")
    }
    assert rows[run].equals(rows[tmp_path / "run"])


def test_more_prompts_in_a_round_without_rollouts_get_the_fits_that_are_missing_and_all_of_them_a_trace(
    tmp_path: Path,
) -> None:
    path = write_recipe(
        tmp_path, **{METHOD: 'method = { type = "sft", lr = 1e-3, adjust = ["teacher_by_fit", "posterior"] }'}
    )
    dypo(
        "run",
        path,
        "--set",
        "rounds=1",
        "--set",
        "eval.suites=[]",
        "--set",
        "train.steps=1",
        "--set",
        "rollouts.prompts_per_round=8",
    )
    seen = []
    for prompts in (8, 20):
        outcomes = grade.run(load(path, [f"rollouts.prompts_per_round={prompts}"]), 0, lambda: api)
        seen.append({o.partition: (o.action, o.rows) for o in outcomes})
        sft = table(tmp_path / "run", "shards").filter(pl.col("route") == "sft")
        plain = load(path, [f"rollouts.prompts_per_round={prompts}", "train.method.adjust=[]"])
        with scratch(None) as folder:
            grade.grade_now(plain, 0, folder / "plain")
            wanted = pl.read_parquet(folder / "plain" / "lengths.parquet")["prompt_id"].n_unique()
        assert sft["prompt_id"].n_unique() == sft.height == wanted
        assert set(sft["w_sft"]) == {1.0}
    left = [s["logprobs/round=0/role=fit-left"] for s in seen]
    assert (left[0][0], left[1][0]) == ("nothing", "added")
    assert left[0][1] < left[1][1] == 20


def test_rounds_of_rl_after_rounds_of_sft_have_no_trace_to_choose_and_store_no_fits(tmp_path: Path) -> None:
    method = 'method = { type = "sft_then_rl", lr = 1e-3, sft_rounds = 1, adjust = ["teacher_by_fit", "contrast"] }'
    dypo("run", write_recipe(tmp_path, **{METHOD: method, "steps = 6": "steps = 2"}), "--set", "eval.suites=[]")
    shards, stored = table(tmp_path / "run", "shards"), table(tmp_path / "run", "logprobs")
    assert dict(shards.group_by("round").agg(pl.col("route").unique().first()).iter_rows()) == {0: "sft", 1: "rl"}
    assert set(stored["round"]) == {0}
    groups = shards.filter(pl.col("round") == 1).group_by("prompt_id").agg(pl.col("reward").n_unique())
    assert groups["reward"].min() > 1
