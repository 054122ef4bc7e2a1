"""grade: verdicts -> grades (no method in them), then the method's routing query -> gated shards.

Both are .sql files; a recipe can name its own. Python does the one thing SQL cannot: it tokenises verified traces with
the policy's tokenizer, and refuses a tokenizer that disagrees with the rollouts' prompt tokens.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.context import Context
from pipeline.policy import Renderer
from pipeline.stage import Outcome, Spec, counts, current, make_table, need, nothing, restore
from pipeline.stages.generate import round_prompts
from pipeline.store import ask, open_views, sql
from schemas.errors import UserError
from schemas.ids import digest
from schemas.tables import ARROW, IDS, S

if TYPE_CHECKING:
    import duckdb

FITTING = pa.schema(
    [
        ("trace_id", S), ("prompt_id", S), ("teacher", S), ("sample", pa.int32()), ("prompt_tokens", IDS), ("tokens", IDS),
        ("n_tokens", pa.int64()), ("finish_reason", S), ("reward", pa.float64()),
    ]
)  # fmt: skip
MADE_BY = {"prompts": "ingest", "rollouts": "generate", "traces": "generate teachers", "scores": "score"}


def query_text(own: Path | None, built_in: str) -> str:
    """The recipe's own query, or ours. UserError if the file is not there."""
    if own is None:
        return sql(built_in)
    if not own.exists():
        raise UserError(f"{own}: no such query file (named by the recipe)")
    return own.read_text()


def grade_spec(ctx: Context, round: int) -> Spec:
    """Depends on the thresholds, the query's text, and every row that it reads."""
    g = ctx.recipe.grade
    config = {
        **g.model_dump(mode="json", exclude={"query"}),
        "k": ctx.recipe.rollouts.k,
        "query": digest(query_text(g.query, "grade")),
        "tokenizer_of": ctx.base_policy,
        "samples": {t.name: t.samples for t in ctx.recipe.teachers},
        "prompts": digest([r["prompt_id"] for r in round_prompts(ctx, round)]),
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
    """Depends on the grades and the method's gates; never on alpha, gamma or another of the trainer's numbers."""
    method = ctx.recipe.train.method
    config = {
        "method": method.type,
        "advantage": method.grpo.advantage,
        "eps": method.grpo.eps,
        "query": digest(query_text(method.query, f"route_{method.type}")),
    }
    return Spec("route", ctx.part("shards", round=round, route=route), config, {f"grades/round={round}": grades}, 0)


def run(ctx: Context, round: int) -> list[Outcome]:
    """Grades one round and routes it."""
    _need_inputs(ctx, round)
    _refuse_unreliable_verdicts(ctx, round)
    it = grade_spec(ctx, round)
    restore(it)
    if current(it) and all(current(r) for r in _route_specs(ctx, round, it)):
        return [nothing(it), *(nothing(r) for r in _route_specs(ctx, round, it))]
    traces = _fitting_traces(ctx, round)
    graded = nothing(it) if current(it) else _grade(ctx, round, it, _connection(ctx, round, traces))
    routes = _route_specs(ctx, round, it)
    if all(current(r) for r in routes):
        return [graded, *(nothing(r) for r in routes)]
    return [graded, *_route(ctx, round, routes, _connection(ctx, round, traces))]


def grade_now(ctx: Context, round: int, scores: pa.Table | None = None) -> tuple[pa.Table, pa.Table]:
    """The rows of grades and of shards as the context's recipe makes them from what is stored, written nowhere.

    `scores`: verdicts that count in place of the stored ones on the same rows.
    """
    _need_inputs(ctx, round)
    con = _connection(ctx, round, _fitting_traces(ctx, round, scores), scores)
    grades = _grade_rows(ctx, round, con)
    con.register("grades", grades)  # stands before the view of what is stored
    return grades, _shard_rows(ctx, round, con)


def _need_inputs(ctx: Context, round: int) -> None:
    for table, keys in _inputs(ctx, round):
        with_round = f" --round {round}" if "round" in keys else ""
        need(ctx.run, table, keys, command=f"dypo {MADE_BY[table]} {ctx.run}{with_round}")


def _refuse_unreliable_verdicts(ctx: Context, round: int) -> None:
    """UserError where so many verdicts failed, or so many rollouts were cut, that grades would say more of that than of the policy."""
    limits = ctx.recipe.score
    for part in (ctx.part(table, **keys) for table, keys in _inputs(ctx, round) if table == "scores"):
        manifest = part.manifest()
        assert manifest is not None
        statuses, rows = manifest.facts["statuses"], manifest.rows
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


def _route_specs(ctx: Context, round: int, graded: Spec) -> list[Spec]:
    grades = graded.partition.manifest()
    assert grades is not None
    specs = [route_spec(ctx, round, route, grades.identity) for route in ("rl", "sft")]
    for it in specs:
        restore(it)
    return specs


def _views(ctx: Context, scores: pa.Table | None) -> "duckdb.DuckDBPyConnection":
    con = open_views(ctx.run)
    if scores is not None:
        con.register("other_scores", scores)
        con.execute(
            "create temp view scores as select * from memory.main.scores anti join other_scores using (kind, id) "
            "union all by name select * from other_scores"
        )
    return con


def _connection(ctx: Context, round: int, traces: pa.Table, scores: pa.Table | None = None) -> "duckdb.DuckDBPyConnection":
    """Views of the run as it is now, the round's prompts, and the tokenised traces as the table `fitting_traces`."""
    con = _views(ctx, scores)
    con.execute("set threads = 1")  # byte-equal aggregates; grading is far from being the slow part
    con.register("fitting_traces_arrow", traces)
    con.execute("create table fitting_traces as select * from fitting_traces_arrow")
    con.register("round_prompts", pa.table({"prompt_id": pa.array([r["prompt_id"] for r in round_prompts(ctx, round)], S)}))
    return con


def _fitting_traces(ctx: Context, round: int, scores: pa.Table | None = None) -> pa.Table:
    """Verified traces of the round's prompts as token ids: prompt as the rollouts have it, text, end-of-sequence.

    Traces of a teacher that the recipe no longer names, or beyond its `samples`, stay on disk and out of the result.
    """
    con = _views(ctx, scores)
    renderer = Renderer(ctx.recipe.policy.model)
    _refuse_another_tokenizer(ctx, con, renderer, round)
    samples = {t.name: t.samples for t in ctx.recipe.teachers}
    found = ask(con, sql("verified_traces"), round=round).to_pylist()
    found = [r for r in found if r["sample"] < samples.get(r["teacher"], 0)]
    rows = []
    for r in found:
        try:
            tokens = renderer.trace_tokens(r["prompt_tokens"], r["text"])
        except UserError as e:
            raise UserError(f"trace {r['trace_id']} of teacher {r['teacher']}: {e}") from None
        rows.append(
            {
                **{
                    k: r[k]
                    for k in ("trace_id", "prompt_id", "teacher", "sample", "prompt_tokens", "finish_reason", "reward")
                },
                "tokens": tokens,
                "n_tokens": len(r["prompt_tokens"]) + len(tokens),
            }
        )
    return pa.Table.from_pylist(rows, schema=FITTING)


def _refuse_another_tokenizer(ctx: Context, con: "duckdb.DuckDBPyConnection", renderer: Renderer, round: int) -> None:
    """UserError if the policy's tokenizer or template does not give the prompt tokens that the rollouts have."""
    query = (
        "select r.prompt_id, p.messages, min(r.prompt_tokens) as tokens from rollouts r join prompts p using (prompt_id) "
        "where r.round = $round group by all order by all"
    )
    for row in ask(con, query, round=round).to_pylist():
        now = renderer.prompt_tokens(row["messages"])
        if now != row["tokens"]:
            raise UserError(
                f"{ctx.part('rollouts', round=round).folder}: prompt {row['prompt_id']} was sampled as tokens "
                f"{row['tokens'][:8]}..., but the tokenizer of {ctx.recipe.policy.model} renders {now[:8]}...: another "
                "tokenizer or chat template. Use the policy that made the rollouts, or generate them again"
            )


def _grade(ctx: Context, round: int, it: Spec, con: "duckdb.DuckDBPyConnection") -> Outcome:
    started = time.monotonic()
    rows = _grade_rows(ctx, round, con)
    return make_table(it, rows, facts={"grades": counts(rows, "grade"), "reasons": counts(rows, "reason")}, started=started)


def _grade_rows(ctx: Context, round: int, con: "duckdb.DuckDBPyConnection") -> pa.Table:
    unscored = ask(con, sql("checks/unscored"), round=round)
    if unscored.num_rows:
        raise UserError(
            f"round {round}: {unscored.num_rows} rollouts or traces have no verdict (first: {unscored.column('kind')[0]} "
            f"{unscored.column('id')[0]}). Run `dypo score {ctx.run} --round {round}` first"
        )
    g = ctx.recipe.grade
    rows = _select(
        con, query_text(g.query, "grade"), "grades", str(g.query or "grade.sql"),
        round=round, k=ctx.recipe.rollouts.k, hard_max_successes=g.hard_max_successes,
        easy_max_failures=g.easy_max_failures, max_tokens=g.max_tokens, unjudged_to_routes=g.unjudged_to_routes,
    )  # fmt: skip
    _refuse_offenders(con, rows, "grades", str(g.query or "grade.sql"), round=round)
    return rows


def _shard_rows(ctx: Context, round: int, con: "duckdb.DuckDBPyConnection") -> pa.Table:
    method, g = ctx.recipe.train.method, ctx.recipe.grade
    rows = _select(
        con, query_text(method.query, f"route_{method.type}"), "shards", str(method.query or f"route_{method.type}.sql"),
        round=round, k=ctx.recipe.rollouts.k, max_tokens=g.max_tokens, advantage_scale=method.grpo.advantage,
        eps=method.grpo.eps,
    )  # fmt: skip
    _refuse_offenders(con, rows, "shards", str(method.query or f"route_{method.type}.sql"))
    return rows


def _route(ctx: Context, round: int, specs: list[Spec], con: "duckdb.DuckDBPyConnection") -> list[Outcome]:
    started = time.monotonic()
    rows, outcomes = _shard_rows(ctx, round, con), []
    for it in specs:
        route = dict(it.partition.keys)["route"]
        mine = rows.filter(pc.field("route") == route)
        prompts = len(set(mine.column("prompt_id").to_pylist()))
        tokens = len(mine.column("tokens").combine_chunks().flatten())
        outcomes.append(make_table(it, mine, facts={"prompts": prompts, "response_tokens": tokens}, started=started))
    return outcomes


def _refuse_offenders(con: "duckdb.DuckDBPyConnection", rows: pa.Table, table: str, name: str, **parameters: Any) -> None:
    """UserError if a query's result breaks a rule of its table: checks/TABLE.sql returns the offending rows."""
    con.register(f"new_{table}", rows)
    bad = ask(con, sql(f"checks/{table}"), **parameters).to_pylist()
    if bad:
        where = ", ".join(f"{k} {v}" for k, v in bad[0].items() if k != "why")
        raise UserError(
            f"{name}: the query returned {len(bad)} rows that break a rule; the first ({where}): {bad[0]['why']}"
        )


def _select(con: "duckdb.DuckDBPyConnection", text: str, table: str, name: str, **parameters: Any) -> pa.Table:
    """Runs a grading or routing query with those of the parameters it names; the result must have the table's columns."""
    import duckdb

    try:
        named = con.extract_statements(text)[0].named_parameters
        used = {k: v for k, v in parameters.items() if k in named}
        got = ask(con, text, **used)
    except duckdb.Error as e:
        raise UserError(
            f"{name}: DuckDB refused the query: {e}. It may use the parameters {', '.join(parameters)}"
        ) from None
    want = ARROW[table]
    missing = [n for n in want.names if n not in got.column_names]
    if missing:
        raise UserError(f"{name}: the result lacks {', '.join(missing)}; the columns of {table} are {', '.join(want.names)}")
    try:
        return got.select(want.names).cast(want)
    except (pa.ArrowInvalid, ValueError, pa.ArrowNotImplementedError) as e:
        raise UserError(f"{name}: the result does not fit table {table}: {e}") from None
