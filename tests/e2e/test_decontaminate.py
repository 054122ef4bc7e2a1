"""[decontaminate] through the real command: what is dropped stays in the run as rows, and reaches no later stage."""

import json
from pathlib import Path

import polars as pl

from tests.tiny_runs import ROOT, dypo, table, write_recipe

EVAL = (ROOT / "data/tiny/eval_id.jsonl").read_text().splitlines()[:3]


def recipe(tmp_path: Path) -> Path:
    """20 train prompts, of which 2 are eval prompts in another layout."""
    train = [json.loads(line) for line in (ROOT / "data/tiny/train.jsonl").read_text().splitlines()[:18]]
    train += [{**json.loads(line), "prompt": f" {json.loads(line)['prompt']} "} for line in EVAL[:2]]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    return write_recipe(tmp_path, **{f'path = "{ROOT}/data/tiny/train.jsonl"': f'path = "{tmp_path}/mine.jsonl"'})


def test_train_prompts_that_share_text_with_eval_prompts_are_rows_and_reach_no_later_stage(tmp_path: Path) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    dypo("ingest", path)
    assert table(run, "prompts")["split"].value_counts().sort("split").rows() == [("eval", 12), ("train", 20)]
    got = dypo("ingest", path, "--set", "decontaminate.action=flag")
    assert "contaminated prompt_id=2 eval_prompt_id=2" in got.stdout
    assert table(run, "contamination").height == 2
    assert table(run, "prompts").filter(pl.col("split") == "train").height == 20
    dypo("ingest", path, "--set", "decontaminate.action=drop")
    dropped = table(run, "prompts").filter(pl.col("split") == "contaminated")
    assert dropped["prompt_id"].to_list() == table(run, "contamination")["prompt_id"].to_list()
    dypo("generate", "teachers", run)
    assert table(run, "traces")["prompt_id"].n_unique() == 18
    assert not set(table(run, "traces")["prompt_id"]) & set(dropped["prompt_id"])
    told = dypo("explain", run, dropped["prompt_id"][0])
    assert "dropped from training: it shares text with an eval prompt" in told.stdout
    assert "shares text with" in told.stdout


def test_going_back_to_other_settings_brings_their_tables_back(tmp_path: Path) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    dypo("ingest", path)
    dypo("ingest", path, "--set", "decontaminate.ngram=5")
    assert table(run, "contamination").height == 2
    assert "nothing to do" in dypo("ingest", run).stdout
    dypo("ingest", path)
    assert table(run, "contamination").height == 0
    assert not (run / "contamination").exists()
    dypo("ingest", path, "--set", "decontaminate.ngram=5")
    assert table(run, "contamination").height == 2
    assert "nothing harmed" in dypo("verify", run).stdout


def test_a_source_that_is_all_contaminated_is_refused(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    lines = (tmp_path / "mine.jsonl").read_text().splitlines()[18:]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    got = dypo("ingest", path, "--set", "decontaminate.action=drop", check=False)
    assert got.returncode == 2
    assert "all 2 train prompts share text with an eval prompt" in got.stderr
    assert not (tmp_path / "run/contamination").exists()
