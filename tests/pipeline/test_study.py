"""A study's plan, what its runs share, and its comparisons, on made-up results: no model, no sampling."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.context import of_data
from pipeline.flow import due_for_eval
from pipeline.stage import Spec, make_table
from pipeline.store import partition
from pipeline.study import cells, layout, report, schedule
from pipeline.study.layout import Cell, Plan, Stem
from pipeline.study.results import Results
from schemas.tables import ARROW
from tests.tiny_runs import ROOT

STUDY = """
name = "small"
title = "A small study"
folder = "{folder}"
seeds = [0, 1]
references = ["sft"]

[[worlds]]
name = "w"
recipe = "{folder}/w.toml"
rollout_tokens = 150
bases = {{ a = "{root}/data/tiny_policy", b = "{root}/data/tiny_policy" }}

[tuning]
base = "a"
seed = 100
suite = "validation"
trials = [{{ lr = 1e-4 }}, {{ lr = 1e-3 }}]

[[methods]]
name = "dypo"
method = {{ type = "dypo" }}

[[methods]]
name = "one_teacher"
method = {{ type = "dypo", alpha = 0.2 }}
teachers = ["left"]
tuned_as = "dypo"

[[methods]]
name = "sft"
method = {{ type = "sft" }}
"""

RECIPE = """
name = "w"
run = "runs/w"
rounds = 2

[policy]
model = "{root}/data/tiny_policy"

[[sources]]
type = "file"
name = "sums"
path = "{root}/data/tiny/train.jsonl"
verifier = "sum"

[[sources]]
type = "file"
name = "fresh"
path = "{root}/data/tiny/eval_id.jsonl"
verifier = "sum"
split = "eval"

[[teachers]]
name = "left"
engine = {{ type = "program", program = "tiny.left" }}

[[teachers]]
name = "right"
engine = {{ type = "program", program = "tiny.right" }}

[score]
verifiers.sum = {{ type = "exact" }}

[train]
steps = 3
prompts_per_step = 2

[eval]
suites = [
    {{ name = "validation", sources = ["fresh"], n = 2 }},
    {{ name = "id", sources = ["fresh"], n = 2 }},
    {{ name = "far", sources = ["fresh"], n = 2, out_of_distribution = true }},
    {{ name = "farther", sources = ["fresh"], n = 2, out_of_distribution = true }},
]
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "w.toml").write_text(RECIPE.format(root=ROOT))
    (tmp_path / "small.toml").write_text(STUDY.format(root=ROOT, folder=tmp_path))
    return layout.read(tmp_path / "small.toml")


def write(run: Path, table: str, rows: list[dict[str, Any]], **keys: Any) -> None:
    filled = [{**dict.fromkeys(ARROW[table].names), **keys, **row} for row in rows]
    make_table(Spec("eval", partition(run, table, keys), {}), pa.Table.from_pylist(filled, schema=ARROW[table]))


def result(plan: Plan, cell: Cell, value: float, lengths: tuple[int, int] = (100, 100), steps: int = 3) -> None:
    """A run of two rounds whose last policy is right in `value` of all, the one before in half of that, the base never."""
    run = plan.folder / cell.label
    for round, step, scale in ((0, 0, 0.0), (0, steps, 0.5), (1, steps, 1.0)):
        for suite, worse in (("validation", 0.0), ("id", 0.0), ("far", 0.1), ("farther", 0.2)):
            known = {"ci_low": 0.0, "ci_high": 1.0, "problems": 10, "policy": "p"}
            row = {"metric": "avg@2", "value": max(0.0, value * scale - worse), **known}
            write(run, "evals", [row, {**row, "metric": "pass@1"}], round=round, step=step, suite=suite)
    for round, length in enumerate(lengths):
        row = {
            "rollout_id": f"{cell.label}{round}",
            "prompt_id": "p",
            "sample": 0,
            "policy": "p",
            "text": "",
            "prompt_tokens": [1],
        }
        row |= {
            "tokens": [1] * length,
            "logprobs": [0.0] * length,
            "finish_reason": "stop",
            "engine": "hf",
            "temperature": 1.0,
            "top_p": 1.0,
        }
        write(run, "rollouts", [row] if length else [], round=round)
        metrics = [
            {"step": s, "name": n, "value": v, "when": 0.0}
            for s in range(steps)
            for n, v in (("grad_norm", value), ("denom/sft_tokens", 10.0), ("denom/rl_tokens", 7.0))
        ]
        write(run, "metrics", metrics, round=round)


VALUES = {"dypo": 0.8, "one_teacher": 0.7, "sft": 0.5}


@pytest.fixture
def found(plan: Plan) -> Results:
    """Every result but one: sft on base b with seed 1."""
    done = [c for c in plan.cells() if (c.base, c.method, c.seed) != ("b", "sft", 1)]
    for c in done:
        lengths = (0, 120) if c.method == "sft" else (100, 100)
        result(plan, c, VALUES[c.method] + 0.01 * c.seed + 0.02 * (c.base == "b"), lengths)
    return Results(plan, done)


# ---------------------------------------------------------------- the plan
def test_a_result_needs_its_stem_and_its_method_s_trials_once_for_all(plan: Plan) -> None:
    todo = schedule.tasks(plan)
    labels = [t.run.label for t in todo]
    assert len(labels) == len(set(labels))
    assert sum(isinstance(t.run, Stem) for t in todo) == 2 * 2 + 1  # bases x seeds, and the trials' own
    assert [x for x in labels if x.startswith("tuning")] == [f"tuning/w/{m}/{n}" for m in ("dypo", "sft") for n in (0, 1)]
    assert sum(x.startswith("cells") for x in labels) == 3 * 2 * 2
    by_label = {t.run.label: t for t in todo}
    needs = {r.label for r in by_label["cells/w/b/one_teacher/1"].needs}
    assert needs == {"stems/w/b/1", "tuning/w/dypo/0", "tuning/w/dypo/1"}
    for task in todo:
        assert all(labels.index(r.label) < labels.index(task.run.label) for r in task.needs)


def test_only_what_fits_the_pattern_is_done_and_what_it_needs(plan: Plan) -> None:
    labels = [t.run.label for t in schedule.tasks(plan, "cells/*/b/sft/1")]
    assert labels == ["stems/w/a/100", "tuning/w/sft/0", "tuning/w/sft/1", "stems/w/b/1", "cells/w/b/sft/1"]


def test_a_cell_s_recipe_is_its_world_s_with_base_seed_method_teachers_and_trial(plan: Plan) -> None:
    recipe = plan.context(Cell("w", "b", "one_teacher", 1), trial=1).recipe
    assert (recipe.seed, recipe.train.method.type, recipe.train.method.lr) == (1, "dypo", 1e-3)
    assert [t.name for t in recipe.teachers] == ["left"]
    assert recipe.run == plan.folder / "cells/w/b/one_teacher/1"


def test_trials_see_the_tuning_suite_alone_and_results_all_of_them(plan: Plan) -> None:
    (trial, *_) = plan.trials("w", "sft")
    assert [s.name for s in plan.context(trial).recipe.eval.suites] == ["validation"]
    assert [s.name for s in plan.suites("w")] == ["id", "far", "farther"]


def test_a_suite_s_own_every_rounds_wins_and_the_last_round_has_every_suite(plan: Plan) -> None:
    data = plan.recipes["w"] | {"rounds": 4}
    data["eval"] = {"every_rounds": 2, "suites": [{**s} for s in data["eval"]["suites"]]}
    data["eval"]["suites"][0]["every_rounds"], data["eval"]["suites"][1]["every_rounds"] = 1, 0
    ctx = of_data(data, "w.toml")
    due = [[s.name for s in due_for_eval(ctx, round)] for round in range(4)]
    assert due == [["validation"], ["validation", "far", "farther"], ["validation"], ["validation", "id", "far", "farther"]]


def test_a_trial_is_chosen_when_all_are_there_and_of_equals_the_first(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[int | None, float | None] = {0: 0.4, 1: None}
    monkeypatch.setattr(cells, "validation", lambda plan, trial: values[trial.trial])
    cell = Cell("w", "a", "one_teacher", 0)
    assert cells.chosen(plan, cell) is None
    values[1] = 0.4
    assert cells.chosen(plan, cell) == 0
    values[1] = 0.5
    assert cells.chosen(plan, cell) == 1


def test_one_trial_is_bold_where_two_are_equal(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "validation", lambda plan, trial: 0.4)
    _, text = report.build(plan, [])
    assert "| w | dypo | lr 0.0001: **40.0** | lr 0.001: 40.0 |" in text


def test_a_run_that_cannot_be_read_is_not_finished_and_stops_nothing(plan: Plan) -> None:
    cell = Cell("w", "a", "sft", 0)
    run = plan.folder / cell.label
    write(run, "prompts", [])
    (run / "recipe.toml").write_text("")
    (run / "prompts" / "manifest.json").write_text("not JSON")
    assert not cells.whole(plan.context(cell, 0))
    todo = schedule.tasks(plan, cell.label)
    schedule.look(plan, todo)
    assert {t.state for t in todo} == {"due"}


# ---------------------------------------------------------------- the comparisons
def test_finals_are_the_last_policy_s_and_budgets_cut_where_the_tokens_end(found: Results) -> None:
    last = found.values("w", found.rows("finals"))
    within = found.values("w", found.rows("at_budget"))
    assert last["id"]["dypo"]["a", 0] == pytest.approx(0.8)
    assert within["id"]["dypo"]["a", 0] == pytest.approx(0.4)  # 100 tokens in its first round, 200 after its second
    assert within["id"]["sft"]["a", 0] == pytest.approx(0.5)  # none in its first, 120 in all
    assert last["out of distribution"]["dypo"]["a", 0] == pytest.approx(0.65)


def test_the_python_that_picks_the_budget_s_policy_and_the_sql_agree(
    plan: Plan, found: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.context.Context.trained_rounds", lambda self: 2)
    monkeypatch.setattr(cells, "final_step", lambda ctx, round: 3)
    rows = {(r["method"], r["base"], r["seed"]): r["round"] for r in found.rows("at_budget")}
    for cell in found.cells:
        assert cells.within(plan.context(cell, 0), 150)[0] == rows[cell.method, cell.base, cell.seed]


def test_differences_are_taken_within_pairs_and_a_missing_partner_leaves_the_pair_out(found: Results) -> None:
    compared = found.compared(found.values("w", found.rows("finals"))["id"])
    assert set(compared) == {("dypo", "sft"), ("one_teacher", "sft")}
    assert compared["dypo", "sft"].test.n == 3
    assert compared["dypo", "sft"].test.mean == pytest.approx(0.3)
    assert compared["dypo", "sft"].adjusted >= compared["dypo", "sft"].test.p == 0.25


def test_costs_are_means_over_results(found: Results) -> None:
    assert found.spent()["w", "dypo"] == {"updates": 6, "rollout_tokens": 200, "trace_tokens": 60, "rl_tokens": 42}
    assert found.spent()["w", "sft"]["rollout_tokens"] == 120


# ---------------------------------------------------------------- the report
def test_the_report_counts_what_is_missing_and_says_the_same_in_both_forms(
    plan: Plan, found: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "validation", lambda plan, trial: None)
    html, text = report.build(plan, found.cells)
    for said in (html, text):
        assert "11 of 12 results" in said
        assert "3 of 4" in said
        assert "At equal updates" in said
        assert "At equal generated tokens: at most 150 of rollouts" in said
        assert "81.5 [" in said
    assert "<svg" in html
    assert "Gradient norm" in html
    assert "Gradient norm" not in text


def test_a_study_without_a_result_has_a_report_too(plan: Plan) -> None:
    html, text = report.build(plan, [])
    assert "0 of 12 results" in html
    assert "No result yet." in text
