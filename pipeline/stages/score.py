"""score: verdicts on rollouts, traces and eval rollouts, all by the same code in the same pool."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from pipeline.context import Context
from pipeline.progress import progress
from pipeline.rows_digest import digest_parts
from pipeline.scorers import Item, Verdict, VerdictPool, judge, recorded
from pipeline.scorers import version as scorer_version
from pipeline.scorers.pool import decided_unread
from pipeline.scorers.user import source_hash
from pipeline.stage import (
    Outcome,
    Spec,
    begin,
    counts,
    current,
    describe_part,
    finish,
    need,
    nothing,
    parts_of,
    set_aside,
    settings,
)
from pipeline.store import MERGED, Partition, as_declared, publish, read_parts, write_part
from schemas.errors import UserError, WorkError
from schemas.ids import text_sha
from schemas.recipe import ReplayEngine
from schemas.scorers import JudgeScorer, ScorerConfig, UserScorer
from schemas.tables import ARROW

BATCH = 2048  # rows in one part file, and so what a kill can cost
ASKED = 256  # the same, of verdicts that a judge was asked for
RUNNING = {"base_url", "api_key_env", "concurrency", "timeout_s", "retries"}  # of a judge: how it is asked, not what


def spec(ctx: Context, kind: str, source: Partition) -> Spec:
    """Depends on the verifiers, the judged rows' settings and the gold answers."""
    manifest = source.manifest()
    prompts = ctx.part("prompts").manifest()
    if manifest is None or prompts is None:
        raise UserError(f"{source.folder}: not there or not finished; nothing to score")
    verifiers = {
        name: {**settings(v, without=RUNNING, later=("think",)), "version": scorer_version(v), **_code(v)}
        for name, v in sorted(ctx.recipe.score.verifiers.items())
    }
    part, limits = ctx.part("scores", kind=kind, **dict(source.keys)), ctx.recipe.score
    parents = {source.label: manifest.fingerprint, "prompts": prompts.identity}
    config: dict[str, Any] = {"verifiers": verifiers, "timeout_s": limits.timeout_s, "memory_mb": limits.memory_mb}
    if (column := _recorded(ctx, kind, source)) is not None:
        config["recorded"] = column
    return Spec("score", part, config, parents, 0)


def _recorded(ctx: Context, kind: str, source: Partition) -> str | None:
    """The recorded column that judges these traces, if their teacher's recipe names one."""
    name = dict(source.keys).get("teacher")
    engines = [t.engine for t in ctx.recipe.teachers if kind == "trace" and t.name == name]
    return next((e.verdict for e in engines if isinstance(e, ReplayEngine)), None)


def _code(verifier: ScorerConfig) -> dict[str, str]:
    """A user's function is part of what verdicts depend on: its file's hash, not its place on disk."""
    if not isinstance(verifier, UserScorer):
        return {}
    return {"function": verifier.function.rpartition(":")[2], "code": source_hash(verifier)}


def run(ctx: Context, sources: list[tuple[str, Partition]], *, again: bool = False) -> list[Outcome]:
    """Scores some partitions, given with their kind. One pool serves them all and starts only when there is work.

    again: asks judges once more where they gave no reply. Verdicts that change make later stages stale, so only `dypo score` does.
    """
    outcomes = []
    with ExitStack() as stack:
        workers = Workers(ctx, stack)
        for kind, source in sources:
            need(ctx.run, source.table, dict(source.keys), command=f"dypo generate {ctx.run}")
            it = spec(ctx, kind, source)
            _refuse_unrecorded(ctx, kind, source)
            begin(it)
            if (found := it.partition.manifest()) and _too_many_failed(ctx, found.failed, found.rows):
                set_aside(it)  # the user has mended something: judge anew
            outcome = _judged(ctx, it, kind, source, workers)
            if again and outcome.action != "made":
                outcome = _asked_again(ctx, it, kind, source, workers) or outcome
            outcomes.append(outcome)
    for outcome in outcomes:
        _refuse_a_broken_verifier(ctx, outcome)
    return outcomes


def aside(ctx: Context, sources: list[tuple[str, Partition]]) -> list[Spec]:
    """The verdicts that `run` would come to, with `scores` left as it is: those that are not there yet are judged into the
    folder of superseded partitions from which `run` brings them back.
    """
    specs = []
    with ExitStack() as stack:
        workers = Workers(ctx, stack)
        for kind, source in sources:
            need(ctx.run, source.table, dict(source.keys), command=f"dypo generate {ctx.run}")
            it = spec(ctx, kind, source)
            _refuse_unrecorded(ctx, kind, source)
            if not current(it):
                it = replace(it, partition=kept_under(it.partition, it.fingerprint))
                it.partition.remove_temporary()
                _judged(ctx, it, kind, source, workers)
            specs.append(it)
    return specs


def kept_under(part: Partition, fingerprint: str) -> Partition:
    """The superseded partition of this fingerprint, whether it is there or not."""
    return Partition(part.run / "superseded" / "score" / fingerprint[:16], part.table, part.keys)


class Workers:
    """Who judges, each there from the first use on: the pool, and what judges have said so far in this run."""

    def __init__(self, ctx: Context, stack: ExitStack) -> None:
        self._ctx, self._stack = ctx, stack

    @cached_property
    def pool(self) -> VerdictPool:
        s = self._ctx.recipe.score
        verifiers = {name: each for name, each in s.verifiers.items() if not isinstance(each, JudgeScorer)}
        return self._stack.enter_context(
            VerdictPool(verifiers, workers=s.workers, timeout_s=s.timeout_s, memory_mb=s.memory_mb)
        )

    @cached_property
    def memory(self) -> judge.Memory:
        found: judge.Memory = {}
        for folder in ("superseded/score", "scores"):
            for path in sorted((self._ctx.run / folder).glob("**/part-*.parquet")):
                found |= judge.remembered(read_parts([path], "scores", ["status", "reward", "detail"]).to_pydict())
        return found


def _judged(ctx: Context, it: Spec, kind: str, source: Partition, workers: Workers) -> Outcome:
    """Judges what has no verdict in the spec's partition yet."""
    started = time.monotonic()
    done = _verdicts(it)
    now = pl.concat([f.select("id", "text_sha") for f in _judgeable(ctx, kind, source)])
    if done.join(now, on=["id", "text_sha"], how="anti").height:
        set_aside(it)  # verdicts on rows that are gone, or whose text was written anew
        done = done.clear()
    left = now.height - done.height
    if left == 0 and current(it) and not it.partition.loose(it.fingerprint):
        return nothing(it)
    if left:
        _score(ctx, it, kind, source, done, left, workers)
    return _finish(it, started)


def _asked_again(ctx: Context, it: Spec, kind: str, source: Partition, workers: Workers) -> Outcome | None:
    """Asks judges once more for the verdicts that had no reply; None if there are none. What they say now takes those verdicts'
    place, that of a server that dies on the way too."""
    judges = [name for name, each in ctx.recipe.score.verifiers.items() if isinstance(each, JudgeScorer)]
    no_reply = (pl.col("status") == "error") & pl.col("verifier").is_in(judges)
    no_reply &= pl.col("detail").str.starts_with(judge.NO_REPLY).fill_null(False)
    silent: dict[Path, pl.DataFrame] = {}  # parts that have such verdicts
    for path in parts_of(it) if judges else []:
        stored = _frame(read_parts([path], "scores"))
        if stored.filter(no_reply).height:
            silent[path] = stored
    if not silent:
        return None
    missing = pl.concat(silent.values()).filter(no_reply)
    done, left = _verdicts(it).join(missing, on="id", how="anti"), missing.height
    found = [ARROW["scores"].empty_table()]
    try:
        for rows in _new_rows(ctx, it, kind, source, done, left, workers):
            found.append(rows)
    finally:
        replies = _frame(pa.concat_tables(found)).filter(~no_reply)
        if replies.height:
            kept = pl.concat(silent.values()).join(replies, on="id", how="anti", maintain_order="left")
            _replace(it, list(silent), pl.concat([kept, replies]).to_arrow())
    if not replies.height:
        return replace(nothing(it), why=f"{left} verdicts have no reply of their judge; asked again, it gave none")
    return replace(nothing(it), action="added", why="", added=replies.height)


def _replace(it: Spec, paths: list[Path], rows: pa.Table) -> None:
    """Puts these rows in the place of those parts, of a complete partition, at one instant: when the manifest is written."""
    part, manifest = it.partition, it.partition.manifest()
    assert manifest is not None
    names = [path.name for path in paths]
    groups = [as_declared(rows, part.table)]
    write = partial(write_part, table=part.table, groups=groups, fingerprint=it.fingerprint, merged=names)
    new = describe_part(publish(part.folder / part.next_part(MERGED), write))
    parts = [each for each in manifest.parts if each.name not in names] + [new]
    files = [part.folder / each.name for each in parts]
    statuses, failed = _statuses(files)
    facts = {**manifest.facts, "statuses": statuses}
    digested = digest_parts(files, part.table)
    part.complete(manifest.model_copy(update={"parts": parts, "rows_digest": digested, "failed": failed, "facts": facts}))


def _refuse_unrecorded(ctx: Context, kind: str, source: Partition) -> None:
    """UserError if the recorded column that is to judge traces stands in none of them."""
    if (column := _recorded(ctx, kind, source)) is None:
        return
    seen: set[str] = set()
    for path in source.files():
        for sampling in read_parts([path], source.table, ["sampling"]).column("sampling").to_pylist():
            seen |= recorded.columns(sampling)
            if column in seen:
                return
    name = dict(source.keys)["teacher"]
    raise UserError(
        f"teachers.{name}.engine.verdict = '{column}': none of its traces has it. Recorded of them: "
        f"{', '.join(sorted(seen)) or 'nothing'}. Name one of those, or leave `verdict` out to have the traces verified"
    )


def _verdicts(it: Spec) -> pl.DataFrame:
    """What has been judged already: id and the hash of the text."""
    return _frame(read_parts(parts_of(it), "scores", ["id", "text_sha"]))


def _frame(rows: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(rows)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _judgeable(ctx: Context, kind: str, source: Partition) -> Iterator[pl.DataFrame]:
    """The source's rows with their prompts, one part at a time, so that memory does not grow with the run."""
    id_column = "trace_id" if kind == "trace" else "rollout_id"
    prompts = pl.from_arrow(read_parts(ctx.part("prompts").files(), "prompts").drop_columns(["split"]))
    assert isinstance(prompts, pl.DataFrame)
    for paths in [[path] for path in source.files()] or [[]]:  # an empty table has rows of no part
        columns = [id_column, "prompt_id", "text", "finish_reason", *(["sampling"] if kind == "trace" else [])]
        rows = pl.from_arrow(read_parts(paths, source.table, columns))
        assert isinstance(rows, pl.DataFrame)
        shas = pl.Series("text_sha", [text_sha(t) for t in rows["text"]], dtype=pl.String)
        yield rows.rename({id_column: "id"}).with_columns(shas).join(prompts, on="prompt_id", maintain_order="left")


def _score(ctx: Context, it: Spec, kind: str, source: Partition, done: pl.DataFrame, left: int, workers: Workers) -> None:
    """Judges what the anti-join leaves."""
    for rows in _new_rows(ctx, it, kind, source, done, left, workers):
        it.partition.write(rows, it.fingerprint)


def _new_rows(
    ctx: Context, it: Spec, kind: str, source: Partition, done: pl.DataFrame, left: int, workers: Workers
) -> Iterator[pa.Table]:
    """Verdicts on what is not in `done`, in tables that are each worth a part."""
    keys = {"kind": kind, "round": None, "step": None, "suite": None, "teacher": None, **dict(source.keys)}
    column = _recorded(ctx, kind, source)
    with progress(it.partition.label, done.height + left, done.height) as bar:
        for judgeable in _judgeable(ctx, kind, source):
            todo = judgeable.join(done, on=["id", "text_sha"], how="anti", maintain_order="left")
            for batch in todo.iter_slices(BATCH):
                items = [_item(row) for row in batch.iter_rows(named=True)]
                taken = _taken(batch, column)
                for found in _verdicts_on(ctx, items, taken, workers):
                    rows = [
                        {
                            **keys, "id": items[at].id, "prompt_id": batch["prompt_id"][at], "text_sha": batch["text_sha"][at],
                            "status": v.status, "reward": v.reward, "correct": v.correct, "extracted": v.extracted,
                            "verifier": items[at].verifier if taken[at] is None else f"recorded.{column}",
                            "verifier_version": scorer_version(ctx.recipe.score.verifiers[items[at].verifier])
                            if taken[at] is None else recorded.VERSION,
                            "elapsed_ms": v.elapsed_ms, "detail": v.detail,
                        }
                        for at, v in found
                    ]  # fmt: skip
                    yield pa.Table.from_pylist(rows, schema=ARROW["scores"])
                    bar.advance(len(rows))


def _verdicts_on(
    ctx: Context, items: list[Item], taken: list[Verdict | None], workers: Workers
) -> Iterator[list[tuple[int, Verdict]]]:
    """(position, verdict) of every item, in lists that are each worth a part: what is recorded and the pool's at once, a judge's
    as they come."""
    by_judge: dict[str, list[int]] = {}
    for_pool = []
    for at, item in enumerate(items):
        if taken[at] is not None:
            continue
        asked = isinstance(ctx.recipe.score.verifiers.get(item.verifier), JudgeScorer)
        (by_judge.setdefault(item.verifier, []) if asked else for_pool).append(at)
    pooled = workers.pool.score([items[at] for at in for_pool]) if for_pool else []
    found = dict(zip(for_pool, pooled, strict=True)) | {
        at: verdict for at, verdict in enumerate(taken) if verdict is not None
    }
    if found:
        yield sorted(found.items())
    for name, positions in by_judge.items():
        config = ctx.recipe.score.verifiers[name]
        assert isinstance(config, JudgeScorer)
        unread = [(at, verdict) for at in positions if (verdict := decided_unread(items[at])) is not None]
        left = sorted(set(positions) - {at for at, _ in unread})
        kept = unread
        try:
            for said in judge.judge(name, config, [items[at] for at in left], workers.memory):
                kept += [(left[at], verdict) for at, verdict in said]
                if len(kept) >= ASKED:
                    full, kept = kept, []
                    yield full
        except (WorkError, KeyboardInterrupt):
            if kept:
                yield kept
            raise
        if kept:
            yield kept


def _taken(batch: pl.DataFrame, column: str | None) -> list[Verdict | None]:
    """The recorded verdicts of traces that are whole; None where the verifier is to judge."""
    if column is None:
        return [None] * batch.height
    pairs = zip(batch["sampling"], batch["finish_reason"], strict=True)
    return [recorded.verdict(sampling, column) if reason == "stop" else None for sampling, reason in pairs]


def _item(row: dict[str, Any]) -> Item:
    return Item(
        id=row["id"],
        text=row["text"],
        answer=row["answer"],
        verifier=row["verifier"],
        finish_reason=row["finish_reason"],
        prompt=row["messages"][-1]["content"],
        metadata=json.loads(row["metadata"] or "{}"),
        source=row["source"],
    )


def _finish(it: Spec, started: float) -> Outcome:
    statuses, failed = _statuses(parts_of(it))
    return finish(it, facts={"statuses": statuses}, failed=failed, started=started)


def _statuses(paths: list[Path]) -> tuple[dict[str, int], int]:
    """How often each status stands in these parts, and how many verdicts are missing."""
    statuses = counts(read_parts(paths, "scores", ["status"]), "status")
    return statuses, statuses.get("timeout", 0) + statuses.get("error", 0)


def _too_many_failed(ctx: Context, failed: int, rows: int) -> bool:
    return rows > 0 and failed > ctx.recipe.score.max_failed * rows


def _refuse_a_broken_verifier(ctx: Context, outcome: Outcome) -> None:
    """WorkError when so many verdicts are missing that grading on the rest would mislead. The rows stay."""
    if _too_many_failed(ctx, outcome.failed, outcome.rows):
        raise WorkError(
            f"{outcome.partition}: {outcome.failed} of {outcome.rows} verdicts are timeout or error (score.max_failed = "
            f'{ctx.recipe.score.max_failed}). See `dypo sql {ctx.run} "select status, detail, count(*) from scores group by '
            'all"`; mend the verifier or raise score.timeout_s, and run `dypo score` again: it judges these rows anew'
        )
