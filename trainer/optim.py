"""AdamW, its learning rate over the run, and the norm of the gradient.

One idea: the rate is a pure function of the step's number in the run, so no scheduler object has state to save.
Matrices are decayed; vectors (norms, biases) are not. torch's fused kernel, on CPU and CUDA.
Left out: other optimizers.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from schemas.methods import Method
from schemas.recipe import Optimizer, Train
from trainer import adapter

Optimizers = dict[str, torch.optim.AdamW]


def build_optimizers(model: nn.Module, method: Method, settings: Optimizer) -> Optimizers:
    """One for each of the method's rates, all on the same parameters; where there is one for the `adapter`, it has those of the
    adapter and the others the rest."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def of(optimizer: str) -> list[nn.Parameter]:
        return [p for name, p in trained if "adapter" not in method.rates or adapter.owns(name) == (optimizer == "adapter")]

    return {name: _adamw(of(name), settings) for name in method.rates}


def _adamw(trained: list[nn.Parameter], settings: Optimizer) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=True)


def update_rate(train: Train, optimizer: str, *, round: int, index: int, rounds: int, taken: int) -> float:
    """The rate of an optimizer at step `index` of a round of a run of so many rounds; `taken` as in `learning_rate`.

    A method with stages (`Method.stage`) has warm-up and decay in each, over the steps of its rounds.
    """
    stage = train.method.stage(round, rounds)
    total = stage.rounds * train.steps
    settings = train.optimizer
    if stage.decay is not None:
        settings = settings.model_copy(update={"decay": stage.decay})
    if stage.warmup is not None:
        settings = settings.model_copy(update={"warmup_steps": int(stage.warmup * total)})
    step = (round - stage.first) * train.steps + index
    base = train.method.rates[optimizer]
    return learning_rate(settings, base, step=step, total=total, taken=max(0, taken - stage.first * train.steps))


def learning_rate(settings: Optimizer, base: float, *, step: int, total: int, taken: int | None = None) -> float:
    """The rate at a planned step of the run, from 0: linear warm-up to `base`, then the decay; final_fraction at the last.

    taken: steps really made before this one, if rounds that ended early made them fewer than planned. Warm-up counts
    these, so that it is not skipped; the decay keeps to the plan.
    """
    taken = step if taken is None else taken
    if taken < settings.warmup_steps:
        return base * min((taken + 1) / settings.warmup_steps, _decay(settings, step=step, total=total))
    return base * _decay(settings, step=step, total=total)


def _decay(settings: Optimizer, *, step: int, total: int) -> float:
    if settings.decay == "constant" or step < settings.warmup_steps:
        return 1.0
    last = total - 1 - settings.warmup_steps
    done = min(1.0, (step - settings.warmup_steps) / last) if last > 0 else 1.0
    left = 1 - done if settings.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.final_fraction + (1 - settings.final_fraction) * left


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients together, over all ranks' shares."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def apply_update(optimizer: torch.optim.Optimizer, *, rate: float, clip_norm: float, norm: torch.Tensor) -> None:
    """Scales the gradient to clip_norm if it is longer, takes one step at `rate`, and clears the gradient."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
