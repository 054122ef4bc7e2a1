"""replay: one optimizer step of a trained round, computed again and compared with what is stored.

One idea: the run answers. The job is the one that `train` would make, refused unless settings and shards are those of the
training that lies there; what the fingerprint leaves out (threads, micro-batches) is taken from the checkpoint that the step
led to. Reads only. Left out: the arithmetic (trainer/replay.py).
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.context import Context, load
from pipeline.progress import progress
from pipeline.stage import code_revision, current, need, parts_of
from pipeline.stages import logprobs
from pipeline.stages.grade import route_spec
from pipeline.stages.train import RunSink, Trainer, found, job, read_shards, spec, what_changed
from pipeline.store import partitions, read_parts
from schemas.errors import UserError, WorkError
from schemas.methods import Method

METHOD = "train.method."
REFUSED = {
    "type": "decides how prompts are routed",
    "preset": "fills only keys that are not given, and the recipe in a run gives all",
    "teacher": "decides which log-probs are stored",
    "variant": "fills only keys that are not given, and the recipe in a run gives all",
    "schedule": "decides which rows a step takes",
    "queue_size": "decides which rows a step takes",
    "queue_groups": "decides which rows a step takes",
}
SHOWN = ("loss/", "grad_norm", "lr", "denom/")  # what the terminal shows of the step; --json has all


def replay(run: Path, round: int, step: int, trainer: Trainer, overrides: list[str]) -> dict[str, Any]:
    """One step again, as JSON values. `overrides`: train.method keys of the loss to compare with.

    Raises UserError, before any work, if the round was not trained on what lies there or an override asks for other rows.
    """
    ctx = load(run)
    method = _changed_method(ctx, run, round, overrides) if overrides else None
    it = spec(ctx, round)
    lies = found(it)
    if lies is None:
        raise UserError(f"{it.partition.folder}: no training to replay. Run `dypo train {run} --round {round}` first")
    if lies != it.fingerprint:
        raise UserError(
            f"{it.partition.folder}: trained on other shards or settings than the run has now ({what_changed(it)}). Restore "
            "them to replay its steps"
        )
    for route in ("rl", "sft"):
        need(ctx.run, "shards", {"round": round, "route": route}, command=f"dypo grade {ctx.run} --round {round}")
    start, _ = ctx.policy_of(round)
    ctx.verify_policy(start)
    recorded = _recorded(ctx, round, step)
    with progress(f"replay round {round} step {step}", step + 1, unit="steps") as bar:
        sink = RunSink(_as_recorded(ctx, recorded), round, it, bar, trainer)
        tables = {}
        for table in ("draws", "metrics"):
            of = sink.spec(table)
            of.partition.verify()
            tables[table] = read_parts(parts_of(of), table)
        the_job = job(sink, start, read_shards(ctx, round), _stored(ctx, round, method))
        got = trainer.replay_step(the_job, step, **tables, method=method)
    return {
        "round": round, "step": step, "from_step": got.start, "metrics": got.metrics,
        "differences": [asdict(d) for d in got.differences], "weights": got.weights, "checkpoint": got.checkpoint,
        "bitwise": not got.differences and got.checkpoint in (None, got.weights),
        "set": overrides, "changed": got.changed, "cosine": got.cosines,
        "trained_with": recorded, "replayed_with": {**sink.environment(), "code": code_revision()},
    }  # fmt: skip


def render(it: dict[str, Any]) -> str:
    """The dict of `replay` for a terminal; floats in full."""
    walked = it["step"] - it["from_step"]
    since = f"checkpoint step={it['from_step']}" if it["from_step"] else "the round's start"
    lines = [f"round {it['round']}, step {it['step']}, computed again from {since} ({walked} steps before it)"]
    columns = {"as trained": it["metrics"]} | ({", ".join(it["set"]): it["changed"]} if it["changed"] else {})
    names = sorted((n for n in {n for c in columns.values() for n in c} if n.startswith(SHOWN)), key=_place)
    rows = [["", *columns], *([n, *(_number(c.get(n)) for c in columns.values())] for n in names)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name, cosine in it["cosine"].items():
        what = "gradient" if name == "main" else f"gradient of the {name} update"
        lines.append(f"cosine of the two: {what} {_number(cosine) or 'none, one of them is zero'}")
    ours = [d for d in it["differences"] if d["step"] == it["step"]]
    total = len(it["metrics"])
    lines.append(f"metrics: {'all' if not ours else total - len(ours)} of {total} bitwise equal to the stored ones")
    lines += [f"  {d['name']}: stored {_number(d['stored'])}, now {_number(d['replayed'])}" for d in ours]
    after = it["step"] + 1
    if it["checkpoint"] is None:
        lines.append(f"weights: sha256 {it['weights']}; no checkpoint step={after} to compare with")
    elif it["checkpoint"] == it["weights"]:
        lines.append(f"weights: sha256 {it['weights']}, bitwise equal to checkpoint step={after}")
    else:
        lines.append(f"weights: sha256 {it['weights']}, but checkpoint step={after} has {it['checkpoint']}")
    return "\n".join(lines)


def refuse_difference(it: dict[str, Any]) -> None:
    """WorkError if something is not bitwise what was stored: the first of it, and what may be why."""
    if it["bitwise"]:
        return
    if it["differences"]:
        d = it["differences"][0]
        what = f"step {d['step']}, {d['name']}: stored {_number(d['stored'])}, now {_number(d['replayed'])}"
    else:
        what = f"the weights after step {it['step']} are not those of the checkpoint"
    then, now = it["trained_with"], it["replayed_with"]
    others = [f"{k} {then[k]} then, {now.get(k)} now" for k in then if then[k] != now.get(k)]
    if not then:
        why = "the checkpoint does not say what it was trained with; bitwise needs the same torch, processor and threads"
    elif others:
        why = f"trained with {'; '.join(others)}. Bitwise needs the same torch, processor, threads and code"
    else:
        why = (
            f"torch {now['torch']}, {now['threads']} threads, processor and code are those of the training, so a stored row or "
            "checkpoint is not what it was"
        )
    raise WorkError(f"replay, round {it['round']}: not bitwise. First difference: {what}. {why}")


def _place(name: str) -> tuple[int, str]:
    return next(at for at, prefix in enumerate(SHOWN) if name.startswith(prefix)), name


def _number(value: float | None) -> str:
    return "" if value is None else repr(value)


def _recorded(ctx: Context, round: int, step: int) -> dict[str, Any]:
    """What step `step` was made with, as the next checkpoint says: the same process made both. Empty if none says."""
    for part in partitions(ctx.run, "checkpoints"):
        keys, manifest = dict(part.keys), part.manifest()
        if keys["round"] == round and int(keys.get("step", -1)) > step and manifest and "environment" in manifest.facts:
            return {**manifest.facts["environment"], "code": manifest.code}
    return {}


def _as_recorded(ctx: Context, recorded: dict[str, Any]) -> Context:
    """The run with the settings outside of the fingerprint that decide the last bits, as they were."""
    policy, train = ctx.recipe.policy, ctx.recipe.train
    if recorded:
        policy = policy.model_copy(update={"threads": recorded["threads"]})
        train = train.model_copy(update={k: recorded[k] for k in ("micro_batch_tokens", "gradient_checkpointing")})
    return replace(ctx, recipe=ctx.recipe.model_copy(update={"policy": policy, "train": train}))


def _changed_method(ctx: Context, run: Path, round: int, overrides: list[str]) -> Method:
    """The method under the overrides. UserError for one that is not of the loss alone."""
    for item in overrides:
        key = item.partition("=")[0]
        if not key.startswith(METHOD):
            raise UserError(
                f"--set {item}: replay asks what another loss would have done with the same weights and rows, so only "
                f"{METHOD}* can be set; {key} decides which rows there are, which a step takes, or the walk up to the step"
            )
        if why := REFUSED.get(key.removeprefix(METHOD)):
            raise UserError(f"--set {item}: {key} {why}, so replay does not take it")
        if key == f"{METHOD}alpha" and getattr(ctx.recipe.train.method, "gal_weight", None) is not None:
            raise UserError(f"--set {item}: the run has gal_weight, so alpha is not used; set {METHOD}gal_weight instead")
    changed = load(run, overrides)
    if route_spec(changed, round, "rl", "").config != route_spec(ctx, round, "rl", "").config:
        raise UserError(
            f"--set {' '.join(overrides)}: would route the round anew (query, adjust, advantages), and replay keeps the rows. To see "
            f"that, `dypo grade` and `dypo train` a copy of the run"
        )
    if changed.recipe.train.adapter != ctx.recipe.train.adapter:
        raise UserError(
            f"--set {' '.join(overrides)}: would be another adapter than the one that was trained, which replay goes on from"
        )
    return changed.recipe.train.method


def _stored(ctx: Context, round: int, changed: Method | None) -> dict[str, pa.Table]:
    """The stored log-probs of every role that one of the two methods reads."""
    trained = ctx.recipe.train.method.loss.logprob_roles
    for role in dict.fromkeys((*trained, *(changed.loss.logprob_roles if changed else ()))):
        part = ctx.part("logprobs", round=round, role=role)
        if role in trained:
            need(ctx.run, "logprobs", dict(part.keys), command=f"dypo train {ctx.run} --round {round}")
        elif not current(logprobs.spec(ctx, round, role)):
            other = f"{METHOD}gal.ref = none or old, and grpo.kl = 0" if role == "ref" else f"{METHOD}grpo.old = sampler"
            raise UserError(
                f"{part.folder}: the changed loss reads log-probs of role {role}, and the run has none stored, as the method it "
                f"was trained with needs none. Compare with {other}"
            )
        else:
            part.verify()
    return logprobs.read(ctx, round, dict.fromkeys((*trained, *(changed.loss.logprob_roles if changed else ()))))
