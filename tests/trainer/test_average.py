"""The mean with the base policy when a run ends: where it is taken, of what, and that a step made again knows of it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from schemas.recipe import Policy, Train
from tests.trainer.test_adapter import LORA
from tests.trainer.test_replay import again
from tests.trainer.tiny import FolderSink, make_job, make_shards, make_train, stored_tensors
from trainer.job import TrainJob
from trainer.run import train_round

W = 0.25


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def mean(trained: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: ((1 - W) * t.double() + W * base[name].double()).float() for name, t in trained.items()}


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], within: float) -> None:
    assert found.keys() == wanted.keys()
    assert max((found[name] - t).abs().max().item() for name, t in wanted.items()) < within


def both(start: Path, folder: Path, **more: object) -> tuple[FolderSink, FolderSink]:
    """The same round without the mean and with it."""
    sinks = FolderSink(folder / "trained"), FolderSink(folder / "mean")
    for sink, w in zip(sinks, (0.0, W), strict=True):
        train_round(make_job(start, sink, train=make_train(base_weight=w, **more), rounds=1))
    return sinks


def test_the_last_checkpoint_is_the_mean_with_the_base_and_those_before_it_are_as_trained(
    policy_folder: Path, tmp_path: Path
) -> None:
    trained, averaged = (sink.checkpoints() for sink in both(policy_folder, tmp_path))
    for step in (2, 4):
        assert all(torch.equal(t, weights(averaged[step])[name]) for name, t in weights(trained[step]).items())
    wanted = mean(weights(trained[6]), weights(policy_folder))
    assert_near(weights(averaged[6]), wanted, 1e-6)
    assert max((wanted[name] - t).abs().max() for name, t in weights(trained[6]).items()) > 1e-3
    moments = stored_tensors(trained[6])
    assert all(torch.equal(t, moments[name]) for name, t in stored_tensors(averaged[6]).items()), "the moments are kept"


def test_only_the_last_round_ends_with_the_mean_and_it_is_with_the_run_s_base(policy_folder: Path, tmp_path: Path) -> None:
    """Not with where the round began."""
    first, ends = [], {}
    for w in (0.0, W):
        zero, one = FolderSink(tmp_path / f"0 {w}"), FolderSink(tmp_path / f"1 {w}")
        train, policy = make_train(base_weight=w), Policy(model=policy_folder, device="cpu")
        train_round(make_job(policy_folder, zero, train=train))
        first.append(weights(zero.checkpoints()[6]))
        train_round(make_job(zero.checkpoints()[6], one, train=train, round=1, policy=policy))
        ends[w] = weights(one.checkpoints()[6])
    assert all(torch.equal(t, first[1][name]) for name, t in first[0].items())
    assert_near(ends[W], mean(ends[0.0], weights(policy_folder)), 1e-6)


def test_with_lora_the_merged_weights_are_the_mean(policy_folder: Path, tmp_path: Path) -> None:
    trained, averaged = (sink.checkpoints() for sink in both(policy_folder, tmp_path, lora=LORA))
    assert_near(weights(averaged[6]), mean(weights(trained[6]), weights(policy_folder)), 1e-6)
    adapters = [load_file(ends[6] / "adapter" / "adapter_model.safetensors") for ends in (trained, averaged)]
    for name, t in adapters[0].items():
        assert torch.equal(adapters[1][name], t * (1 - W) if ".lora_B." in name else t), name


def test_a_round_that_ends_early_ends_with_the_mean_too(policy_folder: Path, tmp_path: Path) -> None:
    trained, averaged = both(policy_folder, tmp_path, min_ess=1.0)
    (step,) = averaged.checkpoints()
    assert step < 6
    wanted = mean(weights(trained.checkpoints()[step]), weights(policy_folder))
    assert_near(weights(averaged.checkpoints()[step]), wanted, 1e-6)
    train = make_train(base_weight=W, min_ess=1.0)
    got = again(make_job(policy_folder, averaged, train=train, rounds=1), step - 1)
    assert got.weights == got.checkpoint


def test_a_last_round_without_a_step_ends_with_the_mean_too(policy_folder: Path, tmp_path: Path) -> None:
    first = both(policy_folder, tmp_path)[0].checkpoints()[6]
    sink = FolderSink(tmp_path / "empty")
    policy = Policy(model=policy_folder, device="cpu")
    none = make_shards().slice(0, 0)
    job = make_job(first, sink, shards=none, train=make_train(base_weight=W), round=1, policy=policy)
    assert train_round(job).reason == "empty"
    assert_near(weights(sink.checkpoints()[0]), mean(weights(first), weights(policy_folder)), 1e-6)


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "lora"])
def test_the_last_step_made_again_ends_in_the_stored_mean(lora: dict | None, policy_folder: Path, tmp_path: Path) -> None:
    job: TrainJob = make_job(policy_folder, FolderSink(tmp_path), train=make_train(base_weight=W, lora=lora), rounds=1)
    train_round(job)
    for step in (3, 5):
        got = again(job, step)
        assert got.differences == []
        assert got.weights == got.checkpoint


def test_a_float64_policy_is_averaged_in_float64(policy_folder: Path, tmp_path: Path) -> None:
    policy = Policy(model=policy_folder, device="cpu", dtype="float64")
    ends = []
    for w in (0.0, W):
        sink = FolderSink(tmp_path / str(w))
        train_round(make_job(policy_folder, sink, train=make_train(base_weight=w), policy=policy, rounds=1))
        ends.append(weights(sink.checkpoints()[6]))
    for name, t in weights(policy_folder).items():
        assert (ends[1][name] - ((1 - W) * ends[0][name] + W * t.double())).abs().max() < 1e-14


def test_an_adapter_and_weights_trained_against_each_other_have_no_mean() -> None:
    with pytest.raises(ValueError, match=r"base_weight = 0\.25: method 'bridge' trains an adapter"):
        Train.model_validate({"steps": 1, "prompts_per_step": 1, "base_weight": W, "method": {"type": "bridge"}})
