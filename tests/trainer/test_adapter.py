"""LoRA: what moves, its gradient, peft's own reading of what is saved, and a run that goes on with it."""

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pipeline.policy import policy_id
from schemas.errors import UserError
from schemas.recipe import Lora, Policy
from tests.trainer.test_gradient import units_of, update
from tests.trainer.test_replay import again
from tests.trainer.test_resume import assert_as_undisturbed
from tests.trainer.tiny import FolderSink, Killed, exact_llama, make_job, make_train, policy_lm, stored_tensors
from trainer import adapter
from trainer.job import TrainJob
from trainer.run import begin, shards_of, take_step, train_round
from trainer.schedule import plan_round

LORA = {"rank": 4, "alpha": 6}
SCALE = LORA["alpha"] / LORA["rank"]


def adapted() -> nn.Module:
    """A float64 model with an adapter whose B is not zero, as it is at first."""
    lm = exact_llama()
    adapter.attach(lm, Lora(**LORA, target_modules="all-linear"), None)
    lm.double()
    torch.manual_seed(1)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return lm


def split(lm: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """layer: (W, A, B), read off the names alone."""
    found = dict(lm.named_parameters())
    layers = [name.removesuffix(".base_layer.weight") for name in found if name.endswith(".base_layer.weight")]
    parts = ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    return {layer: tuple(found[f"{layer}.{part}"] for part in parts) for layer in layers}  # type: ignore[misc]


def by_hand(lm: nn.Module) -> nn.Module:
    """A model without an adapter, its weights W + s B A."""
    plain = exact_llama()
    mine = dict(lm.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name in mine:
                parameter.copy_(mine[name])
        for layer, (w, a, b) in split(lm).items():
            plain.get_parameter(f"{layer}.weight").copy_(w + SCALE * b @ a)
    return plain


def the_job(start: Path, sink: FolderSink, **more: object) -> TrainJob:
    return make_job(start, sink, train=make_train(prompts_per_step=3, lora=more.pop("lora", LORA)), **more)


@pytest.fixture(scope="module")
def trained(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FolderSink:
    """Six steps, a checkpoint every second. Read-only by agreement."""
    sink = FolderSink(tmp_path_factory.mktemp("lora"))
    assert train_round(the_job(policy_folder, sink)).steps == 6
    return sink


def of_base(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def base_of(lm: nn.Module) -> dict[str, Tensor]:
    """The weights under the adapter, by the names of a model that has none."""
    return {name.replace(".base_layer.", "."): p for name, p in lm.named_parameters() if "lora_" not in name}


# ---------------------------------------------------------------- one step
def test_the_adapter_s_gradient_is_the_chain_rule_s_through_w_plus_s_b_a() -> None:
    """dB = s G A', dA = s B' G with G the gradient of the merged weight, found without an adapter."""
    lm, units = adapted(), units_of()
    plain = by_hand(lm)
    update(units, "default", budget=60, model=policy_lm(lambda: lm))
    update(units, "default", budget=60, model=policy_lm(lambda: plain))
    layers = split(lm)
    assert len(layers) == 2 * 7, "every matrix of every layer, and not the head"
    for layer, (w, a, b) in layers.items():
        merged = plain.get_parameter(f"{layer}.weight").grad
        assert merged is not None
        assert w.grad is None
        for found, expected in ((b.grad, SCALE * merged @ a.T), (a.grad, SCALE * b.T @ merged)):
            assert found is not None
            assert expected.norm() > 0
            assert (found - expected).norm() < 1e-10 * expected.norm(), layer


def test_a_step_moves_the_adapter_and_nothing_else(policy_folder: Path, tmp_path: Path) -> None:
    job = the_job(policy_folder, FolderSink(tmp_path))
    model, optimizers, _ = begin(job, {})
    before = {name: p.detach().clone() for name, p in model.lm.named_parameters()}
    plan = plan_round(job.shards, job.train, seed=job.seed, round=0)
    for step in plan[:2]:  # A has no gradient in the first, where B is zero
        take_step(job, model, optimizers, shards_of(job), step, before=0)
    for name, p in model.lm.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_" not in name), name
    base = of_base(policy_folder)
    assert base.keys() == base_of(model.lm).keys()
    assert all(torch.equal(p, base[name]) for name, p in base_of(model.lm).items())
    assert {id(p) for g in optimizers["main"].param_groups for p in g["params"]} == {
        id(p) for name, p in model.lm.named_parameters() if "lora_" in name
    }


# ---------------------------------------------------------------- what is saved
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks transformers
def test_peft_reads_the_adapter_and_gives_the_merged_folder_s_logits(trained: FolderSink, policy_folder: Path) -> None:
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(policy_folder)
        plain = base(ids).logits
        for folder in trained.checkpoints().values():
            with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy_folder), folder / "adapter")
            merged, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert not any(info.values()), info
            assert (with_adapter(ids).logits - merged(ids).logits).abs().max() < 1e-5
            assert (merged(ids).logits - plain).abs().max() > 1e-2


def test_every_checkpoint_is_another_policy(trained: FolderSink, policy_folder: Path) -> None:
    ids = {policy_id(folder) for folder in (policy_folder, *trained.checkpoints().values())}
    assert len(ids) == 4


# ---------------------------------------------------------------- going on
@pytest.mark.parametrize("die", [("write", 3), ("checkpoint", 1), ("checkpoint", 3), ("progress", 4)], ids=str)
def test_a_killed_round_ends_bitwise_as_undisturbed(
    die: tuple[str, int], trained: FolderSink, policy_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train_round(the_job(policy_folder, FolderSink(tmp_path, die=die)))
    again = FolderSink(tmp_path)
    train_round(the_job(policy_folder, again))
    assert_as_undisturbed(again, trained)
    for step, folder in trained.checkpoints().items():
        mine, theirs = (load_file(f / "adapter/adapter_model.safetensors") for f in (again.checkpoints()[step], folder))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_next_round_goes_on_with_the_adapter_and_its_moments_over_the_run_s_base(
    trained: FolderSink, policy_folder: Path, tmp_path: Path
) -> None:
    end = trained.checkpoints()[6]
    job = the_job(end, FolderSink(tmp_path), round=1, policy=Policy(model=policy_folder, device="cpu"))
    model, optimizers, state = begin(job, {})
    base = of_base(policy_folder)
    assert all(torch.equal(p, base[name]) for name, p in base_of(model.lm).items())
    stored, moments = load_file(end / "adapter/adapter_model.safetensors"), stored_tensors(end)
    parameters = {name: p for name, p in model.lm.named_parameters() if "lora_" in name}
    assert len(parameters) == len(stored) == 2 * 2 * 7
    for name, parameter in parameters.items():
        assert torch.equal(parameter, stored[f"base_model.model.{name.replace('.default.', '.')}"])
        kept = optimizers["main"].state[parameter]
        assert kept["step"].item() == 6
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(kept[key], moments[f"main/{name}/{key}"])
            assert kept[key].any()
    assert state.before == 6
    assert train_round(job).steps == 6
    assert policy_id(job.sink.checkpoints()[6]) != policy_id(end)


def test_a_step_made_again_is_bitwise_the_step_that_was_made(trained: FolderSink, policy_folder: Path) -> None:
    """The digest is of base and adapter on both sides, not of merged weights."""
    job = the_job(policy_folder, FolderSink(trained.folder))
    for step in (1, 3, 5):
        got = again(job, step)
        assert got.differences == []
        assert got.start == step - 1
        assert got.weights == got.checkpoint


# ---------------------------------------------------------------- what is refused
def test_an_adapter_cannot_begin_in_the_middle_of_a_run(policy_folder: Path, tmp_path: Path) -> None:
    whole = FolderSink(tmp_path / "0")
    train_round(make_job(policy_folder, whole))
    end = whole.checkpoints()[6]
    policy = Policy(model=policy_folder, device="cpu")
    with pytest.raises(UserError, match=r"step=6: trained without an adapter.* begin a new one with policy\.model set to"):
        train_round(the_job(end, FolderSink(tmp_path / "1"), round=1, policy=policy))
    train_round(the_job(end, FolderSink(tmp_path / "2")))  # the way out


def test_a_run_with_an_adapter_cannot_go_on_without_it(trained: FolderSink, policy_folder: Path, tmp_path: Path) -> None:
    end = trained.checkpoints()[6]
    policy = Policy(model=policy_folder, device="cpu")
    with pytest.raises(UserError, match=r"step=6: trained with an adapter.* begin a new run with policy\.model set to"):
        train_round(make_job(end, FolderSink(tmp_path), round=1, policy=policy))


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        (LORA | {"rank": 2}, "28 tensors"),
        (LORA | {"target_modules": ["q_proj", "v_proj"]}, "20 tensors"),
        (LORA | {"alpha": 7}, r"alpha 7 \(alpha 6\)"),
    ],
    ids=["rank", "target_modules", "alpha"],
)
def test_another_adapter_than_the_checkpoint_s_is_refused(
    lora: dict, told: str, trained: FolderSink, policy_folder: Path
) -> None:
    job = the_job(policy_folder, FolderSink(trained.folder), lora=lora)
    with pytest.raises(UserError, match=rf"adapter_model\.safetensors: not the adapter that train\.lora describes.*{told}"):
        begin(job, trained.checkpoints())


def test_layers_that_the_model_has_not_are_refused() -> None:
    with pytest.raises(UserError, match=r"train\.lora\.target_modules = \['nope'\]"):
        adapter.attach(exact_llama(), Lora(target_modules=["nope"]), None)


def test_without_peft_the_way_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'dypo\[lora\]'"):
        adapter.attach(exact_llama(), Lora(), None)


@pytest.mark.filterwarnings("ignore:Model has")  # peft, of tied weights, on the way to our refusal
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_layers_that_could_not_be_merged_are_refused_before_training(module: str) -> None:
    with pytest.raises(UserError, match="output head, or no plain linear layer"):
        adapter.attach(exact_llama(), Lora(target_modules=["q_proj", module]), None)


def test_a_checkpoint_with_an_adapter_can_be_a_base_and_is_not_adapted_twice(trained: FolderSink, tmp_path: Path) -> None:
    base = trained.checkpoints()[max(trained.checkpoints())]
    train = make_train(lora={"rank": 2, "alpha": 4})
    job = make_job(base, FolderSink(tmp_path), train=train)
    model, _, _ = begin(job, {})
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, weight in plain.state_dict().items():
        own = dict(model.lm.state_dict())
        assert torch.equal(own.get(name, own.get(name.replace(".weight", ".base_layer.weight"))), weight)
    assert all((p == 0).all() for n, p in model.lm.named_parameters() if "lora_B" in n), "a new adapter adds nothing yet"
