"""kill -9 in the middle of each stage, the same command again: the same tables as an undisturbed run, no row twice."""

import shutil
from pathlib import Path

import pytest

from schemas.tables import TABLES
from tests.tiny_runs import dypo, kill_when, table

STAGES = {  # stage: (command, partitions to take away first, table to watch, parts of it to wait for)
    "teachers": (["generate", "teachers"], ["traces"], "traces", 1),
    "rollouts": (["generate", "rollouts", "--round", 0], ["rollouts/round=0"], "rollouts/round=0", 2),
    "score": (["score", "--round", 0], ["scores/kind=rollout/round=0", "scores/kind=trace"], "scores", 1),
    "grade": (["grade", "--round", 0], ["grades/round=0", "shards/round=0"], "grades/round=0", 1),
    "train": (["train", "--round", 1], ["checkpoints/round=1", "draws/round=1", "metrics/round=1"], "draws/round=1", 2),
}


def contents(path: Path) -> object:
    """A file's bytes; of safetensors, each tensor's, since torch.distributed.checkpoint writes them in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    from safetensors.numpy import load_file

    return {name: (t.dtype, t.shape, t.tobytes()) for name, t in load_file(path).items()}


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
        for file in ("model.safetensors", "trainer/tensors/*.safetensors", "trainer/state.json"):
            for step in (2, 4, 6):
                paths = sorted((undisturbed / "checkpoints/round=1" / f"step={step}").glob(file))
                assert paths
                for path in paths:
                    assert contents(a_copy / path.relative_to(undisturbed)) == contents(path), path
    assert not list(a_copy.rglob(".*.tmp"))
