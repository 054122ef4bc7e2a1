"""`dypo audit logprobs` on a real run: sampler and trainer agree; where stored log-probs are harmed, training is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.stage import describe_part
from pipeline.store import partition, read_parts
from tests.tiny_runs import dypo, table


def lines(*args: object) -> list[dict]:
    return [json.loads(line) for line in dypo(*args, "--json").stdout.splitlines()]


def harm(run: Path, off_by: float) -> None:
    """Round 1's stored log-probs of the sampler get wrong, by `off_by` nats up and down in turn, and it is graded from them."""
    part = partition(run, "rollouts", {"round": 1})
    manifest = part.manifest()
    assert manifest is not None
    turn = pl.when(pl.element().cum_count() % 2 == 0).then(off_by).otherwise(-off_by)
    wrong = pl.col("logprobs").list.eval((pl.element() + turn).cast(pl.Float32))
    for path in part.files():
        frame = pl.from_arrow(read_parts([path], "rollouts"))
        assert isinstance(frame, pl.DataFrame)
        part.write(frame.with_columns(wrong).to_arrow(), manifest.fingerprint, path.name)
    parts = [describe_part(part.folder / p.name) for p in manifest.parts]
    part.complete(manifest.model_copy(update={"parts": parts}))
    for name in ("grades", "shards", "checkpoints", "draws", "metrics", "logprobs"):
        shutil.rmtree(run / name / "round=1")
    dypo("grade", run, "--round", 1)


def test_sampler_and_trainer_agree_and_the_audit_is_read_the_second_time(a_copy: Path) -> None:
    first = lines("audit", "logprobs", a_copy)
    assert [entry["round"] for entry in first] == [0, 1]
    shards, stored = table(a_copy, "shards"), table(a_copy, "logprobs").filter(pl.col("role") == "old")
    for entry in first:
        rl = shards.filter((pl.col("round") == entry["round"]) & (pl.col("route") == "rl"))
        assert (entry["rows"], entry["tokens"]) == (rl.height, rl["tokens"].list.len().sum())
        assert set(rl["policy"]) == {entry["policy"]} == set(stored.filter(pl.col("round") == entry["round"])["model"])
        both = rl.join(stored, on=["round", "item_id"])
        assert both.height == rl.height
        gaps = np.concatenate([np.subtract(t, s) for t, s in zip(both["logprobs"], both["old_logprobs"], strict=True)])
        assert entry["mean_difference"] == pytest.approx(np.abs(gaps).mean(), abs=1e-9)
        assert entry["mean_difference"] < 1e-5 < entry["limit"] == 0.05
        assert not entry["refused"]
        assert len(entry["worst_tokens"]) == 10
        assert all(token["text"] for token in entry["worst_tokens"])
    parts = {p: p.stat().st_mtime_ns for p in a_copy.rglob("logprobs/**/part-*")}
    assert {p.parent.name for p in parts} == {"role=old", "role=ref"}
    assert lines("audit", "logprobs", a_copy) == first
    assert parts == {p: p.stat().st_mtime_ns for p in a_copy.rglob("logprobs/**/part-*")}
    shown = dypo("audit", "logprobs", a_copy, "--round", 1).stdout
    assert shown.startswith("round 1, policy ")
    assert first[1]["worst_tokens"][0]["item_id"] in shown
    assert lines("train", a_copy, "--round", 1)[-1]["action"] == "nothing"


def test_harmed_log_probs_stop_the_first_update_then_the_audit_then_training_unless_told_otherwise(
    a_copy: Path, tmp_path: Path
) -> None:
    harm(a_copy, 0.3)
    got = dypo("train", a_copy, "--round", 1, check=False)
    assert got.returncode == 1
    assert (
        "train, round 1, step 0: freshly sampled rollouts have log-probs that differ from the trainer's by 0.3 nats"
        in got.stderr
    )
    assert not list(a_copy.glob("checkpoints/round=1/step=*"))
    (entry,) = lines("audit", "logprobs", a_copy, "--round", 1)
    assert entry["refused"]
    assert entry["mean_difference"] == pytest.approx(0.3, abs=1e-4)
    assert entry["ess"] < 0.95
    assert "`dypo train` refuses this round" in dypo("audit", "logprobs", a_copy, "--round", 1).stdout
    got = dypo("train", a_copy, "--round", 1, check=False)
    assert got.returncode == 2
    assert "expected at most train.max_logprob_difference = 0.05" in got.stderr
    assert entry["worst_rows"][0]["item_id"] in got.stderr
    assert "--regenerate" in got.stderr
    assert dypo("train", a_copy, "--round", 1, "--set", "train.max_logprob_difference=0.31").returncode == 0
    assert lines("train", a_copy, "--round", 1, "--set", "train.max_logprob_difference=0.4")[-1]["action"] == "nothing"


def test_a_method_that_reads_the_trainers_log_probs_writes_them_and_looks_at_them(a_copy: Path, tmp_path: Path) -> None:
    settings = ("--set", "train.method.grpo.old='trainer'", "--set", "train.method.grpo.truncation='sequence'")
    planned = {p["partition"]: p["state"] for p in lines("plan", a_copy, *settings) if "partition" in p}
    assert planned["logprobs/round=0/role=old"] == "due"
    made = lines("train", a_copy, "--round", 1, *settings, "--regenerate")
    assert [(o["partition"], o["action"]) for o in made] == [
        ("logprobs/round=1/role=old", "made"), ("logprobs/round=1/role=ref", "nothing"), ("checkpoints/round=1", "made"),
    ]  # fmt: skip
    seen = {
        r["name"]: r["value"] for r in table(a_copy, "metrics").filter(pl.col("round") == 1, pl.col("step") == 0).to_dicts()
    }
    assert seen["mismatch/weight"] == pytest.approx(1.0, abs=1e-3)
    assert seen["mismatch/truncated"] == 0
    draws = table(a_copy, "draws").filter(pl.col("round") == 1, pl.col("route") == "rl")
    assert draws.filter(pl.col("step") == 0)["log_ratio"].abs().max() < 1e-5
    assert draws.filter(pl.col("step") > 0)["log_ratio"].abs().max() > 1e-3
    harm(a_copy, 0.3)
    got = dypo("train", a_copy, "--round", 1, check=False)
    assert got.returncode == 2
    assert "the sampler stored differ from the trainer's by 0.3" in got.stderr
    assert not list(a_copy.glob("checkpoints/round=1/step=*"))


def test_rows_of_a_policy_that_is_gone_cannot_be_audited(a_copy: Path) -> None:
    dypo("train", a_copy, "--round", 0, "--set", "train.method.alpha=0.9", "--regenerate")
    got = dypo("audit", "logprobs", a_copy, "--round", 1, check=False)
    assert got.returncode == 2
    assert "the round before was trained again" in got.stderr
    assert not (a_copy / "logprobs/round=1/role=old").exists()
