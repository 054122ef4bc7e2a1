"""What happens at the edges: removed pieces, settings that go and come back, rows made again, prompts that shrink."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tests.tiny_runs import ROOT, dypo, table


def outcomes(*args: object) -> list[dict]:
    return [json.loads(line) for line in dypo(*args, "--json").stdout.splitlines()]


def states(run: Path, *args: object) -> dict[str, str]:
    *rows, _sizes = [json.loads(line) for line in dypo("plan", run, *args, "--json").stdout.splitlines()]
    return {r["partition"]: r["state"] for r in rows}


@pytest.mark.parametrize(
    "removed", [["checkpoints/round=1"], ["checkpoints/round=1/step=6"], ["metrics/round=1"], ["draws/round=1"]]
)
def test_a_removed_piece_of_a_trained_round_is_made_again_and_the_rest_agrees(
    removed: list[str], a_copy: Path, undisturbed: Path
) -> None:
    for name in removed:
        shutil.rmtree(a_copy / name)
    assert outcomes("train", a_copy, "--round", 1)[-1]["action"] == "made"
    for name in ("draws", "metrics"):
        assert table(a_copy, name).equals(table(undisturbed, name)), name
    weights = Path("checkpoints/round=1/step=6/model.safetensors")
    assert (a_copy / weights).read_bytes() == (undisturbed / weights).read_bytes()
    assert outcomes("train", a_copy, "--round", 1)[-1]["action"] == "nothing"


def test_a_training_of_other_settings_is_kept_and_comes_back(a_copy: Path) -> None:
    before = (a_copy / "checkpoints/round=1/manifest.json").read_bytes()
    got = dypo("train", a_copy, "--round", 1, "--set", "train.method.alpha=0.2", check=False)
    assert got.returncode == 2
    assert "train.method.alpha: 0.5 -> 0.2" in got.stderr
    assert "--regenerate" in got.stderr
    other = outcomes("train", a_copy, "--round", 1, "--set", "train.method.alpha=0.2", "--regenerate")[-1]
    assert other["action"] == "made"
    assert outcomes("train", a_copy, "--round", 1, "--set", "train.method.alpha=0.5")[-1]["action"] == "nothing"
    assert (a_copy / "checkpoints/round=1/manifest.json").read_bytes() == before
    back = outcomes("train", a_copy, "--round", 1, "--set", "train.method.alpha=0.2")[-1]
    assert (back["action"], back["facts"]) == ("nothing", other["facts"])


def test_rounds_can_be_added_to_a_finished_run_and_micro_batches_resized(a_copy: Path) -> None:
    now = states(a_copy, "--set", "rounds=3", "--set", "train.micro_batch_tokens=4096")
    assert {v for k, v in now.items() if "round=2" not in k} == {"done"}
    assert now["rollouts/round=2"] == "due"


def test_a_mean_with_the_base_makes_the_last_policy_anew_and_no_other(a_copy: Path) -> None:
    def trained(*args: object) -> dict[str, str]:
        return {k: v for k, v in states(a_copy, "--set", "train.base_weight=0.1", *args).items() if "checkpoints" in k}

    assert trained() == {"checkpoints/round=0": "done", "checkpoints/round=1": "stale"}
    more = trained("--set", "rounds=3")
    assert (more["checkpoints/round=0"], more["checkpoints/round=1"]) == ("done", "done"), "there it is not the last one"
    past = dypo("generate", "rollouts", a_copy, "--round", 2, "--set", "train.base_weight=0.1", check=False)
    assert past.returncode == 2
    assert "round 2 is past the run's last, 1, which with train.base_weight ends with the mean" in past.stderr


def test_text_that_was_made_again_is_judged_again(a_copy: Path, tmp_path: Path) -> None:
    """Same ids, other texts: what a deleted teacher's server gives back."""
    mine = tmp_path / "mine.py"
    setting = f"teachers.left.engine={{type='program', program='{mine}:write'}}"
    mine.write_text("from pipeline.tiny import gold\ndef write(prompt, rng, **row):\n    return '0>' + gold(prompt)\n")
    dypo("generate", "teachers", a_copy, "--set", setting)
    dypo("score", a_copy)
    left = pl.col("teacher") == "left"
    assert set(table(a_copy, "scores").filter(left)["status"]) == {"ok"}
    path = next((a_copy / "traces/teacher=left").glob("part-*.parquet"))
    fingerprint = json.loads((path.parent / "manifest.json").read_text())["fingerprint"]
    from pipeline.store import partition, read_parts

    rows = read_parts([path], "traces")
    shutil.rmtree(path.parent)
    wrong = rows.set_column(4, rows.schema.field(4), [["0>0"] * rows.num_rows])
    partition(a_copy, "traces", {"teacher": "left"}).write(wrong, fingerprint)
    dypo("generate", "teachers", a_copy)
    dypo("score", a_copy)
    assert set(table(a_copy, "scores").filter(left)["status"]) == {"wrong"}
    assert states(a_copy)["grades/round=0"] == "stale"


def test_an_altered_checkpoint_samples_nothing(a_copy: Path) -> None:
    path = a_copy / "checkpoints/round=0/step=6/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\0\0\0\0"
    path.write_bytes(data)
    shutil.rmtree(a_copy / "rollouts/round=1")
    got = dypo("generate", "rollouts", a_copy, "--round", 1, check=False)
    assert got.returncode == 2
    assert str(path) in got.stderr


def test_a_refused_setting_stays_out_of_the_run(a_copy: Path) -> None:
    before = (a_copy / "recipe.toml").read_text()
    for round, setting in ((1, "rollouts.temperature=0.7"), (0, "policy.model='nowhere'")):
        assert dypo("generate", "rollouts", a_copy, "--round", round, "--set", setting, check=False).returncode == 2
        assert (a_copy / "recipe.toml").read_text() == before
    assert set(states(a_copy).values()) == {"done"}


@pytest.mark.parametrize(
    "stage", [("generate",), ("score", "--round", 0), ("grade", "--round", 0), ("train", "--round", 0), ("run",)]
)
@pytest.mark.parametrize("setting", ["policy.model='nowhere'", "train.method.query='no/such.sql'"])
def test_a_file_that_is_not_there_stays_out_of_a_finished_run_even_where_nothing_is_to_be_done(
    a_copy: Path, stage: tuple, setting: str
) -> None:
    before = (a_copy / "recipe.toml").read_text()
    got = dypo(stage[0], a_copy, *stage[1:], "--set", setting, check=False)
    assert got.returncode == 2
    assert setting.split("'")[1] in got.stderr
    assert (a_copy / "recipe.toml").read_text() == before


def test_prompts_that_leave_the_source_leave_the_grades(a_copy: Path) -> None:
    dypo("ingest", a_copy, "--set", "sources.sums.limit=40")
    kept = table(a_copy, "prompts").filter(pl.col("split") == "train")["prompt_id"]
    dypo("generate", "teachers", a_copy)
    dypo("score", a_copy, "--round", 0)
    dypo("grade", a_copy, "--round", 0)
    graded = table(a_copy, "grades").filter(pl.col("round") == 0)
    assert 0 < graded.height < 40
    assert set(graded["prompt_id"]) <= set(kept)


def test_fewer_samples_of_a_teacher_are_fewer_traces_in_the_shards(a_copy: Path) -> None:
    dypo("grade", a_copy, "--round", 0, "--set", "teachers.noisy.samples=1")
    noisy = table(a_copy, "shards").filter((pl.col("round") == 0) & (pl.col("teacher") == "noisy"))
    assert set(noisy["sample"]) == {0}


def test_staleness_spreads_to_everything_made_from_it(a_copy: Path) -> None:
    now = states(a_copy, "--set", "score.timeout_s=5")
    for name in ("scores/kind=rollout/round=0", "grades/round=0", "shards/round=1/route=rl", "checkpoints/round=1"):
        assert now[name] == "stale", name
    assert now["rollouts/round=0"] == "done"


def test_shards_of_another_policy_are_not_trained_on(a_copy: Path) -> None:
    dypo("train", a_copy, "--round", 0, "--set", "train.method.alpha=0.2", "--regenerate")
    got = dypo("train", a_copy, "--round", 1, check=False)
    assert got.returncode == 2
    assert "--round 1 --regenerate" in got.stderr


def test_a_round_with_nothing_to_train_on_does_not_end_the_run(a_copy: Path) -> None:
    from pipeline.store import sql

    easy = a_copy.parent / "all_easy.sql"
    easy.write_text(sql("grade").replace("when incomplete then 'incomplete_group'", "when true then 'easy'"))
    dypo("grade", a_copy, "--round", 1, "--set", f"grade.query={easy}")
    got = dypo("run", a_copy, "--regenerate")
    assert "reason empty" in got.stdout
    assert set(table(a_copy, "evals").select("round", "step").unique().iter_rows()) >= {(0, 0), (1, 0)}


def test_the_run_can_be_used_from_another_folder_and_moved(
    a_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "elsewhere"
    a_copy.rename(moved)
    assert set(states(moved).values()) == {"done"}
    assert {o["action"] for o in outcomes("grade", moved)} == {"nothing"}
    assert (ROOT / "recipes").is_dir()


def test_a_users_program_that_moved_is_the_same_teacher(a_copy: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("from pipeline.tiny import gold\ndef write(prompt, rng, **row):\n    return '0>' + gold(prompt)\n")
    dypo("generate", "teachers", a_copy, "--set", f"teachers.left.engine={{type='program', program='{mine}:write'}}")
    moved = tmp_path / "other.py"
    mine.rename(moved)
    made = outcomes("generate", "teachers", a_copy, "--set", f"teachers.left.engine.program='{moved}:write'")
    assert {o["action"] for o in made} == {"nothing"}


def test_a_full_disk_while_a_checkpoint_is_written_keeps_the_earlier_ones(a_copy: Path, undisturbed: Path) -> None:
    for name in ("checkpoints", "draws", "metrics"):
        shutil.rmtree(a_copy / name / "round=1")
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); "
    code += (
        f"import sys; sys.argv = ['dypo', 'train', {str(a_copy)!r}, '--round', '1']; from pipeline.cli import main; main()"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert got.returncode == 1, got.stderr
    assert "the checkpoint could not be written" in got.stderr
    assert "Traceback" not in got.stderr
    assert not list(a_copy.rglob(".*.tmp"))
    dypo("train", a_copy, "--round", 1)
    weights = Path("checkpoints/round=1/step=6/model.safetensors")
    assert (a_copy / weights).read_bytes() == (undisturbed / weights).read_bytes()
