"""The real command with two ranks: the rows and weights of one process, and whatever goes wrong ends in one error and no orphan."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny_runs import ROOT, dypo, table

TWO = ("--set", "train.processes=2")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def graded(undisturbed: Path, folder: Path) -> Path:
    """The small run as `dypo grade` leaves it in round 0."""
    shutil.copytree(undisturbed, folder / "run")
    run = folder / "run"
    (run / "recipe.toml").write_text((run / "recipe.toml").read_text().replace(str(undisturbed), str(run)))
    for name in ("checkpoints", "draws", "metrics", "logprobs", "evals"):
        shutil.rmtree(run / name)
    for path in list(run.rglob("round=1")):
        shutil.rmtree(path)
    return run


def train(run: Path) -> list[object]:
    return ["train", run, "--round", 0, *TWO]


@pytest.fixture
def a_graded_run(undisturbed: Path, tmp_path: Path) -> Path:
    return graded(undisturbed, tmp_path)


@pytest.fixture(scope="module")
def two(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round that two ranks trained undisturbed, with FSDP2."""
    run = graded(undisturbed, tmp_path_factory.mktemp("two"))
    got = dypo(*train(run), env=ENV)
    assert got.stderr == "", "torch's launcher and the ranks keep quiet"
    assert got.stdout.count("\n") == 1, got.stdout
    return run


def ranks(run: Path) -> dict[int, int]:
    """rank: process id, of the ranks that train this run now."""
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                environment = dict(
                    pair.split(b"=", 1) for pair in (process / "environ").read_bytes().split(b"\0") if b"=" in pair
                )
                mine = str(run).encode() in (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if mine and b"RANK" in environment:
                found[int(environment[b"RANK"])] = int(process.name)
    return found


def disturbed(
    run: Path, step: int, act: Callable[[subprocess.Popen, dict[int, int]], None]
) -> subprocess.CompletedProcess[str]:
    """The command with two ranks; `act` is called with it and its ranks at once after checkpoint `step` is there."""
    command = [sys.executable, "-m", "pipeline", *map(str, train(run))]
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        alive: dict[int, int] = {}
        end = time.monotonic() + 200
        while not (run / f"checkpoints/round=0/step={step}/manifest.json").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            alive = alive if len(alive) == 2 else ranks(run)
            time.sleep(0.002)
        act(process, alive)
        said = process.communicate(timeout=100)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, *said)


def one_error(said: str) -> str:
    """The only thing on stderr, which is an error of ours."""
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    return said


def checkpoint(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, and the moments of every rank, by name."""
    folder = run / "checkpoints" / "round=0" / f"step={step}"
    shares = sorted((folder / "trainer" / "tensors").glob("*.safetensors"))
    moments = {f"{at} {name}": value for at, path in enumerate(shares) for name, value in load_file(path).items()}
    return load_file(folder / "model.safetensors") | moments


def assert_bitwise(run: Path, other: Path) -> None:
    for step in (2, 4, 6):
        mine, theirs = checkpoint(run, step), checkpoint(other, step)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), step
    for name in ("draws", "metrics"):
        assert table(run, name).equals(table(other, name)), name


def assert_like_one_process(run: Path, undisturbed: Path, rounds: int = 1) -> None:
    """Rows taken alike, numbers and weights alike but for rounding."""
    mine, one = (
        {name: table(r, name).filter(pl.col("round") < rounds) for name in ("draws", "metrics")} for r in (run, undisturbed)
    )
    for name in ("draws", "metrics"):
        assert_frame_equal(mine[name], one[name], rel_tol=1e-3, abs_tol=1e-5)  # names, ids and steps exactly
    for folder in sorted((undisturbed / "checkpoints").glob("round=*/step=*")):
        path = folder.relative_to(undisturbed) / "model.safetensors"
        if int(folder.parent.name.removeprefix("round=")) < rounds:
            weights, whole = load_file(run / path), load_file(undisturbed / path)
            assert weights.keys() == whole.keys()
            assert max((weights[name] - whole[name]).abs().max().item() for name in whole) < 1e-5, path


def test_two_ranks_take_the_rows_of_one_and_end_in_its_weights(two: Path, undisturbed: Path) -> None:
    assert_like_one_process(two, undisturbed)
    assert len(list((two / "checkpoints/round=0/step=6/trainer/tensors").iterdir())) == 2, "each rank wrote its share"
    again = dypo(*train(two), env=ENV)
    assert "nothing to do" in again.stdout


def test_their_checkpoint_is_a_hugging_face_folder(two: Path) -> None:
    folder = two / "checkpoints" / "round=0" / "step=6"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items() if name in stored)


def test_a_rank_killed_and_then_ctrl_c_each_end_at_once_and_the_round_ends_bitwise_the_same(
    two: Path, a_graded_run: Path
) -> None:
    killed = disturbed(a_graded_run, 2, lambda process, alive: os.kill(alive[1], signal.SIGKILL))
    assert killed.returncode == 1
    assert "rank 1 was killed by signal 9 (SIGKILL)" in one_error(killed.stderr)
    assert not ranks(a_graded_run)

    stopped = disturbed(a_graded_run, 4, lambda process, alive: process.send_signal(signal.SIGINT))
    assert stopped.returncode == 130
    assert stopped.stderr.startswith("interrupted: "), stopped.stderr
    assert stopped.stderr.count("\n") == 1
    assert not ranks(a_graded_run)
    assert not (a_graded_run / "checkpoints/round=0/step=6").exists()

    dypo(*train(a_graded_run), env=ENV)
    assert_bitwise(a_graded_run, two)


def test_ctrl_c_ends_ranks_that_do_not_hear_it(a_graded_run: Path) -> None:
    def act(process: subprocess.Popen, alive: dict[int, int]) -> None:
        os.kill(alive[1], signal.SIGSTOP)  # and rank 0 waits for it, which no signal ends
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        asked.append(time.monotonic())

    asked: list[float] = []
    stopped = disturbed(a_graded_run, 2, act)
    assert time.monotonic() - asked[0] < 20, "torch's launcher would wait for 30 s"
    assert stopped.returncode == 130
    assert stopped.stderr == "interrupted: finished rows are kept; the same command goes on\n"
    assert not ranks(a_graded_run)


def test_what_every_rank_refuses_is_said_once_and_what_was_set_stays_out_of_the_run(a_graded_run: Path) -> None:
    before = (a_graded_run / "recipe.toml").read_text()
    got = dypo(*train(a_graded_run), "--set", "train.lora.target_modules=['no_such_layer']", env=ENV, check=False)
    assert got.returncode == 2
    assert "no_such_layer" in one_error(got.stderr)
    assert (a_graded_run / "recipe.toml").read_text() == before
    assert not ranks(a_graded_run)


def full_disk(run: Path, size: int) -> subprocess.CompletedProcess[str]:
    """The command where no file can be larger than `size`, which stands in for a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    command = [sys.executable, "-m", "pipeline", *map(str, train(run))]
    return subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, preexec_fn=limit, timeout=200)


@pytest.mark.parametrize("whose", ["the leader's", pytest.param("the other's", marks=pytest.mark.slow)])
def test_a_full_disk_under_one_rank_ends_them_all_with_one_error(whose: str, two: Path, a_graded_run: Path) -> None:
    """The model, which the leader writes while the others wait for it; or the larger of two shares, which is not the leader's."""
    folder = two / "checkpoints" / "round=0" / "step=2"
    shares = [path.stat().st_size for path in sorted((folder / "trainer" / "tensors").iterdir())]
    model = (folder / "model.safetensors").stat().st_size
    assert model < shares[0] < shares[1]
    got = full_disk(a_graded_run, model - 1000 if whose == "the leader's" else (shares[0] + shares[1]) // 2)
    assert got.returncode == 1, got.stderr
    assert "step=2: the checkpoint could not be written" in one_error(got.stderr)
    assert not ranks(a_graded_run)
    assert not list((a_graded_run / "checkpoints" / "round=0").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_do_not_outlive_a_killed_command(two: Path, a_graded_run: Path) -> None:
    """kill -9 leaves nobody to end them, and the run's lock was the command's; SIGTERM ends all of them at once."""
    killed = disturbed(a_graded_run, 2, lambda process, alive: process.kill())
    assert killed.returncode == -signal.SIGKILL
    time.sleep(1)
    assert not ranks(a_graded_run)
    ended = disturbed(a_graded_run, 4, lambda process, alive: process.terminate())
    assert ended.returncode == -signal.SIGTERM
    assert not ranks(a_graded_run)
    dypo(*train(a_graded_run), env=ENV)
    assert_bitwise(a_graded_run, two)


@pytest.mark.slow
def test_ranks_that_the_user_starts_with_torchrun_train_and_find_nothing_to_do_the_second_time(
    two: Path, a_graded_run: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "pipeline", "train", str(a_graded_run), "--round", "0"]
    for told in ("steps 6", "nothing to do"):
        got = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=200)
        assert got.returncode == 0, got.stderr
        assert got.stdout.count("checkpoints/round=0: ") == 1
        assert told in got.stdout
    assert_bitwise(a_graded_run, two)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_whole_run_with_two_ranks_and_ddp_is_like_that_of_one(undisturbed: Path, a_graded_run: Path) -> None:
    dypo("run", a_graded_run, *TWO, "--set", "train.spread=ddp", env=ENV)
    assert_like_one_process(a_graded_run, undisturbed)  # what round 1 samples hangs on the last bits of round 0
    metrics = table(a_graded_run, "metrics")
    for round in (0, 1):
        names = metrics.filter(pl.col("round") == round)
        assert names.filter(pl.col("name") == "ess").height == 6
    assert (a_graded_run / "report.html").is_file()
