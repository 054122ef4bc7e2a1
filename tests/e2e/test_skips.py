"""Groups that are not drawn to their end, through the real command: what is drawn, what is graded, what is accounted for."""

import json
from pathlib import Path

import polars as pl
import pytest

from tests.tiny_runs import ROOT, dypo, table, write_recipe

SEQUENTIAL = "sequential = { block = 2, confidence = 0.6 }\n"
REUSE = "reuse = { max_age = 1 }\n"


def recipe(folder: Path, options: str, **changes: str) -> Path:
    return write_recipe(
        folder, **{"k = 4\n": f"k = 8\n{options}", "prompts_per_round = 40\n": "", "limit = 60": "limit = 30", **changes}
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds that draw every group whole."""
    folder = tmp_path_factory.mktemp("whole")
    dypo("run", recipe(folder, ""))
    return folder / "run"


def test_a_group_stops_when_it_is_sure_and_every_draw_not_made_is_a_row(tmp_path: Path, whole: Path) -> None:
    path = recipe(tmp_path, SEQUENTIAL)
    dypo("run", path, "--set", "rounds=1", "--set", "eval.suites=[]")
    run = tmp_path / "run"
    skips, grades, rollouts = (table(run, name) for name in ("skips", "grades", "rollouts"))
    assert skips.height > 0, "nothing stopped: the test shows nothing"
    assert set(skips["why"]) == {"sure"}
    drawn = dict(rollouts.group_by("prompt_id").len().iter_rows())
    for row in skips.to_dicts():
        assert drawn[row["prompt_id"]] == row["draws"] == 8 - row["skipped"]
        assert row["draws"] in (2, 4, 6)
        assert row["chance"] >= 0.6
    stopped = set(skips["prompt_id"])
    assert all(n == 8 for prompt, n in drawn.items() if prompt not in stopped)
    graded = {row["prompt_id"]: row for row in grades.to_dicts()}
    assert len(graded) == 30
    assert "incomplete_group" not in set(grades["reason"])
    for row in skips.to_dicts():
        assert graded[row["prompt_id"]]["grade"] == row["grade"]
        assert graded[row["prompt_id"]]["k"] == row["draws"]
    first = table(whole, "rollouts").filter(pl.col("round") == 0)
    same = rollouts.join(first, on=["prompt_id", "sample"], suffix="_whole")
    assert same.height == rollouts.height
    assert same["tokens"].to_list() == same["tokens_whole"].to_list(), "stopping elsewhere changed a sample"


def test_generate_and_score_by_hand_come_to_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    dypo("run", recipe(tmp_path / "a", SEQUENTIAL), "--set", "rounds=1", "--set", "eval.suites=[]", "--set", "train.steps=1")
    path = recipe(tmp_path / "b", SEQUENTIAL)
    dypo("ingest", path)
    dypo("generate", "teachers", path)
    for _ in range(6):
        said = [json.loads(line) for line in dypo("generate", "rollouts", path, "--json").stdout.splitlines()]
        if said[-1]["action"] == "nothing":
            break
        dypo("score", path)
    else:
        pytest.fail("it never ends")
    dypo("grade", path)
    for name in ("skips", "grades", "shards"):
        assert table(tmp_path / "a" / "run", name).equals(table(tmp_path / "b" / "run", name)), name


def test_easy_and_hard_prompts_reuse_their_rows_and_name_the_round(tmp_path: Path, whole: Path) -> None:
    path = recipe(tmp_path, REUSE)
    dypo("run", path)
    run = tmp_path / "run"
    before = {r["prompt_id"]: r for r in table(run, "grades").filter(pl.col("round") == 0).to_dicts()}
    now = {r["prompt_id"]: r for r in table(run, "grades").filter(pl.col("round") == 1).to_dicts()}
    reused = {r["prompt_id"] for r in table(run, "skips").to_dicts()}
    assert reused == {p for p, r in before.items() if r["grade"] != "mid"}
    assert 0 < len(reused) < 30
    drawn = set(table(run, "rollouts").filter(pl.col("round") == 1)["prompt_id"])
    assert drawn == set(before) - reused
    for prompt, row in now.items():
        assert row["source_round"] == (0 if prompt in reused else 1)
        if prompt in reused:
            assert (row["grade"], row["successes"], row["k"]) == (before[prompt]["grade"], before[prompt]["successes"], 8)
    shards = table(run, "shards").filter(pl.col("round") == 1)
    assert dict(shards.filter(pl.col("route") == "sft").select("prompt_id", "source_round").iter_rows()) == {
        p: r["source_round"] for p, r in now.items() if r["reason"] == "sft"
    }
    assert dypo("run", path).stdout.count("nothing to do") > 10, "a second run finds all of it done"


def test_what_a_token_budget_cannot_pay_for_trains_on_old_rows_with_their_own_policys_log_probs(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        "reuse = { max_age = 2, token_budget = 1 }\n",
        **{'type = "dypo", lr': 'type = "dypo", grpo.old = "trainer", lr'},
    )
    dypo("run", path, "--set", "eval.suites=[]")
    run = tmp_path / "run"
    skips = table(run, "skips")
    assert skips.height == 30
    assert {"budget", "unmoved"} == set(skips["why"])
    rl = table(run, "shards").filter((pl.col("round") == 1) & (pl.col("route") == "rl"))
    assert rl.height > 0
    assert set(rl["source_round"]) == {0}
    first = table(run, "rollouts").filter(pl.col("round") == 0)
    assert set(rl["policy"]) == set(first["policy"])
    old = table(run, "logprobs").filter((pl.col("round") == 1) & (pl.col("role") == "old")).sort("item_id")
    assert set(old["model"]) == set(first["policy"])
    for got, want in zip(old["logprobs"], rl.sort("item_id")["old_logprobs"], strict=True):
        assert (got - want).abs().max() < 1e-4  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
    assert set(table(run, "draws").filter((pl.col("round") == 1) & (pl.col("route") == "rl"))["age"]) == {1}


def test_a_prompt_too_old_for_its_rows_and_too_dear_to_draw_is_stale(tmp_path: Path) -> None:
    path = recipe(
        tmp_path, "reuse = { max_age = 1, token_budget = 1 }\n", **{"rounds = 2": "rounds = 3", "steps = 6": "steps = 2"}
    )
    dypo("run", path, "--set", "eval.suites=[]")
    last = table(tmp_path / "run", "grades").filter(pl.col("round") == 2)
    assert set(last["reason"]) == {"stale"}
    assert set(last["source_round"]) == {0}
    assert set(table(tmp_path / "run", "skips").filter(pl.col("round") == 2)["why"]) == {"stale"}


def test_without_the_options_nothing_is_skipped_and_old_skips_are_not_read(tmp_path: Path, whole: Path) -> None:
    assert table(whole, "skips").is_empty()
    path = recipe(tmp_path, SEQUENTIAL)
    dypo("run", path, "--set", "rounds=1", "--set", "eval.suites=[]", "--set", "train.steps=1")
    plain = recipe(tmp_path, "")
    for command in (("generate", "rollouts"), ("score",), ("grade",)):
        dypo(*command, plain, "--round", 0)
    mine = table(tmp_path / "run", "grades")
    assert mine.equals(table(whole, "grades").filter(pl.col("round") == 0))


def test_a_run_that_finds_drawn_blocks_without_verdicts_goes_on_to_the_end(tmp_path: Path) -> None:
    """What a kill between generate and score leaves."""
    path = recipe(tmp_path, SEQUENTIAL)
    dypo("ingest", path)
    dypo("generate", path)
    dypo("run", path, "--set", "rounds=1", "--set", "eval.suites=[]", "--set", "train.steps=1")
    grades = table(tmp_path / "run", "grades")
    assert grades.height == 30
    assert "incomplete_group" not in set(grades["reason"])
    assert table(tmp_path / "run", "draws").height > 0


def test_skips_of_other_verdicts_are_not_graded_on(tmp_path: Path) -> None:
    path = recipe(tmp_path, SEQUENTIAL)
    nobody = ("--set", "score.verifiers.sum.extract='nothing(matches)'", "--set", "score.max_failed=1")
    dypo("ingest", path)
    dypo("generate", path)
    dypo("score", path, *nobody)
    dypo("generate", "rollouts", path, *nobody)
    assert set(table(tmp_path / "run", "skips")["grade"]) == {"hard"}
    dypo("score", path)
    refused = dypo("grade", path, check=False)
    assert refused.returncode == 2
    assert "dypo generate rollouts" in refused.stderr
    dypo("run", path, "--set", "rounds=1", "--set", "eval.suites=[]", "--set", "train.steps=1")
    for row in table(tmp_path / "run", "grades").to_dicts():
        assert row["k"] == 8 or (row["grade"], row["successes"]) in (("hard", 0), ("easy", row["k"]))


def test_a_round_that_reuses_everything_can_be_made_again(tmp_path: Path) -> None:
    path = recipe(tmp_path, "reuse = { max_age = 2, token_budget = 1 }\n")
    short = ("--set", "eval.suites=[]", "--set", "train.steps=2")
    dypo("run", path, *short)
    again = dypo("run", path, *short, "--set", "train.method.lr=1e-4", "--regenerate")
    assert "rollouts/round=1" in again.stdout
    assert table(tmp_path / "run", "rollouts")["round"].to_list().count(1) == 0


def test_rollouts_that_the_round_has_already_are_not_replaced_by_older_ones(tmp_path: Path) -> None:
    path = recipe(tmp_path, "", **{"steps = 6": "steps = 2"})
    dypo("run", path, "--set", "eval.suites=[]")
    reuse = ("--set", "rollouts.reuse.max_age=2", "--set", "rollouts.reuse.token_budget=1")
    planned = dypo("plan", path, *reuse).stdout
    assert "skips/round=1" in planned
    dypo("generate", "rollouts", path, "--round", 1, *reuse)
    assert table(tmp_path / "run", "skips").is_empty()


def test_a_prompt_that_cannot_be_asked_is_a_share_of_all_the_rounds_prompts(tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    lines = (ROOT / "data" / "tiny" / "train.jsonl").read_text().splitlines()[:49]
    problems.write_text("\n".join([*lines, json.dumps({"prompt": "what is 1+1?", "answer": "2"})]) + "\n")
    path = recipe(
        tmp_path, REUSE, **{f'path = "{ROOT}/data/tiny/train.jsonl"': f'path = "{problems}"', "limit = 30": "limit = 50"}
    )
    text = path.read_text()
    path.write_text(text[: text.index("[[teachers]]")] + text[text.index("[rollouts]") :])
    dypo("run", path, "--set", "eval.suites=[]", "--set", "train.steps=2", "--set", "rollouts.max_failed=0.02")
    grades = table(tmp_path / "run", "grades").filter(pl.col("round") == 1)
    assert grades.height == 49
