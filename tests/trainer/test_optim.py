"""The learning rate over a run, decay of matrices only, clipping; whole steps against AdamW set up by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from schemas.recipe import DypoMethod, Optimizer
from tests.trainer import by_hand
from tests.trainer.tiny import FolderSink, Killed, make_job, make_ref, make_shards, make_train, stored_tensors, tiny_llama
from trainer.optim import apply_update, build_optimizers, gradient_norm, learning_rate
from trainer.run import train_round


def test_warm_up_is_linear_and_the_decay_ends_at_its_fraction_in_the_last_step() -> None:
    for decay in ("linear", "cosine"):
        settings = Optimizer(warmup_steps=4, decay=decay, final_fraction=0.1)
        rates = [learning_rate(settings, 1.0, step=s, total=20) for s in range(20)]
        assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
        assert rates[4] == 1.0
        assert rates[-1] == pytest.approx(0.1)
        assert rates[3:] == sorted(rates[3:], reverse=True)
    middle = learning_rate(Optimizer(decay="cosine", final_fraction=0.0), 1.0, step=5, total=11)
    assert middle == pytest.approx(0.5)
    assert learning_rate(Optimizer(), 3.0, step=99, total=100) == 3.0


def test_only_matrices_are_decayed(model: LlamaForCausalLM) -> None:
    (optimizer,) = build_optimizers(model, DypoMethod(), Optimizer(weight_decay=0.5)).values()
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.5), name
    assert len(decay) == len(list(model.parameters()))


def test_queue_has_a_second_optimizer_with_its_rate(model: LlamaForCausalLM) -> None:
    official = DypoMethod.model_validate({"preset": "official"})
    assert list(build_optimizers(model, official, Optimizer())) == ["main", "sft"]
    assert official.rates == {"main": 5e-7, "sft": 5e-6}


def test_a_long_gradient_is_scaled_to_the_clip_norm_and_a_short_one_is_left() -> None:
    for length, want in ((10.0, 1.0), (0.5, 0.5)):
        parameter = torch.nn.Parameter(torch.zeros(4))
        parameter.grad = torch.full((4,), length / 2)
        norm = gradient_norm([parameter])
        assert norm.item() == pytest.approx(length)
        apply_update(torch.optim.SGD([parameter], lr=0.0), rate=1.0, clip_norm=1.0, norm=norm)
        assert parameter.detach().norm().item() == pytest.approx(want, rel=1e-5)
        assert parameter.grad is None


# ---------------------------------------------------------------- in a round
def rates_of(sink: FolderSink, name: str = "lr") -> list[float]:
    return [row["value"] for row in sink.rows("metrics") if row["name"] == name]


def test_two_steps_of_a_round_are_two_steps_of_adamw_with_the_recipe_s_numbers(policy_folder: Path, tmp_path: Path) -> None:
    """Two, since the first step of Adam hardly sees its betas or the length of the gradient. Clipping binds in both."""
    settings = {"betas": [0.7, 0.9], "weight_decay": 0.4, "clip_norm": 0.05}
    train = make_train(steps=2, optimizer=settings)
    sink, shards = FolderSink(tmp_path), make_shards()
    ref = make_ref(shards)
    train_round(make_job(policy_folder, sink, shards=shards, ref=ref, train=train))

    model, rows = tiny_llama(), {row["item_id"]: row for row in shards.to_pylist()}
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.4}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.7, 0.9))
    norms = []
    for step in range(2):
        mine = [rows[row["item_id"]] for row in sink.rows("draws") if row["step"] == step]
        gradient = by_hand.gradient_of(model, mine, by_hand.reference(ref), train.method, n=4)
        norms.append(gradient.norm().item())
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= 0.05 / norms[-1]
        adamw.step()
    assert rates_of(sink, "grad_norm") == pytest.approx(norms, rel=1e-3)
    assert max(norms) / min(norms) > 1.05
    assert min(norms) > 0.5
    stored = stored_tensors(sink.checkpoints()[2])
    weights = load_file(sink.checkpoints()[2] / "model.safetensors")
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            want = adamw.state[parameter][moment]
            assert (stored[f"main/{name}/{moment}"] - want).norm() < 1e-3 * want.norm(), (name, moment)
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=0, atol=1e-4, msg=name)


def test_each_queue_s_update_steps_its_own_optimizer(policy_folder: Path, tmp_path: Path) -> None:
    method = {"schedule": "queue", "sft_lr": 2e-2, "queue_size": 3, "queue_groups": 2}
    sink = FolderSink(tmp_path)
    train_round(make_job(policy_folder, sink, train=make_train(method, steps=8)))
    made = {"main": len(rates_of(sink, "lr")), "sft": len(rates_of(sink, "lr_sft"))}
    assert made["main"] != made["sft"]
    assert min(made.values()) > 0
    stored = stored_tensors(sink.checkpoints()[8])
    for which, updates in made.items():
        steps = {value.item() for name, value in stored.items() if name.startswith(f"{which}/") and name.endswith("/step")}
        assert steps == {updates}


def test_the_decay_runs_over_all_rounds_and_warm_up_is_once(policy_folder: Path, tmp_path: Path) -> None:
    optimizer = {"warmup_steps": 2, "decay": "cosine", "final_fraction": 0.1}
    train, start, rates = make_train(steps=4, optimizer=optimizer), policy_folder, []
    for number in range(3):
        sink = FolderSink(tmp_path / str(number))
        train_round(make_job(start, sink, train=train, round=number, rounds=3))
        start = sink.checkpoints()[4]
        rates += rates_of(sink)
    falling = [0.1 + 0.9 * (1 + math.cos(math.pi * s / 9)) / 2 for s in range(10)]  # steps 2 to 11 of the run's 12
    assert rates == pytest.approx([1e-2 * x for x in (0.5, 1.0, *falling)])


def test_a_run_whose_rounds_end_early_still_warms_up_step_by_step(policy_folder: Path, tmp_path: Path) -> None:
    """Rounds of 1 step where 6 were planned. Warm-up counts the steps that were taken, the decay those that were planned."""
    shards = make_shards(hard=0)
    for decay in ("constant", "linear"):
        optimizer = {"warmup_steps": 4, "decay": decay, "final_fraction": 0.0}
        early = make_train(min_ess=0.99, optimizer=optimizer)
        start, rates, before = policy_folder, [], []
        for number in range(3):
            sink = FolderSink(tmp_path / f"{decay}{number}")
            end = train_round(make_job(start, sink, shards=shards, train=early, round=number, rounds=5))
            assert (end.steps, end.reason) == (1, "ess")
            start = sink.checkpoints()[1]
            rates += rates_of(sink)
            before.append(json.loads((start / "trainer" / "state.json").read_text())["before"])
        assert before == [0, 1, 2]
        assert rates == pytest.approx([1e-2 * x for x in (0.25, 0.5, 0.75 if decay == "constant" else 1 - 8 / 25)])

        whole = make_train(optimizer=optimizer, checkpoint_every=1)
        with pytest.raises(Killed):  # a resumed round knows what was taken before it
            train_round(
                make_job(start, FolderSink(tmp_path / decay, die=("progress", 1)), shards=shards, train=whole, round=3)
            )
        sink = FolderSink(tmp_path / decay)
        train_round(make_job(start, sink, shards=shards, train=whole, round=3, rounds=5))
        assert json.loads((sink.checkpoints()[6] / "trainer" / "state.json").read_text())["before"] == 3
        if decay == "constant":
            assert rates_of(sink) == pytest.approx([1e-2] * 6)


def test_in_warm_up_the_decay_is_a_ceiling_for_a_run_that_has_fallen_behind_its_plan() -> None:
    settings = Optimizer(warmup_steps=4, decay="linear", final_fraction=0.0)
    assert learning_rate(settings, 1.0, step=23, total=25, taken=1) == pytest.approx(1 / 20)
    assert learning_rate(settings, 1.0, step=6, total=25, taken=1) == pytest.approx(0.5)
    assert learning_rate(settings, 1.0, step=6, total=25, taken=6) == pytest.approx(0.9)
