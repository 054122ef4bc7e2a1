"""kill -9 in the middle of each stage, the same command again: the same tables as an undisturbed run, no row twice."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from schemas.tables import TABLES
from tests.tiny_runs import dypo, kill_when, table

MOMENTS = "shard-00001-model-00001-of-00001.safetensors"
STAGES = {  # stage: (command, partitions to take away first, table to watch, parts of it to wait for)
    "teachers": (["generate", "teachers"], ["traces"], "traces", 1),
    "rollouts": (["generate", "rollouts", "--round", 0], ["rollouts/round=0"], "rollouts/round=0", 2),
    "score": (["score", "--round", 0], ["scores/kind=rollout/round=0", "scores/kind=trace"], "scores", 1),
    "grade": (["grade", "--round", 0], ["grades/round=0", "shards/round=0"], "grades/round=0", 1),
    "train": (["train", "--round", 1], ["checkpoints/round=1", "draws/round=1", "metrics/round=1"], "draws/round=1", 2),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_in_the_same_rows(stage: str, undisturbed: Path, a_copy: Path) -> None:
    command, taken, watched, parts = STAGES[stage]
    for name in taken:
        shutil.rmtree(a_copy / name)
    args = [*command, a_copy]
    killed = kill_when(args, lambda: len(list((a_copy / watched).rglob("part-*.parquet"))) >= parts)
    assert killed, "the stage ended before it could be killed"
    if stage == "rollouts":
        assert not (a_copy / watched / "manifest.json").exists()
    dypo(*args)
    for name in TABLES:
        assert table(a_copy, name).equals(table(undisturbed, name)), name
    if stage == "train":
        for step in (2, 4, 6):
            mine, theirs = (run / "checkpoints/round=1" / f"step={step}" for run in (a_copy, undisturbed))
            for file in ("model.safetensors", "trainer/state.json"):
                assert (mine / file).read_bytes() == (theirs / file).read_bytes(), (step, file)
            moments = [load_file(folder / "trainer/tensors" / MOMENTS) for folder in (mine, theirs)]  # a header in any order
            assert moments[0].keys() == moments[1].keys()
            assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0]), step
    assert not list(a_copy.rglob(".*.tmp"))
