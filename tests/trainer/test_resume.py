"""A round that was cut anywhere and started again ends bitwise where an undisturbed one does, with the same rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from schemas.recipe import Policy
from tests.trainer.tiny import FolderSink, Killed, make_job, make_train, stored_tensors
from trainer.checkpoint import load_state
from trainer.run import train_round

BRIDGE = {"type": "bridge", "adapter_lr": 1e-2, "rank": 4}
QUEUE = {"schedule": "queue", "sft_lr": 2e-2, "queue_size": 2, "queue_groups": 2, "gal": {"ref": "none"}}
VARYING = ("tokens_per_s",)


def rows_that_repeat(sink: FolderSink) -> tuple[list[dict], list[dict]]:
    metrics = [{k: v for k, v in row.items() if k != "when"} for row in sink.rows("metrics") if row["name"] not in VARYING]
    return sink.rows("draws"), metrics


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint's, by file but for those of trainer/."""
    files = [path for path in sorted(folder.rglob("*.safetensors")) if "trainer" not in path.relative_to(folder).parts]
    return {f"{path.relative_to(folder)}: {k}": t for path in files for k, t in load_file(path).items()} | stored_tensors(
        folder
    )


def assert_bitwise(a: Path, b: Path) -> None:
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    states = [(folder / "trainer" / "state.json").read_text() for folder in (a, b)]
    assert states[0] == states[1]


def assert_as_undisturbed(again: FolderSink, whole: FolderSink) -> None:
    """Every checkpoint bitwise (weights, moments, torch's random state, cursors), every row of draws and metrics."""
    assert again.checkpoints().keys() == whole.checkpoints().keys() == {2, 4, 6}
    for step, folder in whole.checkpoints().items():
        assert_bitwise(again.checkpoints()[step], folder)
    assert rows_that_repeat(again) == rows_that_repeat(whole)


@pytest.fixture(scope="module", params=["joint", "queue", "bridge"])
def undisturbed(request: pytest.FixtureRequest, policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    method = {"joint": {}, "queue": QUEUE, "bridge": BRIDGE}[request.param]
    sink = FolderSink(tmp_path_factory.mktemp("undisturbed"))
    train = make_train(method, prompts_per_step=3)
    assert train_round(make_job(policy_folder, sink, train=train)).steps == 6
    return sink, train


CALLS = {"cut": 2, "write": 6, "checkpoint": 3, "progress": 6}  # all that a round asks of its sink


@pytest.mark.parametrize(
    "die", [(m, n + 1) for m, times in CALLS.items() for n in range(times)], ids=lambda d: f"{d[0]}-{d[1]}"
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
    assert_as_undisturbed(again, whole)


def test_in_float64_too_though_models_are_loaded_in_float32_elsewhere(policy_folder: Path, tmp_path: Path) -> None:
    policy = Policy(model=policy_folder, device="cpu", dtype="float64")
    whole, again = FolderSink(tmp_path / "whole"), FolderSink(tmp_path / "cut")
    train_round(make_job(policy_folder, whole, policy=policy))
    with pytest.raises(Killed):
        train_round(make_job(policy_folder, FolderSink(tmp_path / "cut", die=("write", 3)), policy=policy))
    train_round(make_job(policy_folder, again, policy=policy))
    assert load_file(again.checkpoints()[6] / "model.safetensors")["model.norm.weight"].dtype == torch.float64
    assert_as_undisturbed(again, whole)


def test_those_are_all_the_moments_at_which_a_round_touches_the_disk(undisturbed: tuple) -> None:
    assert undisturbed[0].calls == CALLS


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
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.trainer.test_resume import BRIDGE, CALLS, QUEUE
from tests.trainer.tiny import FolderSink, make_job, make_train
from trainer.run import train_round

start, out = map(Path, sys.argv[1:])

class Kills(FolderSink):
    def _called(self, method):
        self.calls[method] = self.calls.get(method, 0) + 1
        if self.die == (method, self.calls[method]):
            os.kill(os.getpid(), signal.SIGKILL)

def process(folder, train, die=None, after=None):
    # one process that trains, killed by itself at a call or from outside after a time; whether it came to its end
    pid = os.fork()
    if pid == 0:
        train_round(make_job(start, Kills(folder, die), train=train))
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0

for name, method in (("joint", {}), ("queue", QUEUE), ("bridge", BRIDGE)):
    train = make_train(method, prompts_per_step=3)
    began = time.monotonic()
    assert process(out / name / "whole", train)
    lasts = time.monotonic() - began
    for at, (method, times) in enumerate(CALLS.items()):
        assert not process(out / name / method, train, die=(method, random.Random(at).randint(1, times)))
        assert process(out / name / method, train)
    for seed in range(2):  # killed again and again at any moment, until it comes to its end by itself
        rng, kills = random.Random(seed), 0
        while not process(out / name / str(seed), train, after=lasts * rng.random() if kills < 4 else None):
            kills += 1
        print(name, seed, kills, flush=True)
"""


def test_kill_9_of_real_processes_at_any_moment_then_the_same_again_is_bitwise_undisturbed(
    policy_folder: Path, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(policy_folder), str(tmp_path)]
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr
    for schedule in ("joint", "queue", "bridge"):
        kills = [int(line.split()[2]) for line in ran.stdout.splitlines() if line.startswith(schedule)]
        assert len(kills) == 2
        assert sum(kills) > 0
        whole = FolderSink(tmp_path / schedule / "whole")
        for name in [*CALLS, *map(str, range(2))]:
            assert_as_undisturbed(FolderSink(tmp_path / schedule / name), whole)
