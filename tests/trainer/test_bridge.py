"""BRIDGE: its three gradients by hand, what its step moves, and a run that goes on with weights, shadow and adapter exactly."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pipeline.policy import policy_id
from schemas.errors import UserError, WorkError
from schemas.recipe import Train
from tests.trainer.test_adapter import SCALE, adapted, by_hand, split
from tests.trainer.test_methods import method_of, table_of, units_of, written_out
from tests.trainer.test_replay import again
from tests.trainer.tiny import FolderSink, make_job, make_train, policy_lm
from trainer import bridge
from trainer.job import TrainJob
from trainer.model import PolicyLM
from trainer.objective import Unit
from trainer.optim import Optimizers, build_optimizers
from trainer.replay import _gradients
from trainer.run import begin, train_round
from trainer.schedule import Step, Update
from trainer.step import Observed
from trainer.team import ALONE

L = 0.3
METHOD = {"type": "bridge", "rl_weight": L, "adapter_lr": 5e-3}
TABLE = table_of("bridge")


def train_of(**more: object) -> Train:
    return make_train(METHOD | more).model_copy(update={"micro_batch_tokens": 60})


def the_model(seed: int = 2) -> PolicyLM:
    """A float64 policy with an adapter whose B is not zero, and a shadow that is not its weights."""
    model = policy_lm(adapted)
    bridge.release(model, None)
    noise = torch.Generator().manual_seed(seed)
    for tensor in model.shadow.values():
        tensor += 0.02 * torch.randn(tensor.shape, generator=noise, dtype=tensor.dtype)
    return model


def updated(
    model: PolicyLM, folder: Path, units: list[Unit], *, train: Train | None = None, clip: float = 1e9
) -> tuple[Observed, dict[str, dict[str, Tensor]], Optimizers]:
    """One update; what was observed, and by optimizer and parameter the gradient that it used."""
    train = train or train_of()
    train = train.model_copy(update={"optimizer": train.optimizer.model_copy(update={"clip_norm": clip})})
    job = make_job(folder, FolderSink(folder / "sink"), train=train)
    optimizers = build_optimizers(model.lm, job.train.method, job.train.optimizer)
    names = {id(p): name.replace(".base_layer.", ".") for name, p in model.lm.named_parameters()}
    update = Update("main", (), len({row.prompt_id for unit in units for row in unit}))
    with _gradients(optimizers) as found:
        seen = bridge.bilevel_update(job, model, optimizers, Step(0, (update,)), update, units, 0, ALONE, fresh=False)
    used = {}
    for which, optimizer in optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        used[which] = {names[id(p)]: grad for p, grad in zip(parameters, found[which], strict=True)}
    return seen, used, optimizers


def close(got: Tensor, want: Tensor | None) -> bool:
    want = torch.zeros_like(got) if want is None else want
    return bool((got - want).norm() <= 1e-9 * (1e-3 + want.norm()))


def values(model: PolicyLM) -> dict[str, Tensor]:
    own = {f"lm/{name}": p.detach().clone() for name, p in model.lm.named_parameters()}
    return own | {f"shadow/{name}": t.clone() for name, t in model.shadow.items()}


# ---------------------------------------------------------------- one step
def test_the_three_gradients_are_the_formulas_written_out_at_the_values_before_the_step(tmp_path: Path) -> None:
    """By the chain rule through W + s B A, from two models without an adapter: dB = s G A', dA = s B' G."""
    model = the_model()
    acting = by_hand(model.lm)
    with bridge.shadow_in(model):
        shadow = by_hand(model.lm)
    layers = {layer: (a.detach().clone(), b.detach().clone()) for layer, (_, a, b) in split(model.lm).items()}
    mixed = L * written_out("grpo", TABLE, acting) + (1 - L) * written_out("sft", TABLE, acting)
    mixed.backward()
    alone = written_out("grpo", TABLE, shadow)
    alone.backward()

    seen, used, _ = updated(model, tmp_path, units_of(TABLE, method_of("bridge")))
    for which, plain in (("main", acting), ("shadow", shadow)):
        own = dict(plain.named_parameters())
        assert used[which].keys() == own.keys()
        for name, got in used[which].items():
            assert close(got, own[name].grad), (which, name)
            assert own[name].grad is not None
    for layer, (a, b) in layers.items():
        g = acting.get_parameter(f"{layer}.weight").grad - L * shadow.get_parameter(f"{layer}.weight").grad  # type: ignore[operator]
        assert close(used["adapter"].pop(f"{layer}.lora_A.default.weight"), SCALE * b.T @ g), layer
        assert close(used["adapter"].pop(f"{layer}.lora_B.default.weight"), SCALE * g @ a.T), layer
    assert not used["adapter"]
    assert seen.total == pytest.approx(mixed.item(), rel=1e-9)
    assert seen.more["loss/shadow"] == pytest.approx(alone.item(), rel=1e-9)
    norm = torch.cat([p.grad.flatten() for p in acting.parameters()]).norm()  # type: ignore[union-attr]
    assert seen.grad_norm == pytest.approx(norm.item(), rel=1e-9)


def test_each_of_the_three_takes_adamw_s_step_from_its_own_gradient_clipped_by_itself(tmp_path: Path) -> None:
    model, units = the_model(), units_of(TABLE, method_of("bridge"))
    before = values(model)
    seen, used, optimizers = updated(model, tmp_path, units, clip=1e-2)
    after = values(model)
    rates = {"main": 1e-2, "shadow": 1e-2, "adapter": 5e-3}
    moved = 0
    for which, grads in used.items():
        assert torch.cat([g.flatten() for g in grads.values()]).norm().item() == pytest.approx(1e-2, rel=1e-5)
        for name, grad in grads.items():
            for key in before:
                place, _, stored = key.partition("/")
                if stored.replace(".base_layer.", ".") == name and (place == "shadow") == (which == "shadow"):
                    p = nn.Parameter(before[key].clone())
                    p.grad = grad.clone()
                    decay = 0.01 if p.ndim >= 2 else 0.0
                    torch.optim.AdamW([p], lr=rates[which] / 2, weight_decay=decay, fused=True).step()
                    torch.testing.assert_close(after[key], p.detach(), rtol=1e-12, atol=1e-14)
                    moved += not torch.equal(after[key], before[key])
    assert moved == len(before) == sum(map(len, used.values()))
    assert (seen.rate, seen.more["lr_adapter"]) == pytest.approx((5e-3, 2.5e-3))  # the first of two steps of warm-up
    assert all(p.grad is None for p in model.parameters())
    assert {o.param_groups[0]["lr"] for o in optimizers.values()} == {5e-3, 2.5e-3}


@pytest.mark.parametrize("budget", [1, 23, 100, 10_000])
def test_no_gradient_sees_the_split_into_micro_batches_or_the_order(budget: int, tmp_path: Path) -> None:
    units = units_of(TABLE, method_of("bridge"))
    _, whole, _ = updated(
        the_model(), tmp_path / "a", units, train=train_of().model_copy(update={"micro_batch_tokens": 9999})
    )
    split_up = train_of().model_copy(update={"micro_batch_tokens": budget})
    _, parts, _ = updated(the_model(), tmp_path / "b", units[::-1], train=split_up)
    for which, grads in whole.items():
        for name, grad in grads.items():
            assert close(parts[which][name], grad), (which, name)


@pytest.mark.parametrize("route", ["rl", "sft"])
def test_a_step_that_lacks_one_kind_of_row_has_the_other_s_gradient_alone(route: str, tmp_path: Path) -> None:
    units = [u for u in units_of(TABLE, method_of("bridge")) if u[0].route == route]
    model = the_model()
    seen, used, _ = updated(model, tmp_path, units)
    norms = {which: sum(g.norm().item() for g in grads.values()) for which, grads in used.items()}
    assert (norms["main"] > 0, norms["adapter"] > 0, norms["shadow"] > 0) == (True, True, route == "rl")
    assert ("loss/shadow" in seen.more) == (route == "rl")
    assert all(bool(value.isfinite().all()) for value in values(model).values())


def test_the_weights_are_back_in_their_place_when_something_is_refused(tmp_path: Path) -> None:
    model, units = the_model(), units_of(TABLE, method_of("bridge"))
    with torch.no_grad():
        model.shadow["lm_head.weight" if "lm_head.weight" in model.shadow else "model.embed_tokens.weight"].fill_(torch.nan)
    before = values(model)
    with pytest.raises(WorkError, match="not both finite; the update was not made"):
        updated(model, tmp_path, units)
    assert all(torch.equal(p, before[f"lm/{name}"]) for name, p in model.lm.named_parameters())


# ---------------------------------------------------------------- rounds
def job_of(start: Path, sink: FolderSink, **more: object) -> TrainJob:
    return make_job(start, sink, train=train_of(), **more)


@pytest.fixture(scope="module")
def trained(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FolderSink:
    """Six steps, a checkpoint every second. Read-only by agreement."""
    sink = FolderSink(tmp_path_factory.mktemp("bridge"))
    assert train_round(job_of(policy_folder, sink)).steps == 6
    return sink


def test_a_checkpoint_acts_as_theta_with_the_adapter_merged_in(trained: FolderSink, policy_folder: Path) -> None:
    folder = trained.checkpoints()[6]
    theta, shadow, merged = (
        load_file(folder / f) for f in ("bridge/theta.safetensors", "bridge/shadow.safetensors", "model.safetensors")
    )
    w = load_file(folder / "adapter" / "adapter_model.safetensors")
    start = dict(AutoModelForCausalLM.from_pretrained(policy_folder).named_parameters())
    layers = {key.removesuffix(".lora_A.weight").removeprefix("base_model.model.") for key in w if "lora_A" in key}
    assert theta.keys() == shadow.keys() == start.keys()
    for name, tensor in theta.items():
        assert not torch.equal(tensor, start[name])
        assert not torch.equal(tensor, shadow[name])
        layer = name.removesuffix(".weight")
        if layer in layers:
            a, b = (w[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
            torch.testing.assert_close(merged[name], tensor + 2 * b @ a)  # alpha 32 of rank 16
        else:
            assert torch.equal(merged[name], tensor)
    assert policy_id(folder) != policy_id(policy_folder)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 16


def test_the_next_round_begins_with_weights_shadow_adapter_and_moments_as_they_were(
    trained: FolderSink, policy_folder: Path, tmp_path: Path
) -> None:
    end = trained.checkpoints()[6]
    same, state_of_same, _ = begin(job_of(policy_folder, trained), trained.checkpoints())
    on_end = job_of(end, FolderSink(tmp_path), round=1)
    # its start is the checkpoint, its base still the run's
    on_end = TrainJob(**{**vars(on_end), "policy": on_end.policy.model_copy(update={"model": policy_folder})})
    following, moments, state = begin(on_end, {})
    want = values(same)
    got = values(following)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in got)
    assert (state.round, state.before) == (1, 6)
    for which, optimizer in moments.items():
        steps = {int(s["step"]) for s in optimizer.state.values()}
        assert steps == {6}, which
        assert len(optimizer.state) == len([p for g in optimizer.param_groups for p in g["params"]])
    for a, b in zip(state_of_same["shadow"].state.values(), moments["shadow"].state.values(), strict=True):
        assert torch.equal(a["exp_avg"], b["exp_avg"])
    assert train_round(on_end).steps == 6


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_step_is_replayed_bitwise_and_with_another_lambda(trained: FolderSink, policy_folder: Path, step: int) -> None:
    job = job_of(policy_folder, trained)
    same = again(job, step)
    assert same.differences == []
    assert same.checkpoint == (same.weights if step % 2 else None)
    other = again(job, step, method=job.train.method.model_copy(update={"rl_weight": 0.9}))
    assert other.weights == same.weights
    assert other.changed is not None
    if "loss/shadow" in same.metrics:  # else the step has no groups
        assert other.cosines["shadow"] == pytest.approx(1, abs=1e-6)  # which sees no lambda
    if "loss/shadow" in same.metrics and "loss/sft" in same.metrics:
        assert other.cosines["main"] is not None
        assert other.cosines["main"] < 0.999
    assert again(job, step, method=job.train.method).changed == same.metrics


# ---------------------------------------------------------------- refusals
def test_wrong_combinations_name_the_key_and_the_way_out(policy_folder: Path, trained: FolderSink, tmp_path: Path) -> None:
    for more, say in (({"lora": {"rank": 4}}, "leave lora out"), ({"processes": 2}, "processes = 2.*set processes = 1")):
        with pytest.raises(ValueError, match=say):
            make_train(METHOD, **more)
    plain = FolderSink(tmp_path / "plain")
    train_round(make_job(policy_folder, plain))
    base = job_of(policy_folder, FolderSink(tmp_path)).policy
    with pytest.raises(UserError, match="trained without an adapter, so method bridge cannot go on"):
        begin(job_of(plain.checkpoints()[6], FolderSink(tmp_path), round=1, policy=base), {})
    lora = FolderSink(tmp_path / "lora")
    train_round(make_job(policy_folder, lora, train=make_train(lora={"rank": 16, "alpha": 32})))
    with pytest.raises(UserError, match=r"bridge/theta.safetensors: not there, and method 'bridge' goes on from them"):
        begin(job_of(lora.checkpoints()[6], FolderSink(tmp_path), round=1, policy=base), {})


def test_under_torchrun_it_is_refused(policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it without torchrun"):
        begin(job_of(policy_folder, FolderSink(tmp_path)), {})
