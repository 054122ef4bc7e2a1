"""Several processes: one, two and three ranks train to the same weights, checkpoints reshard, a killed rank ends in one error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.golden.runs import BASE
from tests.tiny_runs import ROOT
from tests.trainer.team_worker import main as worker  # noqa: F401  its module is what torchrun starts

WORKER = ["-m", "tests.trainer.team_worker"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(world: int, *args: object, **env: str) -> subprocess.Popen[str]:
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    command = [sys.executable, *ranks, *WORKER, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=ENV | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(world: int, *args: object, **env: str) -> None:
    process = start(world, *args, **env)
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said


def weights(folder: Path, step: int) -> torch.Tensor:
    return torch.cat([t.flatten() for _, t in sorted(load_file(folder / f"step={step}" / "model.safetensors").items())])


def test_one_two_and_three_processes_train_to_the_same_weights(policy_folder: Path, tmp_path: Path) -> None:
    """5 steps in float32; several micro-batches a step, groups larger than the budget, with both ways to spread the model; and the mean with the base, with an adapter and without.

    FSDP2 runs with activation checkpointing, so that this holds too.
    """
    names = ["ddp-float32-5", "fsdp-float32-5", "fsdp-float32-5+lora", "ddp-float32-5+mean", "fsdp-float32-5+lora+mean"]
    for world in (1, 2, 3):
        run(world, tmp_path / str(world), policy_folder, *names)
    start = torch.cat([t.flatten() for _, t in sorted(load_file(policy_folder / "model.safetensors").items())])
    for name in names:
        one = weights(tmp_path / "1" / name, 5)
        for world in (2, 3):
            assert (one - weights(tmp_path / str(world) / name, 5)).abs().max() < 1e-5, (name, world)
        assert (one - start).abs().max() > 1e-2
    alike = weights(tmp_path / "1" / names[0], 5) - weights(tmp_path / "1" / names[1], 5)
    assert alike.abs().max() < 1e-5, "activation checkpointing changes nothing"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sixty_steps_in_float64_agree_within_1e_8(policy_folder: Path, tmp_path: Path) -> None:
    """The tiny Llama, and the embedded policy on the golden runs' rows; and each really trains."""
    names = ["ddp-float64-60", "fsdp-float64-60", "ddp-float64-60+golden", "fsdp-float64-60+golden"]
    for world in (1, 2, 3):
        run(world, tmp_path / str(world), policy_folder, *names)
    for name in names:
        one = weights(tmp_path / "1" / name, 60)
        differences = [(one - weights(tmp_path / str(world) / name, 60)).abs().max().item() for world in (2, 3)]
        print(name, differences)
        assert max(differences) < 1e-8, name
        start = BASE if "golden" in name else policy_folder
        begun = torch.cat([t.flatten() for _, t in sorted(load_file(start / "model.safetensors").items())])
        assert (one - begun).abs().max() > 1e-3, name


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_checkpoint_of_some_ranks_goes_on_with_others(
    before: int, after: int, policy_folder: Path, tmp_path: Path
) -> None:
    """Moments included: FSDP2's shares are put together or dealt out again as they are read."""
    name = "fsdp-float32-4"
    run(1, tmp_path / "whole", policy_folder, name, EVERY="2")
    folder = tmp_path / "cut"
    run(before, folder, policy_folder, name, EVERY="2")
    for late in (folder / name).glob("step=4*"):
        late.rename(late.with_name("gone"))
    run(after, folder, policy_folder, name, EVERY="2")
    assert (weights(tmp_path / "whole" / name, 4) - weights(folder / name, 4)).abs().max() < 1e-5
