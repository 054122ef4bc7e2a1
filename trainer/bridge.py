"""BRIDGE's step: base weights theta, an adapter w on them, and theta', a shadow of theta that learns from RL alone.

    theta   along   grad_theta  [(1 - l) SFT(theta, w) + l PG(theta, w)]
    theta'  along   grad_theta' PG(theta', w)
    w       along   grad_w      [(1 - l) SFT(theta, w) + l (PG(theta, w) - PG(theta', w))]

One idea: theta' is tensors that change places with theta's in the one model while their gradient is taken and used. So forward,
losses, optimizers and their moments are those of every other method, and w's gradient is what the two passes leave in its
`.grad`s, the second less l times the first. A checkpoint's own weights are theta with w merged in, as with any adapter;
theta and theta' lie in `bridge/` beside it, exactly. Left out: several processes, which would have to exchange shares.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from schemas.errors import UserError
from schemas.methods import Weights
from schemas.methods.bridge import BRIDGEMethod
from trainer import adapter
from trainer.job import TrainJob
from trainer.mismatch import refuse_mismatch, refuse_non_finite
from trainer.model import PolicyLM
from trainer.objective import Unit, count, mixture
from trainer.optim import Optimizers, apply_update, gradient_norm, update_rate
from trainer.schedule import Step, Update
from trainer.step import Observed, accumulate
from trainer.team import Team, in_team

FOLDER = "bridge"
THETA, SHADOW = "theta.safetensors", "shadow.safetensors"


def bilevel_update(
    job: TrainJob,
    model: PolicyLM,
    optimizers: Optimizers,
    step: Step,
    update: Update,
    units: list[Unit],
    taken: int,
    team: Team,
    *,
    fresh: bool,
) -> Observed:
    """One step of theta', w and theta, each from its gradient at the values before it. What is observed is of theta and w."""
    train, method = job.train, job.train.method
    assert isinstance(method, BRIDGEMethod)
    where, counts = f"train, round {job.round}, step {step.index}", count(units, update.prompts)
    w = [p for name, p in model.lm.named_parameters() if adapter.owns(name)]

    def gradient(weights: Weights, units: Sequence[Unit]) -> Observed:
        mix = mixture(weights, method.loss, counts)
        seen = accumulate(model, units, counts, method.loss, mix, micro_batch_tokens=train.micro_batch_tokens)
        seen.grad_norm = gradient_norm(model.parameters()).item()
        refuse_non_finite(seen, units, where=where)
        return seen

    def apply(name: str) -> tuple[float, float]:
        """Norm and rate of the step that one optimizer takes."""
        rate = update_rate(train, name, round=job.round, index=step.index, rounds=job.rounds, taken=taken)
        norm = gradient_norm(p for group in optimizers[name].param_groups for p in group["params"])
        apply_update(optimizers[name], rate=rate, clip_norm=train.optimizer.clip_norm, norm=norm)
        return norm.item(), rate

    with shadow_in(model):
        shadow = gradient(Weights(grpo=1.0), [unit for unit in units if unit[0].route == "rl"])
        shadow_s = [p.grad for p in w]
        optimizers["adapter"].zero_grad()
        shadow.grad_norm, _ = apply("shadow")
    seen = gradient(method.weights(job.round * train.steps + step.index), units)
    if fresh:
        refuse_mismatch(seen, limit=train.max_logprob_difference, where=where)
    for p, grad in zip(w, shadow_s, strict=True):
        if grad is not None:
            p.grad = (torch.zeros_like(p) if p.grad is None else p.grad) - method.rl_weight * grad
    adapter_norm, adapter_rate = apply("adapter")
    seen.grad_norm, seen.rate = apply("main")
    seen.more = {"grad_norm_adapter": adapter_norm, "lr_adapter": adapter_rate, "grad_norm_shadow": shadow.grad_norm}
    seen.more |= {"loss/shadow": shadow.grpo} if counts.mid else {}
    return seen


@contextmanager
def shadow_in(model: PolicyLM) -> Iterator[None]:
    """Inside, the model's base weights are the shadow's."""
    _exchange(model)
    try:
        yield
    finally:
        _exchange(model)


def _exchange(model: PolicyLM) -> None:
    for name, p in base_of(model.lm).items():
        p.data, model.shadow[name] = model.shadow[name], p.data


def base_of(lm: nn.Module) -> dict[str, nn.Parameter]:
    """theta, by the names of the model without an adapter."""
    return {name.replace(".base_layer.", "."): p for name, p in lm.named_parameters() if not adapter.owns(name)}


def release(model: PolicyLM, folder: Path | None) -> None:
    """Makes theta of a model with an adapter trainable, and gives it its shadow: those of a checkpoint, or two of what it has.

    UserError under torchrun, or if the checkpoint has none that fit.
    """
    if in_team():
        raise UserError(
            "train.method.type = 'bridge' exchanges weights with their shadow in one process; start it without torchrun"
        )
    theta = base_of(model.lm)
    for p in theta.values():
        p.requires_grad_(True)
    model.shadow = {name: p.detach().clone() for name, p in theta.items()}
    if folder is None:
        return
    for file, into in ((THETA, theta), (SHADOW, model.shadow)):
        path = folder / FOLDER / file
        stored = load_file(path) if path.is_file() else {}
        if {n: t.shape for n, t in stored.items()} != {n: t.shape for n, t in into.items()}:
            raise UserError(
                f"{path}: {'not the weights of this model' if stored else 'not there'}, and method 'bridge' goes on from them; begin a new "
                f"run with policy.model set to {folder}, where the adapter is merged into the weights"
            )
        with torch.no_grad():
            for name, tensor in into.items():
                tensor.copy_(stored[name])


def save(model: PolicyLM, folder: Path) -> None:
    """theta and its shadow as they are, into a checkpoint's folder."""
    (folder / FOLDER).mkdir()
    for file, tensors in ((THETA, base_of(model.lm)), (SHADOW, model.shadow)):
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / FOLDER / file)
