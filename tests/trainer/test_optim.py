"""The learning rate over a run, decay of matrices only, and clipping."""

import pytest
import torch
from transformers import LlamaForCausalLM

from schemas.recipe import DypoMethod, Optimizer
from trainer.optim import apply_update, base_rate, build_optimizers, gradient_norm, learning_rate


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
    assert (base_rate(official, "main"), base_rate(official, "sft")) == (5e-7, 5e-6)


def test_a_long_gradient_is_scaled_to_the_clip_norm_and_a_short_one_is_left() -> None:
    for length, want in ((10.0, 1.0), (0.5, 0.5)):
        parameter = torch.nn.Parameter(torch.zeros(4))
        parameter.grad = torch.full((4,), length / 2)
        norm = gradient_norm([parameter])
        assert norm.item() == pytest.approx(length)
        apply_update(torch.optim.SGD([parameter], lr=0.0), rate=1.0, clip_norm=1.0, norm=norm)
        assert parameter.detach().norm().item() == pytest.approx(want, rel=1e-5)
        assert parameter.grad is None
