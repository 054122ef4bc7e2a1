"""Bad input and broken things: exit code 2 or 1, a message with the place and the way out, and nothing lost."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny_runs import ROOT, dypo, table, write_recipe


def refused(*args: object, code: int = 2) -> str:
    got = dypo(*args, check=False)
    assert got.returncode == code, got.stderr
    assert "Traceback" not in got.stderr
    return got.stderr


def source(tmp_path: Path, lines: list[object]) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return write_recipe(tmp_path, **{f'path = "{ROOT}/data/tiny/train.jsonl"': f'path = "{path}"'})


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    assert "no such file" in refused("plan", tmp_path / "none.toml")
    assert "not a run" in refused("status", tmp_path)
    assert "not a run folder" in refused("sql", tmp_path, "select 1")


def test_an_unknown_command_or_option_is_bad_usage() -> None:
    refused("gradee")
    refused("grade")
    refused("grade", "recipes/tiny.toml", "--rond", 1)


def test_a_missing_model_folder_is_refused_before_anything_is_generated(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, **{f'model = "{ROOT}/data/tiny_policy"': 'model = "no/such/policy"'})
    dypo("ingest", path)
    told = refused("generate", "rollouts", path)
    assert "no/such/policy" in told


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("policy.model='no/such/policy'", "no/such/policy: expected a Hugging Face model folder"),
        ("score.verifiers.sum={type='user', function='no/such.py:f'}", "no/such.py:f: cannot read the file"),
        ("grade.query='no/such.sql'", "no/such.sql: no such query file"),
        ("train.method.query='no/such.sql'", "no/such.sql: no such query file"),
    ],
)
def test_a_run_whose_late_stages_cannot_work_pays_for_no_teacher(setting: str, told: str, tmp_path: Path) -> None:
    assert told in refused("run", write_recipe(tmp_path), "--set", setting)
    assert [p.name for p in (tmp_path / "run").iterdir() if p.is_dir()] == []


def test_weights_that_do_not_load_leave_the_rows_that_were_to_be_made_again(a_copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "broken_policy"
    shutil.copytree(ROOT / "data" / "tiny_policy", other)
    (other / "model.safetensors").write_bytes(b"{}")
    before = (a_copy / "rollouts/round=0/manifest.json").read_bytes()
    told = refused("generate", "rollouts", a_copy, "--round", 0, "--regenerate", "--set", f"policy.model={other}")
    assert f"{other}: expected a causal language model that transformers can load" in told
    assert (a_copy / "rollouts/round=0/manifest.json").read_bytes() == before
    assert "nothing to do" in dypo("generate", "rollouts", a_copy, "--round", 0).stdout


def started(*args: object) -> subprocess.Popen[str]:
    """The command in a fresh process."""
    command = [sys.executable, "-m", "pipeline", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_ctrl_c_ends_a_stage_with_130_and_the_same_command_goes_on(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    process = started("run", path)
    assert process.stdout is not None
    process.stdout.readline()  # prompts are made; teachers and evals are not
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in told
    assert "Traceback" not in told
    assert "nothing to do" in dypo("ingest", path).stdout


def test_ctrl_c_in_the_midst_of_a_query_is_told_as_one_too(a_copy: Path, tmp_path: Path) -> None:
    """DuckDB raises a RuntimeError in its place."""
    endless = tmp_path / "endless.sql"
    counts = "(select count(*) from range(1000000000000))"
    endless.write_text(f"from ({(ROOT / 'pipeline/sql/grade.sql').read_text()}) where {counts} > 0")
    process = started("grade", a_copy, "--round", 1, "--set", f"grade.query={endless}")
    while process.poll() is None and "endless" not in (a_copy / "recipe.toml").read_text():
        time.sleep(0.1)
    time.sleep(3)  # what comes before the query
    process.send_signal(signal.SIGINT)
    try:
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, told) == (130, "interrupted: finished rows are kept; the same command goes on\n")


def test_a_prompt_without_an_answer_is_refused_by_file_and_row(tmp_path: Path) -> None:
    told = refused("ingest", source(tmp_path, [{"prompt": "8+46", "answer": "45"}, {"prompt": "1+2"}]))
    assert "mine.jsonl" in told
    assert "2" in told
    assert "answer" in told


def test_duplicate_prompts_are_refused_by_row(tmp_path: Path) -> None:
    told = refused("ingest", source(tmp_path, [{"prompt": "8+46", "answer": "45"}] * 2))
    assert "mine.jsonl" in told
    assert "8+46" in told


def test_a_prompt_on_both_sides_of_the_split_is_refused(tmp_path: Path) -> None:
    first = (ROOT / "data/tiny/eval_id.jsonl").read_text().splitlines()[0]
    told = refused("ingest", source(tmp_path, [first]))
    assert "sums" in told
    assert "fresh" in told


def test_a_gold_answer_that_does_not_parse_is_refused(tmp_path: Path) -> None:
    path = source(tmp_path, [{"prompt": "8+46", "answer": "\\frac{"}])
    told = refused("ingest", path, "--set", "score.verifiers.sum={type='math'}")
    assert "8+46" in told


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    assert "mine.jsonl" in refused("ingest", source(tmp_path, []))


def test_a_parquet_source_of_another_schema_is_refused_with_the_columns_that_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"colour": ["red"]}), tmp_path / "mine.parquet")
    path = write_recipe(tmp_path, **{f'path = "{ROOT}/data/tiny/train.jsonl"': f'path = "{tmp_path}/mine.parquet"'})
    told = refused("ingest", path)
    assert "mine.parquet" in told
    assert "colour" in told


def test_stages_out_of_order_name_the_command_that_is_missing(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    assert "dypo ingest" in refused("generate", path)
    assert "dypo generate" in refused("score", path)
    assert "dypo generate" in refused("grade", path)
    assert "dypo generate" in refused("train", path)


@pytest.mark.parametrize("harm", ["truncated", "altered", "foreign"])
def test_a_harmed_part_file_stops_the_next_stage_by_name(harm: str, a_copy: Path) -> None:
    path = next((a_copy / "rollouts" / "round=0").glob("part-*.parquet"))
    data = path.read_bytes()
    if harm == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "altered":
        path.write_bytes(data[:200] + bytes([data[200] ^ 255]) + data[201:])
    else:
        pq.write_table(pa.table({"x": [1]}), path)
    shutil.rmtree(a_copy / "grades" / "round=0")
    told = refused("grade", a_copy, "--round", 0)
    assert str(path) in told
    assert "delete" in told
    shutil.rmtree(a_copy / "rollouts" / "round=0")
    dypo("generate", "rollouts", a_copy, "--round", 0)
    dypo("grade", a_copy, "--round", 0)


def test_another_tokenizer_than_the_rollouts_is_refused(a_copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other_policy"
    shutil.copytree(ROOT / "data" / "tiny_policy", other)
    template = other / "chat_template.jinja"
    template.write_text("{{ '!' }}" + template.read_text())
    told = refused("grade", a_copy, "--round", 0, "--set", f"policy.model={other}")
    assert "another tokenizer or chat template" in told


def test_training_does_not_resume_over_other_shards(a_copy: Path) -> None:
    (a_copy / "checkpoints" / "round=1" / "manifest.json").unlink()
    for name in ("draws", "metrics"):
        (a_copy / name / "round=1" / "manifest.json").unlink()
    dypo("grade", a_copy, "--round", 1, "--set", "grade.easy_max_failures=1")
    told = refused("train", a_copy, "--round", 1)
    assert "unfinished training" in told
    assert "--regenerate" in told
    dypo("train", a_copy, "--round", 1, "--regenerate")
    assert (a_copy / "superseded" / "train").is_dir()


def test_nothing_to_train_on_is_said_with_the_grades(a_copy: Path) -> None:
    """Every prompt easy: thresholds that leave neither hard nor mid."""
    easy = a_copy.parent / "all_easy.sql"
    from pipeline.store import sql

    easy.write_text(sql("grade").replace("when incomplete then 'incomplete_group'", "when true then 'easy'"))
    dypo("grade", a_copy, "--round", 1, "--set", f"grade.query={easy}")
    assert "no row to train on" in refused("train", a_copy, "--round", 1)


def test_a_hung_verifier_costs_its_verdict_and_routes_its_group_nowhere(a_copy: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    while solution_str[0] == '9' and solution_str[-1] in '12': pass\n"
        "    return float(solution_str.endswith('>' + ground_truth))\n"
    )
    verifier = f"score.verifiers.sum={{type='user', function='{mine}:compute_score'}}"
    dypo("score", a_copy, "--round", 0, "--set", verifier, "--set", "score.timeout_s=0.5", "--set", "score.max_failed=1.0")
    scores = table(a_copy, "scores")
    hung = scores.filter((scores["kind"] == "rollout") & (scores["round"] == 0) & (scores["status"] == "timeout"))
    assert not hung.is_empty()
    dypo("grade", a_copy, "--round", 0)
    grades = table(a_copy, "grades")
    reasons = grades.filter(grades["prompt_id"].is_in(hung["prompt_id"].to_list()) & (grades["round"] == 0))["reason"]
    assert set(reasons) == {"unjudged"}


def test_a_verifier_that_fails_too_often_stops_the_stage_and_keeps_the_rows(a_copy: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    raise ValueError('no')\n"
    )
    told = refused(
        "score",
        a_copy,
        "--round",
        0,
        "--set",
        f"score.verifiers.sum={{type='user', function='{mine}:compute_score'}}",
        code=1,
    )
    assert "verdicts are timeout or error" in told
    kept = table(a_copy, "scores").filter(pl.col("round") == 0, pl.col("kind") == "rollout")
    assert set(kept["status"]) == {"error", "truncated"}
    before = table(a_copy, "grades")
    told = refused("grade", a_copy, "--round", 0)
    assert "verdicts are timeout or error, more than score.max_failed = 0.1" in told
    assert "mend the verifier or raise score.timeout_s" in told
    assert table(a_copy, "grades").equals(before)
    dypo("grade", a_copy, "--round", 0, "--set", "score.max_failed=1.0")
    assert set(table(a_copy, "grades").filter(pl.col("round") == 0)["reason"]) == {"unjudged"}


def test_rollouts_cut_at_their_length_limit_are_not_graded_past_a_share(a_copy: Path) -> None:
    mine = table(a_copy, "scores").filter(pl.col("round") == 0, pl.col("kind") == "rollout")
    cut = mine.filter(pl.col("status") == "truncated").height
    assert cut > 0
    told = refused("grade", a_copy, "--round", 0, "--set", f"score.max_truncated={(cut - 0.5) / mine.height}")
    assert f"{cut} of {mine.height} rollouts were cut at rollouts.max_tokens = 64" in told
    assert "Raise rollouts.max_tokens and generate again" in told
    said = dypo("grade", a_copy, "--round", 0, "--set", f"score.max_truncated={cut / mine.height}").stdout
    assert "nothing" in said  # the share is no part of what grades are made of


def test_a_chat_template_that_does_not_compile_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other_policy"
    shutil.copytree(ROOT / "data" / "tiny_policy", other)
    (other / "chat_template.jinja").write_text("{% for %}")
    path = write_recipe(tmp_path)
    dypo("ingest", path)
    told = refused("generate", "rollouts", path, "--set", f"policy.model={other}")
    assert "chat template" in told


def test_an_unknown_key_is_refused_by_the_command(tmp_path: Path) -> None:
    assert "did you mean 'steps'" in refused("plan", write_recipe(tmp_path, **{"steps = 6": "stepps = 6"}))
    assert "no entry 'nobody'" in refused("plan", write_recipe(tmp_path), "--set", "teachers.nobody.samples=2")


def with_poison(tmp_path: Path, *poison: str) -> Path:
    """60 good train prompts and some bad ones."""
    good = [json.loads(line) for line in (ROOT / "data/tiny/train.jsonl").read_text().splitlines()[:60]]
    path = source(tmp_path, [*good, *({"prompt": p, "answer": "1"} for p in poison)])
    path.write_text(path.read_text().replace("limit = 60", "limit = 100").replace("prompts_per_round = 40\n", ""))
    return path


@pytest.mark.parametrize(
    ("poison", "why"), [("8+é", "its tokenizer cannot encode"), ("1+" * 100 + "1", "does not fit its context of 128")]
)
def test_a_prompt_that_the_policy_cannot_read_is_a_row_and_the_rest_is_trained_on(
    poison: str, why: str, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from pipeline.tiny import left\n"
        "def teach(prompt, rng):\n"
        "    if len(prompt) > 100 or '\u00e9' in prompt: raise ValueError('I cannot read this')\n"
        "    return left(prompt, rng)\n"
    )
    path, run = with_poison(tmp_path, poison), tmp_path / "run"
    for name in ("tiny.left", "tiny.noisy"):
        path.write_text(path.read_text().replace(f'program = "{name}"', f'program = "{mine}:teach"'))
    for stage in ("ingest", "generate", "score", "grade"):
        dypo(stage, path)
    bad = table(run, "prompts").filter(pl.col("messages").list.last().struct.field("content") == poison)["prompt_id"][0]
    failures = table(run, "failures")
    assert set(failures["prompt_id"]) == {bad}
    assert failures.group_by("stage").len().sort("stage").rows() == [("rollouts", 4), ("teachers", 3)]
    assert all(why in w for w in failures.filter(pl.col("stage") == "rollouts")["why"])
    assert all("ValueError: I cannot read this" in w for w in failures.filter(pl.col("stage") == "teachers")["why"])
    assert table(run, "grades").height == 60
    assert bad not in table(run, "grades")["prompt_id"].to_list()
    assert "nothing to do" in dypo("generate", "rollouts", run).stdout
    assert table(run, "failures").equals(failures)


def test_too_many_prompts_that_the_policy_cannot_read_are_refused_before_any_work(tmp_path: Path) -> None:
    path = with_poison(tmp_path, "8+é", "9+é")
    dypo("ingest", path)
    told = refused("generate", "rollouts", path)
    assert "2 of 62 prompts cannot be asked (at most 2% may)" in told
    assert not (tmp_path / "run/rollouts").exists()


@pytest.mark.parametrize(("what", "name", "limit"), [("rollouts", "rollouts", 6000), ("teachers", "traces", 3000)])
def test_a_full_disk_stops_the_stage_with_exit_code_1_and_the_rest_goes_on(
    what: str, name: str, limit: int, tmp_path: Path, undisturbed: Path
) -> None:
    """The operating system's limit on a file's size stands in for the disk: small parts fit, then none does."""
    path = write_recipe(tmp_path)
    dypo("ingest", path)
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); import sys; "
    code += f"sys.argv = ['dypo', 'generate', {what!r}, {str(path)!r}]; from pipeline.cli import main; main()"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert got.returncode == 1, got.stderr
    assert "could not be written" in got.stderr
    dypo("generate", what, path)
    mine, other = table(tmp_path / "run", name), table(undisturbed, name)
    assert mine.equals(other.filter(pl.col("round") == 0) if what == "rollouts" else other)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.name)
def test_plan_reads_every_shipped_recipe_even_where_its_files_are_missing(recipe: Path, tmp_path: Path) -> None:
    got = dypo("plan", recipe, "--set", f"run='{tmp_path / 'run'}'")
    assert "partitions would be made" in got.stdout
    assert "token slots" in got.stdout
    assert "total" in got.stdout or "there is no folder" in got.stdout
    assert not (tmp_path / "run").exists()


def test_progress_is_a_live_bar_on_a_terminal_and_plain_lines_elsewhere(tmp_path: Path) -> None:
    import os
    import pty

    path = write_recipe(tmp_path)
    dypo("ingest", path)
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "generate", "rollouts", str(path)],
        stderr=child,
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
    )
    os.close(child)
    seen = b""
    while True:
        try:
            data = os.read(parent, 4096)
        except OSError:
            break
        if not data:
            break
        seen += data
    os.close(parent)
    assert process.wait() == 0
    assert b"rollouts/round=0" in seen
    assert b"rows/s" in seen
    assert b"\x1b[" in seen
    plain = dypo("score", path)
    assert "\x1b[" not in plain.stdout + plain.stderr


def test_older_verdicts_stay_in_score_versions(a_copy: Path) -> None:
    from pipeline.store import ask, connect

    before = ask(connect(a_copy), "select count(*) as n from scores").to_pylist()[0]["n"]
    dypo("score", a_copy, "--round", 1, "--set", "score.verifiers.sum={type='exact', extract='>([0-9]+)$'}")
    con = connect(a_copy)
    assert ask(con, "select count(*) as n from scores").to_pylist()[0]["n"] == before
    assert ask(con, "select count(*) as n from score_versions").to_pylist()[0]["n"] > before
