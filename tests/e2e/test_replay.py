"""`dypo replay` on the small run: bitwise, nothing written, and what it refuses. The real command where its exit code or
screen is meant, the same function in this process elsewhere."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from pipeline.replay import refuse_difference, render
from pipeline.replay import replay as stage
from pipeline.store import partition
from schemas.errors import UserError, WorkError
from schemas.manifest import Manifest
from tests.tiny_runs import CLOCKED_METRICS, dypo, table


def replay(run: Path, step: int, *overrides: str, round: int = 0) -> dict:
    from trainer import api

    return stage(run, round, step, api, list(overrides))


def files_of(run: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()}


def rewrite(run: Path, table: str, change: pl.Expr) -> None:
    """Alters a column of a table's first part in round 0, with a manifest that knows nothing of it being altered."""
    from pipeline.stage import describe
    from pipeline.store import read_parts

    part = partition(run, table, {"round": 0})
    manifest = part.manifest()
    assert manifest is not None
    path = part.files()[0]
    frame = pl.from_arrow(read_parts([path], table))
    assert isinstance(frame, pl.DataFrame)
    part.write(frame.with_columns(change).to_arrow(), manifest.fingerprint, path.name)
    parts = [describe(path, p.rows) if p.name == path.name else p for p in manifest.parts]
    part.complete(Manifest.model_validate(manifest.model_dump() | {"parts": [p.model_dump() for p in parts]}))


@pytest.mark.parametrize(("round", "step", "start"), [(0, 1, 0), (1, 3, 2), (1, 4, 4)])
def test_a_step_of_the_run_is_bitwise_what_was_trained(round: int, step: int, start: int, undisturbed: Path) -> None:
    before = files_of(undisturbed)
    if step == 3:
        got = json.loads(dypo("replay", undisturbed, "--round", round, "--step", step, "--json").stdout)
    else:
        got = replay(undisturbed, step, round=round)
    stored = table(undisturbed, "metrics").filter((pl.col("round") == round) & (pl.col("step") == step))
    assert got["metrics"] == dict(stored.select("name", "value").iter_rows())
    assert not got["metrics"].keys() & set(CLOCKED_METRICS)
    assert (got["bitwise"], got["from_step"], got["differences"]) == (True, start, [])
    assert got["checkpoint"] == (got["weights"] if step % 2 else None)
    assert got["trained_with"] == got["replayed_with"]
    assert got["trained_with"]["threads"] == 1
    assert files_of(undisturbed) == before


def test_the_screen_says_what_is_equal_and_shows_both_losses(undisturbed: Path) -> None:
    got = dypo("replay", undisturbed, "--round", 0, "--step", 3, "--set", "train.method.alpha=0").stdout
    stored = {r["name"]: r["value"] for r in table(undisturbed, "metrics").to_dicts() if (r["round"], r["step"]) == (0, 3)}
    lines = {line.split()[0]: line.split()[1:] for line in got.splitlines() if line.strip()}
    assert lines["loss/gal"] == [repr(stored["loss/gal"])] * 2
    trained, changed = map(float, lines["loss/total"])
    mid = stored["denom/groups"] / stored["denom/prompts"]
    assert trained == stored["loss/total"]
    assert changed == pytest.approx(trained + mid * 0.5 * (stored["loss/gal"] - stored["loss/grpo"]), rel=1e-6)
    assert "train.method.alpha=0" in got
    assert 0 < float(lines["cosine"][-1]) < 1
    assert f"all of {len(stored)} bitwise equal to the stored ones" in got
    assert "bitwise equal to checkpoint step=4" in got
    assert "no checkpoint step=3 to compare with" in render(replay(undisturbed, 2))


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("rollouts.k=2", "decides which rows there are"),
        ("train.prompts_per_step=3", "which a step takes"),
        ("train.method.schedule=queue", "decides which rows a step takes"),
        ("train.method.preset=paper", "a run gives all"),
        ("train.method.grpo.advantage=none", "would route the round anew"),
        ("train.method.alfa=0", "did you mean 'alpha'"),
    ],
)
def test_an_override_that_is_not_of_the_loss_is_refused_with_the_reason(
    override: str, reason: str, undisturbed: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        replay(undisturbed, 3, override)


def test_a_metric_that_is_not_what_was_computed_ends_with_1_and_says_what_may_be_why(a_copy: Path) -> None:
    here = (pl.col("step") == 1) & (pl.col("name") == "loss/total")
    rewrite(a_copy, "metrics", pl.when(here).then(0.5).otherwise(pl.col("value")).alias("value"))
    got = dypo("replay", a_copy, "--round", 0, "--step", 1, check=False)
    assert got.returncode == 1
    assert "loss/total: stored 0.5, now 0." in got.stdout
    assert "not bitwise. First difference: step 1, loss/total: stored 0.5" in got.stderr
    assert "are those of the training, so a stored row or checkpoint is not what it was" in got.stderr
    path = a_copy / "checkpoints" / "round=0" / "step=2" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"facts": manifest["facts"] | {"environment": {
        **manifest["facts"]["environment"], "torch": "1.0"}}}))  # fmt: skip
    with pytest.raises(WorkError, match=r"trained with torch 1\.0 then, "):
        refuse_difference(replay(a_copy, 1))


def test_a_drawn_row_that_the_plan_does_not_give_is_refused(a_copy: Path) -> None:
    here = (pl.col("step") == 1) & (pl.col("position") == 2)
    rewrite(a_copy, "draws", pl.when(here).then(pl.lit("another")).otherwise(pl.col("item_id")).alias("item_id"))
    got = dypo("replay", a_copy, "--round", 0, "--step", 1, check=False)
    assert got.returncode == 2
    assert "draws, round 0, step 1, position 2" in got.stderr


def test_a_part_that_is_not_what_its_manifest_says_is_refused(a_copy: Path) -> None:
    path = next((a_copy / "metrics" / "round=0").glob("part-*.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="altered"):
        replay(a_copy, 1)


def test_threads_and_micro_batches_are_those_of_the_training_not_of_the_recipe_now(a_copy: Path) -> None:
    recipe = a_copy / "recipe.toml"
    text = recipe.read_text()
    assert "micro_batch_tokens = 16384" in text
    recipe.write_text(text.replace("micro_batch_tokens = 16384", "micro_batch_tokens = 64").replace("threads = 1\n", ""))
    assert replay(a_copy, 1)["bitwise"]


def test_a_round_that_was_trained_otherwise_or_not_at_all_is_refused(a_copy: Path) -> None:
    recipe = a_copy / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("alpha = 0.5", "alpha = 0.4"))
    with pytest.raises(UserError, match=r"trained on other shards or settings .*alpha: 0\.5 -> 0\.4"):
        replay(a_copy, 1)
    for name in ("checkpoints", "draws", "metrics"):
        shutil.rmtree(a_copy / name / "round=1")
    with pytest.raises(UserError, match="no training to replay"):
        replay(a_copy, 1, round=1)


def test_a_changed_loss_that_reads_log_probs_which_are_not_stored_is_refused_and_says_so(a_copy: Path) -> None:
    for name in ("checkpoints", "draws", "metrics", "logprobs"):
        shutil.rmtree(a_copy / name / "round=1")
    dypo("train", a_copy, "--round", 1, "--set", "train.method.gal.ref=none")
    with pytest.raises(UserError, match="reads log-probs of role ref, and the run has none stored"):
        replay(a_copy, 1, "train.method.gal.ref=init", round=1)
    got = replay(a_copy, 1, "train.method.gal.ref=old", round=1)
    assert got["bitwise"]
    assert got["changed"]["loss/gal"] != got["metrics"]["loss/gal"]
