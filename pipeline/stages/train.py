"""train: one round's shards -> checkpoints, draws and metrics. Everything here is files; the arithmetic is the trainer's.

The trainer is passed in by the CLI (`Trainer`), since pipeline and trainer never import each other. Its first sub-stage
(logprobs.py) writes the log-probs of other policies as rows, so that the loop holds one model.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from safetensors import SafetensorError

from pipeline.context import Context
from pipeline.policy import policy_id
from pipeline.progress import Progress, progress
from pipeline.stage import (
    Outcome,
    Spec,
    changes,
    code_revision,
    current,
    describe,
    finish,
    found_fingerprint,
    move,
    need,
    superseded,
)
from pipeline.stages import logprobs
from pipeline.stages.logprobs import LogProbs
from pipeline.store import HELD, MANIFEST, Partition, fsync_folder, partition, partitions, publish, read_parts
from schemas.errors import UserError, WorkError
from schemas.ids import rows_digest
from schemas.manifest import Manifest

HOW = (
    "checkpoint_every",
    "micro_batch_tokens",
    "max_logprob_difference",
    "gradient_checkpointing",
    "processes",
    "spread",
)  # not what is computed


class Trainer(LogProbs, Protocol):
    """What the CLI passes in: the module `trainer.api`."""

    TrainJob: Any

    def in_team(self) -> bool: ...

    def launch(self, command: list[str], processes: int, env: dict[str, str]) -> None: ...

    def assemble(self, spread: str, policy: Any, go: bool) -> bool: ...

    def train_round(self, job: Any) -> Any: ...

    def replay_step(self, job: Any, step: int, *, draws: pa.Table, metrics: pa.Table, method: Any = None) -> Any: ...

    def environment(self, policy: Any) -> dict[str, Any]: ...


def spec(ctx: Context, round: int) -> Spec:
    """Depends on the shards' rows, the starting policy, and every number that the gradient or the schedule sees."""
    method, o = ctx.recipe.train.method, ctx.recipe.train.optimizer
    stage = method.stage(round, ctx.recipe.rounds)
    replaced = {"decay": stage.decay, "warmup_steps": stage.warmup}  # by the stage's own
    unread = {"method": set(method.unused(round)), "optimizer": {key for key, own in replaced.items() if own is not None}}
    train = ctx.recipe.train.model_dump(mode="json", exclude=dict.fromkeys(HOW, True) | unread)
    if train["base_weight"] == 0 or round + 1 < ctx.recipe.rounds:
        del train["base_weight"]  # it makes the run's last policy, and no other
    _, start = ctx.policy_of(round)
    parents = {}
    for route in ("rl", "sft"):
        part = ctx.part("shards", round=round, route=route)
        manifest = part.manifest()
        if manifest is None:
            raise UserError(f"{part.folder}: not there or not finished. Run `dypo grade {ctx.run} --round {round}` first")
        parents[part.label] = manifest.identity
    config = {"train": train, "start": start, "base": ctx.base_policy, "dtype": ctx.recipe.policy.dtype}
    if (stage.decay or o.decay) != "constant":
        config["rounds"] = stage.rounds  # how far the decay goes; otherwise rounds can be added to a finished run
    return Spec("train", ctx.part("checkpoints", round=round), config, parents, ctx.recipe.seed, expensive=True)


def run(ctx: Context, round: int, trainer: Trainer, *, regenerate: bool = False, empty_ok: bool = False) -> list[Outcome]:
    """Trains one round, or goes on with one that was cut off.

    A round with nothing to train on is refused, or with `empty_ok` (`dypo run`) passed through with the policy unchanged.
    """
    started = time.monotonic()
    for route in ("rl", "sft"):
        need(ctx.run, "shards", {"round": round, "route": route}, command=f"dypo grade {ctx.run} --round {round}")
    it = spec(ctx, round)
    shards = read_shards(ctx, round)
    folder, _ = ctx.policy_of(round)
    refuse_shards(ctx, round, shards, empty_ok)
    if not current(it):
        logprobs.refuse(ctx, round)
    _make_room(ctx, it, regenerate)
    if current(it) and _whole(ctx, it):
        end = it.partition.manifest()
        assert end is not None
        why = f"same fingerprint {it.fingerprint[:12]}"
        trainer.assemble(ctx.recipe.train.spread, ctx.recipe.policy, False)
        return [Outcome("train", it.partition.label, "nothing", why, end.rows, facts=end.facts)]
    if ctx.recipe.train.processes > 1 and shards.num_rows and not trainer.in_team():
        return [_in_processes(ctx, it, trainer, started)]
    (it.partition.folder / MANIFEST).unlink(missing_ok=True)
    it.partition.remove_temporary()
    ctx.verify_policy(folder)
    roles = ctx.recipe.train.method.loss.logprob_roles
    outcomes = [logprobs.run(ctx, round, role, trainer) for role in roles]
    if "old" in roles:
        logprobs.refuse(ctx, round)
    trainer.assemble(ctx.recipe.train.spread, ctx.recipe.policy, True)
    with progress(f"train round {round}", ctx.recipe.train.steps, unit="steps") as bar:
        sink = RunSink(ctx, round, it, bar, trainer)
        end = trainer.train_round(job(sink, folder, shards, logprobs.read(ctx, round, roles)))
    for table in ("draws", "metrics"):
        finish(sink.spec(table))
    _, policy = ctx.checkpoint(round, end.steps)
    facts = {"steps": end.steps, "reason": end.reason, "policy": policy}
    it.partition.complete(_manifest(it, [], facts))
    return [*outcomes, Outcome("train", it.partition.label, "made", "", 0, seconds=time.monotonic() - started, facts=facts)]


def follow(ctx: Context, round: int, trainer: Trainer) -> None:
    """What a rank does that does not lead: once the leader has made its inputs, it reads them and trains along."""
    if not trainer.assemble(ctx.recipe.train.spread, ctx.recipe.policy, False):
        return
    folder, _ = ctx.policy_of(round)
    sink = RunSink(ctx, round, spec(ctx, round), Progress("", 0), trainer)
    stored = logprobs.read(ctx, round, ctx.recipe.train.method.loss.logprob_roles)
    trainer.train_round(job(sink, folder, read_shards(ctx, round), stored))


def _in_processes(ctx: Context, it: Spec, trainer: Trainer, started: float) -> Outcome:
    """The same command again, as ranks; this process keeps the run's lock and waits."""
    round = dict(it.partition.keys)["round"]
    command = [sys.executable, "-m", "pipeline", "train", str(ctx.run), "--round", str(round)]
    trainer.launch(command, ctx.recipe.train.processes, {HELD: str(ctx.run)})
    end = it.partition.manifest()
    if end is None:
        raise WorkError(f"{it.partition.folder}: the ranks ended without a word and the round is not finished; run it again")
    return Outcome("train", it.partition.label, "made", "", 0, seconds=time.monotonic() - started, facts=end.facts)


def read_shards(ctx: Context, round: int) -> pa.Table:
    """The round's shards, both routes."""
    routes = [ctx.part("shards", round=round, route=route) for route in ("rl", "sft")]
    return pa.concat_tables(read_parts(part.files(), "shards") for part in routes)


def job(sink: "RunSink", start: Path, shards: pa.Table, stored: dict[str, pa.Table]) -> Any:
    """The trainer's job for the sink's round. stored: log-probs by role."""
    recipe, round = sink.ctx.recipe, sink.round
    graded = need(sink.ctx.run, "grades", {"round": round}, command=f"dypo grade {sink.ctx.run}").facts["grades"]
    return sink.trainer.TrainJob(
        round=round, rounds=recipe.rounds, seed=recipe.seed, train=recipe.train, policy=recipe.policy, start=start,
        shards=shards, **stored,
        graded={g: graded.get(g, 0) for g in ("easy", "mid", "hard")}, sink=sink,
    )  # fmt: skip


def refuse_shards(ctx: Context, round: int, shards: pa.Table, empty_ok: bool) -> None:
    """UserError if there is nothing to train on, or rows are of another policy than their round begins with."""
    if shards.num_rows == 0 and not empty_ok:
        grades = ctx.part("grades", round=round).manifest()
        raise UserError(
            f"{ctx.run}/shards/round={round}: no row to train on: {grades.facts if grades else 'no grades'}. Easier or harder "
            "prompts, more rollouts (rollouts.k) or traces for the Hard ones would give some"
        )
    refuse_other_policies(ctx, round, shards)


def refuse_other_policies(ctx: Context, round: int, shards: pa.Table) -> None:
    """UserError if rows were sampled by another policy than the one their round, as it is now, begins with."""
    pairs = shards.select(["source_round", "policy"]).group_by(["source_round", "policy"]).aggregate([]).to_pylist()
    for sampled, found in sorted((row["source_round"], row["policy"]) for row in pairs):
        if found != (start := ctx.policy_of(sampled)[1]):
            why = "the round before was trained again" if sampled else "policy.model is another one now"
            raise UserError(
                f"{ctx.run}/shards/round={round}: its rollouts of round {sampled} are of policy {found[:12]}, but that round begins with "
                f"{start[:12]} ({why}). Run `dypo refresh {ctx.run} --round {sampled} --regenerate` first"
            )


def _whole(ctx: Context, it: Spec) -> bool:
    """Whether everything that a finished round left is there still: its last checkpoint, draws and metrics."""
    end = it.partition.manifest()
    keys = dict(it.partition.keys)
    return end is not None and all(
        p.manifest() is not None
        for p in (
            ctx.part("checkpoints", **keys, step=end.facts["steps"]),
            ctx.part("draws", **keys),
            ctx.part("metrics", **keys),
        )
    )


def _make_room(ctx: Context, it: Spec, regenerate: bool) -> None:
    """A round of other shards or settings moves to superseded/ whole, with --regenerate; one of these very ones comes back."""
    lies, kept = found(it), superseded("train", it.partition, it.fingerprint)
    if lies not in (None, it.fingerprint) and not regenerate and not kept.exists():
        what = "training" if it.partition.manifest() else "unfinished training"
        raise UserError(
            f"{it.partition.folder}: a {what} of other shards or settings lies there ({what_changed(it)}). Restore them to go on, or "
            "pass --regenerate to train the round again (the old one moves to superseded/)"
        )
    for table in ("draws", "metrics", "checkpoints"):  # checkpoints last: they decide what is found
        part = ctx.part(table, **dict(it.partition.keys))
        if lies not in (None, it.fingerprint) and part.folder.exists():
            move(part.folder, superseded("train", part, lies))
        back = superseded("train", part, it.fingerprint)
        if back.exists() and not part.folder.exists():
            move(back, part.folder)


def found(it: Spec) -> str | None:
    """The fingerprint of the training that lies there, finished or not; None if there is none."""
    if end := it.partition.manifest():
        return end.fingerprint
    for path in sorted(it.partition.folder.glob(f"step=*/{MANIFEST}")):
        return Manifest.model_validate_json(path.read_text()).fingerprint
    for table in ("draws", "metrics"):
        if old := found_fingerprint(partition(it.partition.run, table, dict(it.partition.keys))):
            return old
    return None


def what_changed(it: Spec) -> str:
    """What the training that lies there was made from that is otherwise now."""
    for path in sorted(it.partition.folder.glob(f"step=*/{MANIFEST}")):
        return changes(it, Manifest.model_validate_json(path.read_text()))
    return "its parts carry another fingerprint"


def _manifest(it: Spec, parts: list, facts: dict[str, Any], part: Partition | None = None) -> Manifest:
    part = part or it.partition
    return Manifest(
        table="checkpoints",
        keys=dict(part.keys),
        stage="train",
        fingerprint=it.fingerprint,
        config=it.config,
        parents=it.parents,
        parts=parts,
        rows=0,
        rows_digest=rows_digest([]),
        seed=it.seed,
        code=code_revision(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        facts=facts,
    )


@dataclass
class RunSink:
    """trainer.job.Sink over the run folder: parts carry the round's training fingerprint, checkpoints a manifest."""

    ctx: Context
    round: int
    train: Spec
    bar: Progress
    trainer: Trainer
    _specs: dict[str, Spec] = field(default_factory=dict)

    def spec(self, table: str) -> Spec:
        """draws and metrics are the training's own output: same settings, same parents, so derived from its fingerprint."""
        if table not in self._specs:
            part = self.ctx.part(table, round=self.round)
            self._specs[table] = Spec("train", part, self.train.config, self.train.parents, self.train.seed)
        return self._specs[table]

    def write(self, table: str, rows: pa.Table, part: str) -> None:
        it = self.spec(table)
        it.partition.write(rows, it.fingerprint, f"part-{part}.parquet")

    def cut(self, table: str, step: int) -> None:
        it = self.spec(table)
        it.partition.remove_temporary()
        (it.partition.folder / MANIFEST).unlink(missing_ok=True)  # the round is not finished, so neither are these
        for path in it.partition.loose(it.fingerprint):
            rows = read_parts([path], table)
            keep = rows.filter(pc.field("step") < step)
            if keep.num_rows == 0:
                path.unlink()
            elif keep.num_rows < rows.num_rows:
                it.partition.write(keep, it.fingerprint, path.name)

    def checkpoints(self) -> dict[int, Path]:
        """Complete ones whose steps have all their draws and metrics: a part that someone removed is made again."""
        names = [{p.name for p in self.spec(t).partition.folder.glob("part-*.parquet")} for t in ("draws", "metrics")]
        metrics = self.spec("metrics")
        paths = [p for p in sorted(metrics.partition.folder.glob("part-*.parquet")) if p.name in names[0] & names[1]]
        known = set(read_parts(paths, "metrics", ["step"]).column("step").to_pylist())
        found = {}
        for part in partitions(self.ctx.run, "checkpoints"):
            keys = dict(part.keys)
            if keys["round"] == self.round and "step" in keys and set(range(int(keys["step"]))) <= known:
                part.verify()
                found[int(keys["step"])] = part.folder
        return found

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        part = self.ctx.part("checkpoints", round=self.round, step=step)
        tmp = part.folder.with_name(f".{part.folder.name}.{os.getpid()}.tmp")
        try:
            if tmp.exists():
                shutil.rmtree(tmp)
            tmp.mkdir(parents=True)
            write(tmp)
            files = sorted(p for p in tmp.rglob("*") if p.is_file())
            for path in files:
                with open(path, "rb+") as f:
                    os.fsync(f.fileno())
            for folder in {p.parent for p in files}:
                fsync_folder(folder)
            parts = [describe(p, 0, str(p.relative_to(tmp))) for p in files]
            facts = {"policy": policy_id(tmp), "environment": self.environment()}
            manifest = _manifest(self.train, parts, facts, part)
            publish(tmp / MANIFEST, lambda p: p.write_text(manifest.model_dump_json(indent=1) + "\n"))
            if part.folder.exists():
                shutil.rmtree(part.folder)
            tmp.rename(part.folder)
            fsync_folder(part.folder.parent)
        except (OSError, SafetensorError) as e:  # safetensors' input and output errors are no OSError
            shutil.rmtree(tmp, ignore_errors=True)
            raise WorkError(
                f"{part.folder}: the checkpoint could not be written ({getattr(e, 'strerror', None) or e}). Earlier checkpoints "
                "are kept; make room, then run the same command again"
            ) from e
        return part.folder

    def environment(self) -> dict[str, Any]:
        """What the fingerprint leaves out and the last bits depend on; it holds for the steps since the checkpoint before."""
        recipe = self.ctx.recipe
        how = {name: getattr(recipe.train, name) for name in ("micro_batch_tokens", "gradient_checkpointing", "processes")}
        return {**self.trainer.environment(recipe.policy), **how}

    def progress(self, done: int, total: int, note: str) -> None:
        self.bar.to(done, note)
