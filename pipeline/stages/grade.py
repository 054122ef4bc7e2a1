"""grade: verdicts -> grades (no method in them), then the method's routing query -> gated shards.

Both are .sql files; a recipe can name its own. What they are run on, and how, is pipeline/grading.py; here is what grades and
shards depend on, and that finished files go to their partitions only when every check on them has passed.
"""

import shutil
import time
from pathlib import Path
from typing import Any

from pipeline.context import Context
from pipeline.grading import Grading, curriculum_text, query_text, scratch
from pipeline.rows_digest import digest_column
from pipeline.stage import Outcome, Spec, current, need, nothing, place_parts, restore
from pipeline.stages.generate import round_prompt_ids
from schemas.errors import UserError
from schemas.ids import digest

MADE_BY = {"prompts": "ingest", "rollouts": "generate", "traces": "generate teachers", "scores": "score"}


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
    return [
        ("prompts", {}),
        ("rollouts", {"round": round}),
        ("scores", {"kind": "rollout", "round": round}),
        *(("traces", {"teacher": t}) for t in teachers),
        *(("scores", {"kind": "trace", "teacher": t}) for t in teachers),
    ]


def route_spec(ctx: Context, round: int, route: str, grades: str) -> Spec:
    """Depends on the grades, the curriculum and the method's gates; never on alpha, gamma or another of the trainer's numbers."""
    method = ctx.recipe.train.method
    parents = {f"grades/round={round}": grades}
    config = {
        "method": method.type,
        "advantage": method.grpo.advantage,
        "eps": method.grpo.eps,
        "query": digest(query_text(method.query, f"route_{method.type}")),
    }
    if (weights := curriculum_text(ctx.recipe.grade.curriculum)) is not None:
        config["curriculum"] = digest(weights)
        if "earlier_grades" in weights:
            earlier = {n: ctx.part("grades", round=n).manifest() for n in range(round)}
            parents |= {f"grades/round={n}": m.identity for n, m in earlier.items() if m is not None}
    return Spec("route", ctx.part("shards", round=round, route=route), config, parents, 0)


def run(ctx: Context, round: int) -> list[Outcome]:
    """Grades one round and routes it."""
    _need_inputs(ctx, round)
    it = grade_spec(ctx, round)
    restore(it)
    if current(it) and all(current(r) for r in _route_specs(ctx, round, it)):
        return [nothing(it), *(nothing(r) for r in _route_specs(ctx, round, it))]
    for left in ctx.run.glob(".grading.*.tmp"):
        shutil.rmtree(left)
    with scratch(ctx.run) as folder:
        grading = Grading(ctx, round, folder)
        graded = nothing(it) if current(it) else _grade(it, grading)
        grading.use_grades(it.partition.files())
        routes = _route_specs(ctx, round, it)
        if all(current(r) for r in routes):
            return [graded, *(nothing(r) for r in routes)]
        return [graded, *_route(routes, grading)]


def grade_now(ctx: Context, round: int, folder: Path) -> tuple[list[Path], Path]:
    """Grades and lengths of the routed sequences (sql/what_if/lengths.sql) as the context's recipe makes them from what is
    stored: Parquet files in `folder`, nothing in the run."""
    _need_inputs(ctx, round)
    folder.mkdir()
    grading = Grading(ctx, round, folder)
    grades = grading.grades("")
    grading.route()
    return grades, grading.lengths()


def _need_inputs(ctx: Context, round: int) -> None:
    for table, keys in _inputs(ctx, round):
        with_round = f" --round {round}" if "round" in keys else ""
        need(ctx.run, table, keys, command=f"dypo {MADE_BY[table]} {ctx.run}{with_round}")


def _route_specs(ctx: Context, round: int, graded: Spec) -> list[Spec]:
    grades = graded.partition.manifest()
    assert grades is not None
    specs = [route_spec(ctx, round, route, grades.identity) for route in ("rl", "sft")]
    for it in specs:
        restore(it)
    return specs


def _grade(it: Spec, grading: Grading) -> Outcome:
    started = time.monotonic()
    made = grading.grades(it.fingerprint)
    return place_parts(
        it, made, facts={"grades": grading.count("grade"), "reasons": grading.count("reason")}, started=started
    )


def _route(specs: list[Spec], grading: Grading) -> list[Outcome]:
    started = time.monotonic()
    grading.route()
    made = [(it, *grading.sequences(str(dict(it.partition.keys)["route"]), it.fingerprint)) for it in specs]
    return [place_parts(it, parts, facts=facts, started=started) for it, parts, facts in made]
