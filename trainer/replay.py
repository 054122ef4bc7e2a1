"""One optimizer step again: from the nearest earlier checkpoint to the step, as it was trained, and as another loss would.

One idea: nothing is simulated. `begin` and `take_step` are the training loop's own, over the same plan, so what comes out
is what training made, to the last bit, or something differs and is named. The changed method sees the very weights,
moments and rows that the step was made from; the walk before it is always as trained.
Left out: where jobs and stored rows come from, and drawing the result (pipeline/replay.py). Nothing is written.
"""

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from schemas.errors import UserError
from schemas.methods import Method
from trainer import average
from trainer.job import TrainJob
from trainer.metrics import CLOCKED, summary
from trainer.model import PolicyLM
from trainer.optim import Optimizers
from trainer.run import begin, end, load, shards_of, take_step
from trainer.schedule import Step, plan_round

Gradients = dict[str, list[Tensor]]  # optimizer -> one tensor a parameter


@dataclass(frozen=True)
class Difference:
    """A metric that is not bitwise what was stored; None: it is not there on that side."""

    step: int
    name: str
    stored: float | None
    replayed: float | None


@dataclass(frozen=True)
class Replayed:
    """What one step is when it is made again.

    start: updates of the checkpoint that the walk began from (0: the round's start). metrics: all of the step's but those
    a clock decides. differences: of all steps walked, the first first. weights: sha256 after the update; checkpoint: the
    same of the stored checkpoint after this step, None if there is none. changed: the metrics under the other method, and
    cosines: by optimizer, of the two gradients; None where one of them is zero.
    """

    start: int
    metrics: dict[str, float]
    differences: list[Difference]
    weights: str
    checkpoint: str | None
    changed: dict[str, float] | None
    cosines: dict[str, float | None]


def replay_step(job: TrainJob, step: int, *, draws: pa.Table, metrics: pa.Table, method: Method | None = None) -> Replayed:
    """Makes step `step` of the job's round again; with `method`, a second time under it.

    draws and metrics: the round's stored rows. The sink is only asked for checkpoints and told the progress.
    Raises UserError before any work if the step was never made, the plan does not agree with the draws, or `method` would
    train on other rows or reads log-probs that the job has not.
    """
    stored = _by_step(metrics)
    if step not in stored:
        made = f"steps 0 to {max(stored)}" if stored else "none"
        raise UserError(f"round {job.round} has no stored metrics of step {step}, only of {made}")
    shards = shards_of(job)
    plan = plan_round(job.shards, job.train, seed=job.seed, round=job.round)
    _refuse_other_draws(plan[: step + 1], draws, job.round)
    other = job if method is None else replace(job, train=job.train.model_copy(update={"method": method}))
    if plan_round(other.shards, other.train, seed=job.seed, round=job.round)[step] != plan[step]:
        raise UserError(f"the changed method would take other rows in step {step}, so there is nothing to compare")
    other_shards = shards_of(other)

    checkpoints = job.sink.checkpoints()
    model, optimizers, state = begin(job, {s: folder for s, folder in checkpoints.items() if s <= step})
    differences: list[Difference] = []
    found: dict[str, float] = {}
    before = None
    with _gradients(optimizers) as gradients:
        for walked in plan[state.steps : step + 1]:
            if walked.index == step and method is not None:
                before = _saved(model, optimizers)
            found = _unclocked(take_step(job, model, optimizers, shards, walked, before=state.before)[2])
            differences += _differences(walked.index, stored.get(walked.index, {}), found)
            job.sink.progress(walked.index + 1 - state.steps, step + 1 - state.steps, summary(found))
    if end(job, plan[step], found) is not None:
        average.with_base(job, model)
    weights, changed, cosines = weights_digest(model.lm), None, {}
    if before is not None:
        _restore(before, model, optimizers)
        with _gradients(optimizers) as others:
            taken = take_step(other, model, optimizers, other_shards, plan[step], before=state.before)
        changed = _unclocked(taken[2])
        cosines = {name: _cosine(gradients[name], others[name]) for name in others}
    after = checkpoints.get(step + 1)
    on_cpu = replace(job, policy=job.policy.model_copy(update={"device": "cpu"}))
    checkpoint = None if after is None else weights_digest(load(on_cpu, after).lm)
    return Replayed(state.steps, found, differences, weights, checkpoint, changed, cosines)


def weights_digest(model: nn.Module) -> str:
    """sha256 over name, type, shape and bytes of every parameter, by name."""
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        value = parameter.detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _by_step(metrics: pa.Table) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for step, name, value in zip(*(metrics[n].to_pylist() for n in ("step", "name", "value")), strict=True):
        found.setdefault(step, {})[name] = value
    return {step: _unclocked(values) for step, values in found.items()}


def _unclocked(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in CLOCKED}


def _refuse_other_draws(plan: Sequence[Step], draws: pa.Table, round: int) -> None:
    """The stored draws of these steps are the plan's, row by row; UserError with the first that is not."""
    columns = ("step", "position", "route", "item_id", "prompt_id", "teacher")
    planned = {
        (step.index, position): (route, item, visit.prompt_id, visit.teacher)
        for step in plan
        for position, (visit, route, item) in enumerate(
            (visit, *key) for update in step.updates for visit in update.visits for key in visit.items
        )
    }
    kept = draws.filter(pc.field("step") < len(plan))
    found = {(step, at): tuple(row) for step, at, *row in zip(*(kept[c].to_pylist() for c in columns), strict=True)}
    for place in sorted(planned.keys() | found.keys()):
        want, has = planned.get(place), found.get(place)
        if want != has:
            raise UserError(
                f"draws, round {round}, step {place[0]}, position {place[1]}: {_shown(has)} is stored, but seed, recipe and "
                f"shards give {_shown(want)}. One of them is not what the round was trained with; restore it to replay"
            )


def _shown(row: tuple | None) -> str:
    if row is None:
        return "no row"
    route, item, prompt, teacher = row
    return f"{route} item {item} of prompt {prompt}" + (f", teacher {teacher}" if teacher else "")


def _differences(step: int, stored: Mapping[str, float], found: Mapping[str, float]) -> list[Difference]:
    pairs = [(name, stored.get(name), found.get(name)) for name in sorted(stored.keys() | found.keys())]
    return [Difference(step, *pair) for pair in pairs if not _same(*pair[1:])]


def _same(a: float | None, b: float | None) -> bool:
    return a == b or (a is not None and b is not None and math.isnan(a) and math.isnan(b))


@contextmanager
def _gradients(optimizers: Optimizers) -> Iterator[Gradients]:
    """The clipped gradient of each optimizer's last step, kept just before it is used."""
    found: Gradients = {}

    def keep(name: str, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found[name] = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters]

    hooks = [
        optimizer.register_step_pre_hook(lambda used, args, kwargs, name=name: keep(name, used))
        for name, optimizer in optimizers.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float | None:
    """Of two gradients; clipping changes only their length. None if one is zero."""

    def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
        return sum((u.double() * v.double()).sum().item() for u, v in zip(x, y, strict=True))

    lengths = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / lengths if lengths > 0 else None


def _saved(model: PolicyLM, optimizers: Optimizers) -> tuple:
    """Weights, moments and torch's random state, as they are now."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: copy.deepcopy(o.state_dict()) for name, o in optimizers.items()}
    return weights, {name: t.clone() for name, t in model.shadow.items()}, moments, torch.get_rng_state()


def _restore(saved: tuple, model: PolicyLM, optimizers: Optimizers) -> None:
    weights, shadow, moments, rng = saved
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
        for name, tensor in model.shadow.items():
            tensor.copy_(shadow[name])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(moments[name])
    torch.set_rng_state(rng)
