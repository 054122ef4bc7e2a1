"""grade: verdicts -> grades (no method in them), then the method's routing query -> gated shards.

Both are .sql files; a recipe can name its own. Between them, where the method's reward is a discriminator's, its ratings. What they are
run on, and how, is pipeline/grading.py; here is what grades and shards depend on, and that finished files go to their partitions
only when every check on them has passed.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import skips
from pipeline.context import Context
from pipeline.grading import Grading, adjust_texts, curriculum_text, query_text, routing_parameters, scratch, tables_read
from pipeline.rows_digest import digest_column
from pipeline.stage import Outcome, Spec, changes, current, need, nothing, place_parts, restore
from pipeline.stages.generate import round_prompt_ids
from schemas.errors import UserError
from schemas.ids import digest

MADE_BY = {
    "prompts": "ingest",
    "rollouts": "generate",
    "skips": "generate",
    "traces": "generate teachers",
    "scores": "score",
}


def grade_spec(ctx: Context, round: int) -> Spec:
    """Depends on the thresholds, the query's text, and every row that it reads."""
    g = ctx.recipe.grade
    config = {
        **g.model_dump(mode="json", exclude={"query", "memory_mb", "curriculum"}),
        "k": ctx.recipe.rollouts.k,
        "query": digest(query_text(g.query, "grade")),
        "tokenizer_of": ctx.base_policy,
        "samples": {t.name: t.samples for t in ctx.recipe.teachers},
        "prompts": digest_column(round_prompt_ids(ctx, round)),
    }
    parents = {}
    for table, keys in _inputs(ctx, round):
        part = ctx.part(table, **keys)
        manifest = part.manifest()
        if manifest is None:
            raise UserError(f"{part.folder}: not there or not finished. Run `dypo {MADE_BY[table]} {ctx.run}` first")
        parents[part.label] = manifest.identity
    return Spec("grade", ctx.part("grades", round=round), config, parents, 0)


def _inputs(ctx: Context, round: int) -> list[tuple[str, dict[str, Any]]]:
    teachers = [t.name for t in ctx.recipe.teachers]
    skipped = skips.rows(ctx, round)
    rounds = sorted({round, *skipped.column("source_round").to_pylist()})
    return [
        ("prompts", {}),
        *((("skips", {"round": round}),) if skipped.num_rows else ()),
        *(("rollouts", {"round": n}) for n in rounds),
        *(("scores", {"kind": "rollout", "round": n}) for n in rounds),
        *(("traces", {"teacher": t}) for t in teachers),
        *(("scores", {"kind": "trace", "teacher": t}) for t in teachers),
    ]


def route_spec(ctx: Context, round: int, route: str, grades: str) -> Spec:
    """Depends on the grades, the curriculum and the method's gates; never on alpha, gamma or another of the trainer's numbers."""
    method = ctx.recipe.train.method
    parents = {f"grades/round={round}": grades}
    config = {
        **routing_parameters(method, round),
        "query": digest(query_text(method.query, "route")),
    }
    if config["rated"] and (rated := ctx.part("ratings", round=round).manifest()) is not None:
        parents[f"ratings/round={round}"] = rated.identity
    if method.adjust:
        config["adjust"] = [digest(text) for _, text, _ in adjust_texts(method)]
        parents |= _also_read(ctx, round)
    if config["graded"] and (weights := curriculum_text(ctx.recipe.grade.curriculum)) is not None:
        config["curriculum"] = digest(weights)
        if "earlier_grades" in weights:
            earlier = {n: ctx.part("grades", round=n).manifest() for n in range(round)}
            parents |= {f"grades/round={n}": m.identity for n, m in earlier.items() if m is not None}
    return Spec("route", ctx.part("shards", round=round, route=route), config, parents, 0)


def _also_read(ctx: Context, round: int) -> dict[str, str]:
    """What the adjustments read of other rounds."""
    read = set().union(*(tables_read(text) for _, text, _ in adjust_texts(ctx.recipe.train.method)))
    parts = [ctx.part("grades", round=n) for n in range(round) if "earlier_grades" in read]
    parts += [ctx.part(table, **keys) for table, keys in _earlier(ctx, round)]
    return {part.label: m.identity for part in parts if (m := part.manifest()) is not None}


def _earlier(ctx: Context, round: int) -> list[tuple[str, dict[str, Any]]]:
    """Rollouts and verdicts of earlier rounds, if an adjustment reads rollouts."""
    texts = adjust_texts(ctx.recipe.train.method)
    if not ctx.recipe.train.method.routing(round).rl or not any(
        tables_read(text) & {"rollouts", "scores"} for _, text, _ in texts
    ):
        return []
    there = [n for n in range(round) if ctx.part("rollouts", round=n).manifest() is not None]
    return [part for n in there for part in (("rollouts", {"round": n}), ("scores", {"kind": "rollout", "round": n}))]


def rating_specs(ctx: Context, round: int, grades: str) -> list[Spec]:
    """One for the round's ratings, of what the grades are made of; none if the method's reward is the verdict."""
    discriminator = ctx.recipe.train.method.routing(round).discriminator
    if discriminator is None:
        return []
    config = discriminator.model_dump(mode="json")
    return [Spec("ratings", ctx.part("ratings", round=round), config, {f"grades/round={round}": grades}, ctx.recipe.seed)]


def run(ctx: Context, round: int) -> list[Outcome]:
    """Grades one round and routes it."""
    _need_inputs(ctx, round)
    _refuse_unreliable_verdicts(ctx, round)
    _refuse_old_skips(ctx, round)
    it = grade_spec(ctx, round)
    restore(it)
    if current(it) and all(current(r) for r in _rest(ctx, round, it)):
        return [nothing(r) for r in (it, *_rest(ctx, round, it))]
    for left in ctx.run.glob(".grading.*.tmp"):
        shutil.rmtree(left)
    with scratch(ctx.run) as folder:
        grading = Grading(ctx, round, folder)
        graded = nothing(it) if current(it) else _grade(it, grading)
        grading.use_grades(it.partition.files())
        rated = [_rate(r, grading) for r in _rating_specs(ctx, round, it)]
        routes = _route_specs(ctx, round, it)
        if all(current(r) for r in routes):
            return [graded, *rated, *(nothing(r) for r in routes)]
        return [graded, *rated, *_route(routes, grading)]


def grade_now(ctx: Context, round: int, folder: Path, scores: Sequence[Path] = ()) -> tuple[list[Path], Path]:
    """Grades and lengths of the routed sequences (sql/what_if/lengths.sql) as the context's recipe makes them from what is
    stored: Parquet files in `folder`, nothing in the run. `scores`: as Grading has them."""
    _need_inputs(ctx, round)
    folder.mkdir()
    grading = Grading(ctx, round, folder, scores)
    grades = grading.grades("")
    if ctx.recipe.train.method.routing(round).discriminator is not None:
        grading.rate("")
    grading.route()
    return grades, grading.lengths()


def _need_inputs(ctx: Context, round: int) -> None:
    for table, keys in [*_inputs(ctx, round), *_earlier(ctx, round)]:
        with_round = f" --round {round}" if "round" in keys else ""
        need(ctx.run, table, keys, command=f"dypo {MADE_BY[table]} {ctx.run}{with_round}")


def _refuse_unreliable_verdicts(ctx: Context, round: int) -> None:
    """UserError where so many verdicts failed, or so many rollouts were cut, that grades would say more of that than of the policy."""
    limits = ctx.recipe.score
    for part in (ctx.part(table, **keys) for table, keys in _inputs(ctx, round) if table == "scores"):
        manifest = part.manifest()
        assert manifest is not None
        statuses, rows = manifest.facts.get("statuses", {}), manifest.rows
        failed, cut = statuses.get("timeout", 0) + statuses.get("error", 0), statuses.get("truncated", 0)
        if failed > limits.max_failed * rows:
            raise UserError(
                f"{part.label}: {failed} of {rows} verdicts are timeout or error, more than score.max_failed = {limits.max_failed}; grades "
                f'would rest on the others. See `dypo sql {ctx.run} "select status, detail, count(*) from scores group by all"`; mend the '
                "verifier or raise score.timeout_s and run `dypo score` again, or raise score.max_failed"
            )
        if part.label.startswith("scores/kind=rollout") and cut > limits.max_truncated * rows:
            raise UserError(
                f"{part.label}: {cut} of {rows} rollouts were cut at rollouts.max_tokens = {ctx.recipe.rollouts.max_tokens}, more than "
                f"score.max_truncated = {limits.max_truncated}; a cut rollout counts as wrong, so prompts would be graded hard for their "
                "length. Raise rollouts.max_tokens and generate again, sample a policy that ends its answers, or, if they are to count as "
                "wrong, raise score.max_truncated"
            )


def _refuse_old_skips(ctx: Context, round: int) -> None:
    """UserError where what need not be drawn was decided from other verdicts, grades or settings than there are now."""
    r = ctx.recipe.rollouts
    if not ctx.recipe.train.method.routing(round).rl:
        return
    if (r.sequential or r.reuse) and not current(it := skips.spec(ctx, round)):
        found = it.partition.manifest()
        raise UserError(
            f"{it.partition.folder}: {changes(it, found) if found else 'not there'}, so it is open which groups are to be drawn on. "
            f"Run `dypo generate rollouts {ctx.run} --round {round}` first, and `dypo score` if it draws"
        )


def _rest(ctx: Context, round: int, graded: Spec) -> list[Spec]:
    """What is made once the grades are there."""
    return [*_rating_specs(ctx, round, graded), *_route_specs(ctx, round, graded)]


def _rating_specs(ctx: Context, round: int, graded: Spec) -> list[Spec]:
    return _restored(rating_specs(ctx, round, _identity(graded)))


def _route_specs(ctx: Context, round: int, graded: Spec) -> list[Spec]:
    return _restored([route_spec(ctx, round, route, _identity(graded)) for route in ("rl", "sft")])


def _restored(specs: list[Spec]) -> list[Spec]:
    for it in specs:
        restore(it)
    return specs


def _identity(graded: Spec) -> str:
    grades = graded.partition.manifest()
    assert grades is not None
    return grades.identity


def _grade(it: Spec, grading: Grading) -> Outcome:
    started = time.monotonic()
    made = grading.grades(it.fingerprint)
    return place_parts(
        it, made, facts={"grades": grading.count("grade"), "reasons": grading.count("reason")}, started=started
    )


def _rate(it: Spec, grading: Grading) -> Outcome:
    if current(it):
        grading.use_ratings(it.partition.files())
        return nothing(it)
    started = time.monotonic()
    made, facts = grading.rate(it.fingerprint)
    out = place_parts(it, made, facts=facts, started=started)
    grading.use_ratings(it.partition.files())
    return out


def _route(specs: list[Spec], grading: Grading) -> list[Outcome]:
    started = time.monotonic()
    grading.route()
    made = [(it, *grading.sequences(str(dict(it.partition.keys)["route"]), it.fingerprint)) for it in specs]
    return [place_parts(it, parts, facts=facts, started=started) for it, parts, facts in made]
