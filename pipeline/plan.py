"""plan and status: what lies in the run, what would run and why, with rows, tokens, disk and an estimate of time.

It computes the same specs as the stages do and runs nothing. What waits for something says for what. Time comes from
the rates that earlier partitions of the same table recorded; with none measured yet it is left open.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.context import Context
from pipeline.flow import due_for_eval, final_step
from pipeline.stage import Spec, changes, found_fingerprint
from pipeline.stages import evaluate, generate, grade, ingest, score, train
from pipeline.store import partitions
from schemas.errors import UserError

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


def plan(ctx: Context) -> Iterator[Planned]:
    """Every partition that `dypo run` would make, in order."""
    r = ctx.recipe
    yield _look(ctx, "ingest", "prompts", {}, lambda: ingest.spec(ctx), None)
    train_rows = _count(ctx, "train")
    for t in r.teachers:
        rows = None if train_rows is None else train_rows * t.samples
        most = getattr(t.engine, "max_tokens", None)
        yield _look(ctx, "teachers", "traces", {"teacher": t.name}, lambda t=t: generate.teacher_spec(ctx, t), rows, most)
    yield from _plan_eval(ctx, 0, 0)
    per_round = train_rows
    if r.rollouts.prompts_per_round is not None:
        per_round = min(r.rollouts.prompts_per_round, train_rows or r.rollouts.prompts_per_round)
    for n in range(r.rounds):
        rows = None if per_round is None else per_round * r.rollouts.k
        key = {"round": n}
        yield _look(ctx, "rollouts", "rollouts", key, lambda n=n: generate.rollout_spec(ctx, n), rows, r.rollouts.max_tokens)
        yield _score(ctx, "rollout", "rollouts", key, rows)
        for t in r.teachers if n == 0 else ():
            have = None if train_rows is None else train_rows * t.samples
            yield _score(ctx, "trace", "traces", {"teacher": t.name}, have)
        yield _look(ctx, "grade", "grades", key, lambda n=n: grade.grade_spec(ctx, n), per_round)
        for route in ("rl", "sft"):
            yield _look(
                ctx, "route", "shards", {**key, "route": route}, lambda n=n, route=route: _route_spec(ctx, n, route), None
            )
        if r.train.method.needs_reference:
            yield _look(ctx, "logprobs", "logprobs", {**key, "role": "ref"}, lambda n=n: _logprob_spec(ctx, n), None)
        yield _look(ctx, "train", "checkpoints", key, lambda n=n: train.spec(ctx, n), None)
        if due_for_eval(ctx, n):
            yield from _plan_eval(ctx, n, final_step(ctx, n) if ctx.round_end(n) else r.train.steps)


def _plan_eval(ctx: Context, round: int, step: int) -> Iterator[Planned]:
    for suite in ctx.recipe.eval.suites:
        keys = {"round": round, "step": step, "suite": suite.name}
        prompts = _count(ctx, "eval", suite.sources)
        rows = None if prompts is None else min(prompts, suite.limit or prompts) * suite.n
        most = ctx.recipe.eval.max_tokens
        yield _look(
            ctx,
            "eval_rollouts",
            "eval_rollouts",
            keys,
            lambda s=suite: evaluate.sample_spec(ctx, s, round, step),
            rows,
            most,
        )
        yield _score(ctx, "eval", "eval_rollouts", keys, rows)
        yield _look(ctx, "eval", "evals", keys, lambda s=suite: _eval_spec(ctx, s, round, step), None)


def _count(ctx: Context, split: str, sources: list[str] | None = None) -> int | None:
    part = ctx.part("prompts")
    if part.manifest() is None:
        return None
    from pipeline.store import read_parts

    rows = read_parts(part.files(), "prompts", ["split", "source"]).to_pylist()
    return sum(r["split"] == split and (sources is None or r["source"] in sources) for r in rows)


def _score(ctx: Context, kind: str, table: str, keys: dict[str, Any], rows: int | None) -> Planned:
    return _look(
        ctx, "score", "scores", {"kind": kind, **keys}, lambda: score.spec(ctx, kind, ctx.part(table, **keys)), rows
    )


def _route_spec(ctx: Context, round: int, route: str) -> Spec:
    grades = ctx.part("grades", round=round).manifest()
    if grades is None:
        raise UserError(f"waits for grades of round {round}")
    return grade.route_spec(ctx, round, route, grades.identity)


def _logprob_spec(ctx: Context, round: int) -> Spec:
    if ctx.part("shards", round=round, route="rl").manifest() is None:
        raise UserError(f"waits for shards of round {round}")
    return train.logprob_spec(ctx, round)


def _eval_spec(ctx: Context, suite: Any, round: int, step: int) -> Spec:
    if ctx.part("scores", kind="eval", round=round, step=step, suite=suite.name).manifest() is None:
        raise UserError("waits for its verdicts")
    return evaluate.spec(ctx, suite, round, step)


def _look(
    ctx: Context,
    stage: str,
    table: str,
    keys: dict[str, Any],
    make: Callable[[], Spec],
    rows: int | None,
    most: int | None = None,
) -> Planned:
    """Compares what a stage would make with what lies there."""
    part = ctx.part(table, **keys)
    manifest = part.manifest()
    have = manifest.rows if manifest else 0
    try:
        it = make()
    except UserError as e:
        why = str(e).splitlines()[0].replace(f"{ctx.run}/", "").replace(str(ctx.run), "the run")
        return Planned(stage, part.label, "stale" if manifest else "waits", why, have, rows)
    left = None if rows is None else max(rows - have, 0)
    if manifest and manifest.fingerprint != it.fingerprint:
        state, why, left = "stale", changes(it, manifest), rows
    elif manifest and left and table != "grades" and left > manifest.failed and stage != "teachers":
        state, why = "partial", f"{left} rows are missing from its work list"
    elif manifest:
        return Planned(stage, part.label, "done", f"fingerprint {it.fingerprint[:12]}", have, have)
    elif (found := found_fingerprint(part)) is not None:
        same = found == it.fingerprint
        state, why = "partial", "was cut off; goes on" if same else "unfinished work of other settings lies there"
    else:
        state, why = "due", "not made yet"
    tokens = left * most if left is not None and most is not None else None
    rate = _rate(ctx, table)
    return Planned(
        stage, part.label, state, why, have, left, tokens,
        None if tokens is None else int(tokens * BYTES_PER_TOKEN),
        None if left is None or rate is None else left / rate,
    )  # fmt: skip


def _rate(ctx: Context, table: str) -> float | None:
    """Rows a second that the newest partition of this table was made at."""
    rates = [m.facts.get("rows_per_s") for p in partitions(ctx.run, table) if (m := p.manifest())]
    known = [float(r) for r in rates if r]
    return known[-1] if known else None
