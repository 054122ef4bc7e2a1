"""The whole job through the real command: what each stage leaves, what a second run does, what a change costs."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from pipeline.store import connect, partitions
from schemas.tables import TABLES
from tests.tiny_runs import dypo, table, write_recipe


def outcomes(*args: object) -> list[dict]:
    return [json.loads(line) for line in dypo(*args, "--json").stdout.splitlines()]


def test_every_table_has_rows_but_those_of_trouble_and_of_options_that_are_off_and_every_key_is_unique(
    undisturbed: Path,
) -> None:
    for name, declared in TABLES.items():
        frame = table(undisturbed, name)
        assert (frame.height > 0) == (name not in ("contamination", "failures", "skips", "ratings")), name
        assert not frame.select(declared.key).is_duplicated().any(), name


def test_the_recipe_is_in_the_run_as_resolved_with_no_secret(undisturbed: Path) -> None:
    text = (undisturbed / "recipe.toml").read_text()
    assert "prompts_per_round = 40" in text
    assert "hard_max_successes = 0" in text


def test_eval_prompts_reach_no_table_that_training_reads(undisturbed: Path) -> None:
    held_out = table(undisturbed, "prompts").filter(pl.col("split") == "eval")["prompt_id"].to_list()
    assert len(held_out) == 12
    for name in ("traces", "rollouts", "grades", "shards", "draws"):
        assert table(undisturbed, name).filter(pl.col("prompt_id").is_in(held_out)).is_empty(), name


def test_grades_agree_with_a_count_by_hand(undisturbed: Path) -> None:
    verdicts = table(undisturbed, "scores").filter(pl.col("kind") == "rollout")
    for row in table(undisturbed, "grades").to_dicts():
        mine = verdicts.filter((pl.col("prompt_id") == row["prompt_id"]) & (pl.col("round") == row["round"]))
        right = sum(s == "ok" for s in mine["status"])
        assert (row["k"], row["successes"]) == (4, right)
        assert row["grade"] == ("hard" if right == 0 else "easy" if right == 4 else "mid")


def test_every_graded_prompt_is_in_a_shard_or_has_a_reason_why_not(undisturbed: Path) -> None:
    shards = table(undisturbed, "shards")
    for row in table(undisturbed, "grades").to_dicts():
        routes = (
            shards.filter((pl.col("round") == row["round"]) & (pl.col("prompt_id") == row["prompt_id"]))["route"]
            .unique()
            .to_list()
        )
        assert routes == ([row["reason"]] if row["reason"] in ("sft", "rl") else [])


def test_hard_prompts_carry_every_verified_trace_and_no_other(undisturbed: Path) -> None:
    verified = table(undisturbed, "scores").filter((pl.col("kind") == "trace") & pl.col("correct"))
    sft = table(undisturbed, "shards").filter(pl.col("route") == "sft")
    assert not sft.is_empty()
    for (round, prompt), rows in sft.group_by("round", "prompt_id"):
        assert round in (0, 1)
        assert sorted(rows["item_id"]) == sorted(verified.filter(pl.col("prompt_id") == prompt)["id"])


def test_the_noisy_teacher_is_sometimes_wrong_and_its_wrong_traces_are_not_trained_on(undisturbed: Path) -> None:
    noisy = table(undisturbed, "scores").filter(pl.col("teacher") == "noisy")
    wrong = noisy.filter(~pl.col("correct"))["id"]
    assert 0 < len(wrong) < noisy.height
    assert not set(wrong) & set(table(undisturbed, "draws")["item_id"])


def test_targets_are_the_policys_tokens_and_end_with_end_of_sequence(undisturbed: Path) -> None:
    from pipeline.policy import Renderer

    renderer = Renderer(Path(__file__).parent.parent.parent / "data" / "tiny_policy")
    shards = table(undisturbed, "shards").to_dicts()
    prompts = {r["prompt_id"]: r["messages"] for r in table(undisturbed, "prompts").to_dicts()}
    for row in shards:
        assert row["prompt_tokens"] == renderer.prompt_tokens(prompts[row["prompt_id"]])
        if row["route"] == "sft":
            assert row["tokens"][-1] in renderer.eos_ids
            assert not set(row["tokens"][:-1]) & set(renderer.eos_ids)


def test_the_second_round_samples_the_checkpoint_that_the_first_ended_with(undisturbed: Path) -> None:
    from pipeline.policy import policy_id

    policies = dict(table(undisturbed, "rollouts").select("round", "policy").unique().iter_rows())
    assert policies[1] == policy_id(undisturbed / "checkpoints" / "round=0" / "step=6")
    assert policies[0] != policies[1]


def test_a_second_run_does_nothing_and_says_why(a_copy: Path) -> None:
    before = {p: p.read_bytes() for p in a_copy.rglob("*.parquet")}
    for o in outcomes("run", a_copy):
        assert (o["action"], o["added"]) == ("nothing", 0)
        assert "same fingerprint" in o["why"]
    assert before == {p: p.read_bytes() for p in a_copy.rglob("*.parquet")}
    assert "nothing to do (same fingerprint" in dypo("score", a_copy).stdout


def test_a_changed_threshold_regrades_with_no_generation_and_going_back_restores(a_copy: Path) -> None:
    first = table(a_copy, "grades")
    made = outcomes("grade", a_copy, "--round", 0, "--set", "grade.easy_max_failures=1")
    assert {o["partition"]: o["action"] for o in made} == {
        "grades/round=0": "made", "shards/round=0/route=rl": "made", "shards/round=0/route=sft": "made",
    }  # fmt: skip
    regraded = table(a_copy, "grades").filter(pl.col("round") == 0)
    assert (regraded["grade"] == "easy").sum() > (first.filter(pl.col("round") == 0)["grade"] == "easy").sum()
    states = {p["partition"]: p["state"] for p in map(json.loads, dypo("status", a_copy, "--json").stdout.splitlines())}
    assert states["rollouts/round=0"] == "done"
    assert states["checkpoints/round=0"] == "stale"
    assert {o["action"] for o in outcomes("grade", a_copy, "--round", 0, "--set", "grade.easy_max_failures=0")} == {
        "nothing"
    }
    assert table(a_copy, "grades").equals(first)


def test_a_method_change_that_no_gate_sees_neither_regrades_nor_reroutes(a_copy: Path) -> None:
    assert {o["action"] for o in outcomes("grade", a_copy, "--set", "train.method.alpha=0.1")} == {"nothing"}


def test_a_changed_gate_reroutes_and_never_regrades(a_copy: Path) -> None:
    made = {o["partition"]: o["action"] for o in outcomes("grade", a_copy, "--set", "train.method.grpo.advantage='none'")}
    assert made == {"grades/round=1": "nothing", "shards/round=1/route=rl": "made", "shards/round=1/route=sft": "made"}


def test_a_deleted_round_is_rebuilt_alone_and_the_same(a_copy: Path) -> None:
    before = {n: table(a_copy, n) for n in ("rollouts", "scores", "grades", "shards")}
    kept = {p: p.stat().st_mtime_ns for p in a_copy.rglob("part-*.parquet") if "round=1" not in str(p)}
    for name in ("rollouts", "scores/kind=rollout", "grades", "shards"):
        shutil.rmtree(a_copy / name / "round=1")
    assert {o["partition"] for o in outcomes("refresh", a_copy, "--round", 1) if o["action"] == "made"} == {
        "rollouts/round=1", "scores/kind=rollout/round=1", "grades/round=1", "shards/round=1/route=rl", "shards/round=1/route=sft",
    }  # fmt: skip
    assert all(table(a_copy, n).equals(before[n]) for n in before)
    assert kept == {p: p.stat().st_mtime_ns for p in a_copy.rglob("part-*.parquet") if "round=1" not in str(p)}
    assert outcomes("train", a_copy, "--round", 1)[0]["action"] == "nothing"


def test_raising_k_adds_rows_and_keeps_the_ones_that_are_there(a_copy: Path) -> None:
    before = table(a_copy, "rollouts").filter(pl.col("round") == 1)
    (made,) = outcomes("generate", "rollouts", a_copy, "--round", 1, "--set", "rollouts.k=6")
    assert (made["action"], made["added"]) == ("added", 40 * 2)
    after = table(a_copy, "rollouts").filter(pl.col("round") == 1)
    assert after.filter(pl.col("sample") < 4).equals(before)


def test_log_probs_rounded_to_float16_change_nothing_else(a_copy: Path) -> None:
    def of_round(name: str) -> pl.DataFrame:
        return table(a_copy, name).filter(pl.col("round") == 1)

    before = {name: of_round(name) for name in ("rollouts", "grades", "shards")}
    sets = ("--round", 1, "--set", "rollouts.logprobs='float16'")
    dypo("generate", "rollouts", a_copy, *sets, "--regenerate")
    dypo("score", a_copy, "--round", 1)
    dypo("grade", a_copy, "--round", 1)
    assert of_round("grades").equals(before["grades"])
    for name, column in (("rollouts", "logprobs"), ("shards", "old_logprobs")):
        assert of_round(name).drop(column).equals(before[name].drop(column))
    kept = of_round("rollouts").select("rollout_id", pl.col("logprobs").alias("rounded"))
    kept = before["rollouts"].join(kept, on="rollout_id").explode("logprobs", "rounded")
    assert kept.schema["rounded"] == pl.Float32
    assert 0 < (kept["logprobs"] - kept["rounded"]).abs().max() < 0.01


def test_log_probs_of_another_rounding_are_not_added_to_a_half_done_table(a_copy: Path) -> None:
    """Rows of both roundings would pass for one table; the ids are the same."""
    dypo("generate", "rollouts", a_copy, "--round", 1, "--set", "rollouts.logprobs='float32'")  # as by default
    float16 = ("--set", "rollouts.logprobs='float16'")
    got = dypo("generate", "rollouts", a_copy, "--round", 1, "--set", "rollouts.k=6", *float16, check=False)
    assert got.returncode == 2
    assert "logprobs: None -> 'float16'" in got.stderr
    (a_copy / "rollouts" / "round=1" / "manifest.json").unlink()
    got = dypo("generate", "rollouts", a_copy, "--round", 1, *float16, check=False)
    assert got.returncode == 2
    assert "unfinished work of another recipe" in got.stderr
    got = dypo("eval", a_copy, "--round", 1, *float16, check=False)
    assert got.returncode == 2
    assert "logprobs: None -> 'float16'" in got.stderr


def test_another_temperature_is_refused_without_regenerate(a_copy: Path) -> None:
    got = dypo("generate", "rollouts", a_copy, "--round", 1, "--set", "rollouts.temperature=0.7", check=False)
    assert got.returncode == 2
    assert "temperature: 1.0 -> 0.7" in got.stderr
    assert "--regenerate" in got.stderr
    assert partitions(a_copy, "rollouts")[1].manifest() is not None


def test_a_users_own_grading_query_is_used(a_copy: Path, tmp_path: Path) -> None:
    from pipeline.store import sql

    own = tmp_path / "own.sql"
    own.write_text(sql("grade").replace("when grade = 'easy' then 'easy'", "when grade = 'easy' then 'stale'"))
    dypo("grade", a_copy, "--round", 0, "--set", f"grade.query={own}")
    reasons = set(table(a_copy, "grades").filter((pl.col("round") == 0) & (pl.col("grade") == "easy"))["reason"])
    assert reasons == {"stale"}
    own.write_text("select 1 as x")
    got = dypo("grade", a_copy, "--round", 0, check=False)
    assert got.returncode == 2
    assert "own.sql: the result lacks" in got.stderr


def test_the_report_names_no_outside_address(undisturbed: Path) -> None:
    html = (undisturbed / "report.html").read_text()
    assert "<svg" in html
    for word in ("<script src", "<link", "@import", 'src="http', "url(http"):
        assert word not in html


def test_sql_prints_rows_and_json(undisturbed: Path) -> None:
    query = "select round, grade, count(*) from grades group by all order by all"
    rows = [json.loads(line) for line in dypo("sql", undisturbed, query, "--json").stdout.splitlines()]
    assert sum(r["count_star()"] for r in rows) == 80
    assert "grade" in dypo("sql", undisturbed, query).stdout


@pytest.mark.parametrize(
    "text",
    ["copy (select 1) to 'x.parquet'", "select 1; drop view grades", "attach 'x'", "explain analyze select 1", "selct"],
)
def test_sql_takes_one_select_and_nothing_else(undisturbed: Path, text: str) -> None:
    got = dypo("sql", undisturbed, text, check=False)
    assert got.returncode == 2
    assert got.stderr.startswith("error: sql:")


def test_explain_tells_why_a_prompt_was_trained_on(undisturbed: Path) -> None:
    prompt = table(undisturbed, "draws")["prompt_id"][0]
    found = json.loads(dypo("explain", undisturbed, prompt[:12], "--json").stdout)
    assert prompt in json.dumps(found)
    assert prompt[:12] in dypo("explain", undisturbed, prompt).stdout


def test_plan_on_a_fresh_recipe_runs_nothing(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    *rows, sizes = [json.loads(line) for line in dypo("plan", path, "--json").stdout.splitlines()]
    assert (sizes["kind"], sizes["slots"]["step_most"], sizes["parameters"]) == ("sizes", 6 * 4 * 63, 108_032)
    states = {r["partition"]: r["state"] for r in rows}
    assert states["prompts"] == "due"
    assert states["rollouts/round=1"] == "waits"
    assert next(r for r in rows if r["partition"] == "rollouts/round=0")["max_tokens"] == 40 * 4 * 64
    assert not (tmp_path / "run").exists()


def test_evals_have_intervals_around_their_value(undisturbed: Path) -> None:
    evals = table(undisturbed, "evals")
    assert set(evals["metric"]) == {"avg@2", "pass@1", "pass@2"}
    assert set(evals.select("round", "step").unique().iter_rows()) == {(0, 0), (1, 6)}
    assert evals.filter((pl.col("ci_low") > pl.col("value")) | (pl.col("ci_high") < pl.col("value"))).is_empty()
    assert evals.filter((pl.col("ci_high") - pl.col("ci_low")) <= 0).is_empty()


def test_the_sampled_log_probs_are_those_of_the_trainers_forward(undisturbed: Path) -> None:
    """Behaviour ratio 1 right after the rollout (ALGORITHMS test 23): round 0 is the base policy's own."""
    from trainer.api import sequence_logprobs

    rows = table(undisturbed, "rollouts").filter(pl.col("round") == 0).head(12).to_dicts()
    policy = Path(__file__).parent.parent.parent / "data" / "tiny_policy"
    for row in rows:
        again = sequence_logprobs(policy, row["prompt_tokens"], row["tokens"], row["temperature"])
        assert max(abs(a - b) for a, b in zip(again, row["logprobs"], strict=True)) < 1e-3


def test_views_show_one_row_for_each_row_on_disk(undisturbed: Path) -> None:
    con = connect(undisturbed)
    for name in TABLES:
        assert con.execute(f"select count(*) from {name}").fetchall()[0][0] == sum(
            m.rows for p in partitions(undisturbed, name) if (m := p.manifest())
        )


def test_after_a_change_of_a_verifier_the_documented_query_tells_which_verdicts_flipped(a_copy: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sql.md").read_text()
    query = page.split("## Verdicts that flipped")[1].split("```sql\n")[1].split("```")[0]
    assert dypo("sql", a_copy, query, "--json").stdout == ""
    before = table(a_copy, "scores").filter((pl.col("kind") == "rollout") & (pl.col("round") == 0))
    dypo(
        "score", a_copy, "--round", 0, "--set", "score.verifiers.sum.extract='^[^>]*>([0-9])$'"
    )  # answers of one digit only
    after = table(a_copy, "scores").filter((pl.col("kind") == "rollout") & (pl.col("round") == 0))
    both = before.join(after, on="id", suffix="_now").filter(pl.col("status") != pl.col("status_now"))
    told = [json.loads(line) for line in dypo("sql", a_copy, query, "--json").stdout.splitlines()]
    flips = {(row["was"], row["became"]): row["rows"] for row in told if row["kind"] == "rollout" and row["round"] == 0}
    assert flips == {(was, became): n for was, became, n in both.group_by("status", "status_now").len().rows()} != {}
