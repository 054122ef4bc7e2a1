"""A round that was cut anywhere and started again ends bitwise where an undisturbed one does, with the same rows."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.tiny import FolderSink, Killed, make_job, make_train, stored_tensors
from trainer.checkpoint import load_state
from trainer.run import train_round

QUEUE = {"schedule": "queue", "sft_lr": 2e-2, "queue_size": 2, "queue_groups": 2, "gal": {"ref": "none"}}
VARYING = ("tokens_per_s",)


def rows_that_repeat(sink: FolderSink) -> tuple[list[dict], list[dict]]:
    metrics = [{k: v for k, v in row.items() if k != "when"} for row in sink.rows("metrics") if row["name"] not in VARYING]
    return sink.rows("draws"), metrics


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | stored_tensors(folder)


def assert_bitwise(a: Path, b: Path) -> None:
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture(scope="module", params=["joint", "queue"])
def undisturbed(request: pytest.FixtureRequest, policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    method = QUEUE if request.param == "queue" else {}
    sink = FolderSink(tmp_path_factory.mktemp("undisturbed"))
    train = make_train(method, prompts_per_step=3)
    assert train_round(make_job(policy_folder, sink, train=train)).steps == 6
    return sink, train


@pytest.mark.parametrize(
    "die",
    [("progress", 1), ("progress", 3), ("write", 3), ("write", 4), ("checkpoint", 1), ("checkpoint", 2), ("checkpoint", 3)],
    ids=lambda die: f"{die[0]}-{die[1]}",
)
def test_killed_anywhere_and_run_again_is_bitwise_undisturbed(
    undisturbed: tuple, die: tuple[str, int], policy_folder: Path, tmp_path: Path
) -> None:
    whole, train = undisturbed
    with pytest.raises(Killed):
        train_round(make_job(policy_folder, FolderSink(tmp_path, die=die), train=train))
    again = FolderSink(tmp_path)
    end = train_round(make_job(policy_folder, again, train=train))
    assert (end.steps, end.reason) == (6, "steps")
    assert again.checkpoints().keys() == whole.checkpoints().keys() == {2, 4, 6}
    assert_bitwise(again.checkpoints()[6], whole.checkpoints()[6])
    assert rows_that_repeat(again) == rows_that_repeat(whole)


def test_rows_past_the_checkpoint_resumed_from_are_cut(policy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):  # after the parts of steps 2 and 3 were written, before their checkpoint
        train_round(make_job(policy_folder, FolderSink(tmp_path, die=("checkpoint", 2))))
    sink = FolderSink(tmp_path)
    assert max(row["step"] for row in sink.rows("metrics")) == 3
    assert max(sink.checkpoints()) == 2
    with pytest.raises(Killed):  # at once after cutting
        train_round(make_job(policy_folder, FolderSink(tmp_path, die=("progress", 1))))
    assert max(row["step"] for row in sink.rows("metrics")) == 1
    assert max(row["step"] for row in sink.rows("draws")) == 1


def test_a_finished_round_run_again_changes_nothing(undisturbed: tuple, policy_folder: Path) -> None:
    whole, train = undisturbed
    before, stamp = whole.rows("metrics"), (whole.checkpoints()[6] / "model.safetensors").stat().st_mtime_ns
    again = FolderSink(whole.folder)
    assert train_round(make_job(policy_folder, again, train=train)).reason == "steps"
    assert whole.rows("metrics") == before
    assert (whole.checkpoints()[6] / "model.safetensors").stat().st_mtime_ns == stamp
    assert "write" not in again.calls


def test_the_cursors_in_a_checkpoint_are_the_plan_s(undisturbed: tuple) -> None:
    whole, train = undisturbed
    draws = whole.rows("draws")
    for steps, folder in whole.checkpoints().items():
        state = load_state(folder)
        assert state is not None
        assert state.steps == steps
        assert state.cursor.prompts_drawn == steps * train.prompts_per_step
        assert state.cursor.hard_trained == sum(r["step"] < steps and r["route"] == "sft" for r in draws)


def test_the_next_round_goes_on_with_the_optimizer_s_moments(policy_folder: Path, tmp_path: Path) -> None:
    first = FolderSink(tmp_path / "0")
    train_round(make_job(policy_folder, first))
    end = first.checkpoints()[6]
    second = FolderSink(tmp_path / "1")
    train_round(make_job(end, second, round=1))
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in end.iterdir():
        if path.is_file():
            (bare / path.name).write_bytes(path.read_bytes())
    without = FolderSink(tmp_path / "2")
    train_round(make_job(bare, without, round=1))
    a, b = tensors_of(second.checkpoints()[6]), tensors_of(without.checkpoints()[6])
    steps = [name for name in a if name.startswith("main/") and name.endswith("/step")]
    assert {a[name].item() for name in steps} == {12.0}
    assert {b[name].item() for name in steps} == {6.0}
    assert any(not torch.equal(a[name], b[name]) for name in a if not name.endswith("/step"))
    rates = [row["value"] for row in first.rows("metrics") + second.rows("metrics") if row["name"] == "lr"]
    assert rates[:2] == pytest.approx([5e-3, 1e-2]), "warm-up is the run's, not the round's"
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3)


CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.trainer.tiny import FolderSink, make_job, make_train
from trainer.run import train_round
class Slow(FolderSink):
    def progress(self, done, total, note):
        super().progress(done, total, note)
        print(done, flush=True)
        if done == 4:
            sys.stdin.read()  # until the kill comes, in the middle of the round
train_round(make_job(Path(sys.argv[1]), Slow(Path(sys.argv[2])), train=make_train(checkpoint_every=3)))
"""


def test_kill_9_in_a_real_process_then_the_same_again_is_bitwise_undisturbed(policy_folder: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(policy_folder), str(tmp_path / "killed")]
    with subprocess.Popen(
        command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert any(line.strip() == "4" for line in child.stdout)
        time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    train = make_train(checkpoint_every=3)
    killed, whole = FolderSink(tmp_path / "killed"), FolderSink(tmp_path / "whole")
    assert killed.checkpoints().keys() == {3}
    train_round(make_job(policy_folder, killed, train=train))
    train_round(make_job(policy_folder, whole, train=train))
    assert_bitwise(killed.checkpoints()[6], whole.checkpoints()[6])
    assert rows_that_repeat(killed) == rows_that_repeat(whole)
