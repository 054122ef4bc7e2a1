"""One round of training: plan, load, resume, then step by step forward, backward, clip, update, metrics, checkpoint.

One idea: the plan of the whole round is computed first and is a pure function, so the loop only walks it, and a resumed
round walks the rest of it. Left out: everything with a file of its own (schedule, batch, forward, objective, ...).
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from schemas.errors import Reported, UserError
from schemas.ids import seed_from
from schemas.methods.bridge import BRIDGEMethod
from trainer import adapter, average, bridge
from trainer.checkpoint import TrainerState, load_state, load_tensors, save_checkpoint
from trainer.job import Nowhere, RoundEnd, TrainJob
from trainer.journal import Journal
from trainer.metrics import RowNumbers, by_row, step_metrics, summary
from trainer.mismatch import refuse_mismatch, refuse_non_finite
from trainer.model import PolicyLM, device_of, load_model, recompute_activations
from trainer.objective import Unit, count, mixture
from trainer.optim import Optimizers, apply_update, build_optimizers, gradient_norm, update_rate
from trainer.rows import Row, Shards
from trainer.schedule import Cursor, Step, Update, plan_round
from trainer.step import Observed, accumulate, merged
from trainer.team import ALONE, LEFT_ALONE, Team, join


def train_round(job: TrainJob) -> RoundEnd:
    """Trains one round, from its newest checkpoint if there is one. See TrainJob for what goes in.

    Under torchrun every rank calls it with the same job; the leader writes. Raises UserError before any work if the shards
    cannot be trained on, and WorkError, before the update, if a loss or a gradient is not finite; checkpoints, draws and
    metrics up to the last checkpoint are then kept.
    """
    shards = shards_of(job)
    plan = plan_round(job.shards, job.train, seed=job.seed, round=job.round)

    team = join(job.train.spread, device_of(job.policy))
    with team.together():
        return _train(job if team.leads else replace(job, sink=Nowhere()), shards, plan, team)


def _train(job: TrainJob, shards: Shards, plan: list[Step], team: Team) -> RoundEnd:
    # The leader alone looks: it cuts, soon after, what the others would be reading.
    done = team.leaders(job.sink.checkpoints() if team.leads else None)
    model, optimizers, state = begin(job, done, team)
    job.sink.cut("draws", state.steps)
    job.sink.cut("metrics", state.steps)
    if state.ended is not None:
        return RoundEnd(state.steps, state.ended)
    if not plan:
        average.with_base(job, model)
        _publish(job, model, optimizers, replace(state, ended="empty"), team)
        return RoundEnd(0, "empty")

    journal, first = Journal(job.sink, job.round), next((s.updates[0] for s in plan if s.updates), None)
    for step in plan[state.steps :]:
        drawn, numbers, metrics = take_step(
            job, model, optimizers, shards, step, before=state.before, first=first, team=team
        )
        journal.add(step, drawn, numbers, metrics)

        state = replace(state, steps=step.index + 1, cursor=step.cursor, ended=end(job, step, metrics))
        if state.ended is not None:
            average.with_base(job, model)
        if state.ended is not None or state.steps % job.train.checkpoint_every == 0:
            journal.flush()
            _publish(job, model, optimizers, state, team)
        job.sink.progress(state.steps, len(plan), summary(metrics))
        if state.ended is not None:
            return RoundEnd(state.steps, state.ended)
    raise AssertionError("the last step of a plan ends the round")


def shards_of(job: TrainJob) -> Shards:
    """The rows of the job as its method reads them, checked. Raises UserError for the first that cannot be trained on."""
    loss = job.train.method.loss
    roles = {role: getattr(job, role) for role in loss.logprob_roles}
    for role, rows in roles.items():
        if rows is None:
            raise UserError(
                f"the method reads log-probs of role {role} (train.method: gal.ref, grpo.kl, grpo.old, teacher); none were given"
            )
    return Shards(
        job.shards,
        **roles,
        mask_truncated=loss.grpo.mask_truncated,
        pairs=loss.gal.pairs if loss.gal is not None else "correct",
    )


def begin(job: TrainJob, done: Mapping[int, Path], team: Team = ALONE) -> tuple[PolicyLM, Optimizers, TrainerState]:
    """From the newest of the round's checkpoints `done`, bitwise; else from the start folder, with its optimizer moments
    if it has any (a round's checkpoint has; the run's base policy brings weights only).

    UserError if the folder is no checkpoint of the round that it should be of.
    """
    folder = done[max(done)] if done else job.start
    torch.manual_seed(seed_from("torch", job.seed, job.round))  # a new adapter draws from it, alike on every rank
    model = load(job, folder)
    if job.train.gradient_checkpointing:
        recompute_activations(model.lm)
    team.share(model)
    optimizers = build_optimizers(model.lm, job.train.method, job.train.optimizer)
    state = load_state(folder) if done or job.round > 0 else None
    if state is not None:
        load_tensors(folder, model, optimizers, rng=bool(done), team=team)
    if not done:
        taken = state.before + state.steps if state is not None else 0
        state = TrainerState(round=job.round, steps=0, ended=None, cursor=Cursor(), before=taken)
    if state is None or (state.round, state.steps) != (job.round, max(done, default=0)):
        raise UserError(f"{folder}: its trainer/state.json is not that of round {job.round}, step {max(done, default=0)}")
    return model, optimizers, state


def load(job: TrainJob, folder: Path) -> PolicyLM:
    """The model of a folder; with an adapter the run's base policy, and the folder's adapter on it."""
    has_adapter = folder != job.policy.model and (folder / adapter.FOLDER).is_dir()  # a base's own is merged into it already
    if job.train.adapter is None:
        if has_adapter:
            raise UserError(
                f"{folder}: trained with an adapter, so training without train.lora cannot go on from it; begin a new run with "
                "policy.model set to this folder, where the adapter is merged into the weights"
            )
        return load_model(folder, job.policy)
    if folder != job.policy.model and not has_adapter:
        raise UserError(
            f"{folder}: trained without an adapter, so {'train.lora' if job.train.lora else 'method bridge'} cannot go on from it; it is for a whole run: begin a new "
            "one with policy.model set to this folder"
        )
    model = load_model(job.policy.model, job.policy)
    adapter.attach(model.lm, job.train.adapter, folder if has_adapter else None)
    if isinstance(job.train.method, BRIDGEMethod):
        bridge.release(model, folder if has_adapter else None)
    return model


def take_step(
    job: TrainJob,
    model: PolicyLM,
    optimizers: Optimizers,
    shards: Shards,
    step: Step,
    *,
    before: int,
    first: Update | None = None,
    team: Team = ALONE,
) -> tuple[list[Row], dict[str, RowNumbers], dict[str, float]]:
    """One step of the plan, updates included: the rows it took, in the plan's order, their numbers by item, and its metrics.

    before: steps really made in the rounds before (TrainerState.before). first: the round's first update, whose rows are
    fresh; WorkError if the trainer's log-probs of them are not the stored ones.
    """
    began, method = time.perf_counter(), job.train.method
    make = bridge.bilevel_update if isinstance(method, BRIDGEMethod) else _update
    drawn: list[Row] = []
    seen: dict[str, Observed] = {}
    for update in step.updates:
        units = [shards.rows(visit.items) for visit in update.visits]
        drawn += [row for unit in units for row in unit]
        taken, fresh = before + step.index, update is first
        seen[update.optimizer] = make(job, model, optimizers, step, update, units, taken, team, fresh=fresh)
    metrics = step_metrics(step, seen, method, graded=job.graded, seconds=time.perf_counter() - began)
    numbers = {row.item_id: n for o in seen.values() for row, n in zip(o.rl_rows, by_row(o, method.loss), strict=True)}
    return drawn, numbers, metrics


def _update(
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
    """One call of one optimizer; `taken` steps were really made before it in the run. fresh: none was in the round."""
    train, loss, counts = job.train, job.train.method.loss, count(units, update.prompts)
    weights = train.method.weights(job.round * train.steps + step.index)
    mix = mixture(weights, loss, counts, easy_scale=_easy_scale(job))
    seen = accumulate(model, units, counts, loss, mix, micro_batch_tokens=train.micro_batch_tokens, team=team)
    seen = merged(team.everyones(seen))
    norm = gradient_norm(model.parameters())
    seen.grad_norm = norm.item()
    where = f"train, round {job.round}, step {step.index}"
    refuse_non_finite(seen, units, where=where)
    if fresh:
        refuse_mismatch(seen, limit=train.max_logprob_difference, where=where)
    seen.rate = update_rate(train, update.optimizer, round=job.round, index=step.index, rounds=job.rounds, taken=taken)
    apply_update(optimizers[update.optimizer], rate=seen.rate, clip_norm=train.optimizer.clip_norm, norm=norm)
    return seen


def _easy_scale(job: TrainJob) -> float:
    """normalise = all: n counts the Easy prompts that a draw over all graded prompts would have held."""
    routing = job.train.method.routing(job.round)
    if job.train.method.loss.normalise != "all" or "easy" in (*routing.rl, *routing.sft):
        return 1.0
    gated = len(job.shards["prompt_id"].unique())
    return gated / (gated + job.graded.get("easy", 0))


def end(job: TrainJob, step: Step, metrics: Mapping[str, float]) -> str | None:
    """Why the round is over after this step, if it is."""
    if step.index + 1 == job.train.steps:
        return "steps"
    return "ess" if metrics.get("ess", 1.0) < job.train.min_ess else None


def _publish(job: TrainJob, model: PolicyLM, optimizers: Optimizers, state: TrainerState, team: Team) -> None:
    """The leader's sink makes the folder and publishes it; all ranks fill it."""

    def write(folder: Path | None) -> None:
        folder = Path(team.leaders(str(folder)))
        save_checkpoint(folder, model, optimizers, state, start=job.start, team=team)
        team.wait()

    try:
        job.sink.checkpoint(state.steps, write) if team.leads else write(None)
    except (OSError, SafetensorError):
        if team.leads:
            raise
        raise Reported(LEFT_ALONE) from None  # every rank is told of a share that could not be written; the leader says it
    team.wait()
