"""plan and status: what lies in the run, what would run and why, with rows, tokens, disk and an estimate of time.

It computes the same specs as the stages do and runs nothing. What waits for something says for what, and what was made
from something that would be made again is stale with it. Time comes from the rates that earlier partitions of the same
table recorded; with none measured yet it is left open.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline import skips
from pipeline.context import Context
from pipeline.flow import due_for_eval, final_step
from pipeline.stage import Spec, changes, found_fingerprint
from pipeline.stages import evaluate, generate, grade, ingest, logprobs, score, train
from pipeline.store import partitions, read_parts
from schemas.errors import UserError
from schemas.methods import Role
from schemas.recipe import Suite

BYTES_PER_TOKEN = 4.1  # id + float32 log-prob after byte-stream split and zstd: 0.51 of 8 bytes (measured)


@dataclass(frozen=True)
class Planned:
    """One partition. state: `done`, `stale` (made from something else), `partial`, `due` or `waits`."""

    stage: str
    partition: str
    state: str
    why: str
    have: int
    rows: int | None = None
    max_tokens: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None


def plan(ctx: Context) -> list[Planned]:
    """Every partition that `dypo run` would make, and further rounds that lie on disk, in order."""
    return _Plan(ctx).all()


class _Plan:
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.rows: list[Planned] = []
        self.unsettled: set[str] = set()  # labels of what would be made

    def all(self) -> list[Planned]:
        r = self.ctx.recipe
        self.look("ingest", "prompts", {}, lambda: ingest.spec(self.ctx))
        train_rows = self.prompts("train")
        for t in r.teachers:
            wanted = None if train_rows is None or t.engine.type == "replay" else train_rows * t.samples
            most = getattr(t.engine, "max_tokens", None)
            self.look(
                "teachers", "traces", {"teacher": t.name}, lambda t=t: generate.teacher_spec(self.ctx, t), wanted, most
            )
        self.evals(0, 0, (), r.eval.suites)
        for n in range(max(r.rounds, *(1 + n for n in self.rounds_on_disk()), 0)):
            self.round(n, train_rows)
        return self.rows

    def rounds_on_disk(self) -> list[int]:
        return [int(dict(p.keys)["round"]) for p in partitions(self.ctx.run, "rollouts")]

    def round(self, n: int, train_rows: int | None) -> None:
        ctx, r = self.ctx, self.ctx.recipe
        key = {"round": n}
        drawn = r.rollouts.prompts_per_round
        prompts = drawn if train_rows is None else min(drawn or train_rows, train_rows)
        groups = bool(r.train.method.routing(n).rl)  # else the method reads no rollouts in this round
        wanted = None if prompts is None else prompts * r.rollouts.k * groups
        sampled = (f"checkpoints/round={n - 1}",) if n else ()
        if groups and (r.rollouts.sequential or r.rollouts.reuse):
            self.look("skips", "skips", key, lambda: skips.spec(ctx, n), after=sampled)
            found = ctx.part("skips", **key).manifest()
            wanted = None if wanted is None or found is None else wanted - int(found.facts["skipped"])
            sampled = (*sampled, f"skips/round={n}")
        spec = lambda: generate.rollout_spec(ctx, n)  # noqa: E731
        self.look("rollouts", "rollouts", key, spec, wanted, r.rollouts.max_tokens, sampled)
        self.score("rollout", "rollouts", key, wanted)
        for t in r.teachers if n == 0 else ():
            traces = None if train_rows is None or t.engine.type == "replay" else train_rows * t.samples
            self.score("trace", "traces", {"teacher": t.name}, traces)
        self.look("grade", "grades", key, lambda: grade.grade_spec(ctx, n), prompts if groups else 0)
        if r.train.method.routing(n).discriminator is not None:
            self.look("ratings", "ratings", key, lambda: self.rating_spec(n))
        for route in ("rl", "sft"):
            self.look("route", "shards", {**key, "route": route}, lambda route=route: self.route_spec(n, route))
        for role in r.train.method.loss.logprob_roles:
            self.look("logprobs", "logprobs", {**key, "role": role}, lambda role=role: self.logprob_spec(n, role))
        self.look("train", "checkpoints", key, lambda: train.spec(ctx, n), after=sampled)
        step = final_step(ctx, n) if ctx.round_end(n) else r.train.steps
        self.evals(n, step, (f"checkpoints/round={n}",), due_for_eval(ctx, n))

    def evals(self, round: int, step: int, after: tuple[str, ...], suites: list[Suite]) -> None:
        ctx = self.ctx
        for suite in suites:
            keys = {"round": round, "step": step, "suite": suite.name}
            prompts = self.prompts("eval", suite.sources)
            wanted = None if prompts is None else min(prompts, suite.limit or prompts) * suite.n
            spec = lambda s=suite: evaluate.sample_spec(ctx, s, round, step)  # noqa: E731
            self.look("eval_rollouts", "eval_rollouts", keys, spec, wanted, evaluate.sampling(ctx, suite).max_tokens, after)
            self.score("eval", "eval_rollouts", keys, wanted)
            self.look(
                "eval",
                "evals",
                keys,
                lambda s=suite: self.eval_spec(s, round, step),
                after=(f"scores/kind=eval/{_path(keys)}",),
            )

    def score(self, kind: str, table: str, keys: dict[str, Any], wanted: int | None) -> None:
        part = self.ctx.part(table, **keys)
        self.look("score", "scores", {"kind": kind, **keys}, lambda: score.spec(self.ctx, kind, part), wanted)

    def prompts(self, split: str, sources: list[str] | None = None) -> int | None:
        part = self.ctx.part("prompts")
        if part.manifest() is None:
            return None
        rows = read_parts(part.files(), "prompts", ["split", "source"]).to_pylist()
        return sum(r["split"] == split and (sources is None or r["source"] in sources) for r in rows)

    def route_spec(self, round: int, route: str) -> Spec:
        grades = self.ctx.part("grades", round=round).manifest()
        if grades is None:
            raise UserError(f"waits for grades/round={round}")
        return grade.route_spec(self.ctx, round, route, grades.identity)

    def rating_spec(self, round: int) -> Spec:
        grades = self.ctx.part("grades", round=round).manifest()
        if grades is None:
            raise UserError(f"waits for grades/round={round}")
        (it,) = grade.rating_specs(self.ctx, round, grades.identity)
        return it

    def logprob_spec(self, round: int, role: Role) -> Spec:
        if self.ctx.part("shards", round=round, route="rl").manifest() is None:
            raise UserError(f"waits for shards/round={round}")
        return logprobs.spec(self.ctx, round, role)

    def eval_spec(self, suite: Any, round: int, step: int) -> Spec:
        if self.ctx.part("scores", kind="eval", round=round, step=step, suite=suite.name).manifest() is None:
            raise UserError("waits for its verdicts")
        return evaluate.spec(self.ctx, suite, round, step)

    def look(
        self,
        stage: str,
        table: str,
        keys: dict[str, Any],
        make: Callable[[], Spec],
        wanted: int | None = None,
        most: int | None = None,
        after: tuple[str, ...] = (),
    ) -> None:
        """Compares what a stage would make with what lies there. `after`: labels that it depends on beside its parents."""
        part = self.ctx.part(table, **keys)
        manifest = part.manifest()
        have = manifest.rows if manifest else 0
        try:
            it = make()
        except UserError as e:
            why = str(e).splitlines()[0].replace(f"{self.ctx.run}/", "").replace(str(self.ctx.run), "the run")
            return self.add(Planned(stage, part.label, "stale" if manifest else "waits", why, have, wanted))
        left = None if wanted is None else max(wanted - have, 0)
        found = train.found(it) if stage == "train" else found_fingerprint(part)
        again = sorted(self.unsettled & {*it.parents, *after})
        if manifest and manifest.fingerprint != it.fingerprint:
            state, why, left = "stale", changes(it, manifest), wanted
        elif again:
            state, why = "stale" if manifest else "waits", f"waits for {again[0]}, which would be made"
        elif manifest and left is not None and left > manifest.failed:
            state, why = "partial", f"{left} rows are missing from its work list"
        elif manifest:
            return self.add(Planned(stage, part.label, "done", f"fingerprint {it.fingerprint[:12]}", have, have))
        elif found is not None:
            state, why = (
                "partial",
                "was cut off; goes on" if found == it.fingerprint else "unfinished work of other settings",
            )
        else:
            state, why = "due", "not made yet"
        tokens = left * most if left is not None and most is not None else None
        disk = None if tokens is None else int(tokens * BYTES_PER_TOKEN)
        rate = _rate(self.ctx, table)
        seconds = None if left is None or rate is None else left / rate
        return self.add(Planned(stage, part.label, state, why, have, left, tokens, disk, seconds))

    def add(self, row: Planned) -> None:
        self.rows.append(row)
        if row.state != "done":
            self.unsettled.add(row.partition)


def _path(keys: dict[str, Any]) -> str:
    return "/".join(f"{k}={v}" for k, v in keys.items())


def _rate(ctx: Context, table: str) -> float | None:
    """Rows a second that the newest partition of this table was made at."""
    rates = [m.facts.get("rows_per_s") for p in partitions(ctx.run, table) if (m := p.manifest())]
    known = [float(r) for r in rates if r]
    return known[-1] if known else None
