"""Which draws of a round are not made, and what stands for them: rollouts.sequential and rollouts.reuse, as rows of table `skips`.

One idea: it is all a function of stored rows. Reuse is decided in SQL from the grades of earlier rounds (sql/reuse.sql). A group
that is drawn in blocks is looked at after each `dypo score`: its verdicts so far give the chance that the whole group would be
Easy, or Hard (pipeline/sequential.py). So `generate` has nothing to remember: it computes the skips anew, writes them, and
draws what is left. Grading reads them back: `source_round` for each prompt, and the grade of a group that stopped.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.context import Context
from pipeline.sequential import chance, fit_prior
from pipeline.stage import Outcome, Spec, counts, current, make_table, nothing
from pipeline.store import ask, open_views, read_parts, sql
from schemas.recipe import Sequential
from schemas.tables import ARROW

Row = dict[str, Any]


def wanted(ctx: Context, round: int, prompts: list[str]) -> tuple[dict[str, int], list[Outcome]]:
    """Samples to have by prompt (none of a prompt that reuses), and what writing the round's skips did, if the recipe allows any."""
    r = ctx.recipe.rollouts
    if r.sequential is None and r.reuse is None:
        return dict.fromkeys(prompts, r.k), []
    reused = _reused(ctx, round, prompts)
    stored = {row["prompt_id"] for row in reused}
    draw = [p for p in prompts if p not in stored]
    samples, stopped = _drawn(ctx, round, draw, r.sequential) if r.sequential else (dict.fromkeys(draw, r.k), [])
    rows = sorted([*reused, *stopped], key=lambda row: row["prompt_id"])
    it = spec(ctx, round)
    if current(it):
        return samples, [nothing(it)]
    table = pa.Table.from_pylist(rows, schema=ARROW["skips"])
    facts = {
        "why": counts(table, "why"),
        "grades": counts(table, "grade"),
        "skipped": sum(row["skipped"] for row in rows),
        "source_rounds": sorted({row["source_round"] for row in rows}),
    }
    return samples, [make_table(it, table, facts=facts)]


def spec(ctx: Context, round: int) -> Spec:
    """Depends on both settings and on every verdict and grade that they look at."""
    r = ctx.recipe.rollouts
    config = {
        "k": r.k,
        "prompts_per_round": r.prompts_per_round,
        "sequential": r.sequential.model_dump(mode="json") if r.sequential else None,
        "reuse": r.reuse.model_dump(mode="json") if r.reuse else None,
        "hard_max_successes": ctx.recipe.grade.hard_max_successes,
        "easy_max_failures": ctx.recipe.grade.easy_max_failures,
    }
    looked_at = [ctx.part("prompts")]
    looked_at += [ctx.part("grades", round=n) for n in range(round)] if r.reuse else []
    looked_at += [ctx.part("scores", kind="rollout", round=n) for n in range(round + 1)] if r.sequential else []
    parents = {part.label: manifest.identity for part in looked_at if (manifest := part.manifest())}
    return Spec("skips", ctx.part("skips", round=round), config, parents, ctx.recipe.seed)


def rows(ctx: Context, round: int) -> pa.Table:
    """The round's skips, none where the recipe allows none."""
    r = ctx.recipe.rollouts
    part = ctx.part("skips", round=round)
    if (r.sequential is None and r.reuse is None) or part.manifest() is None:
        return ARROW["skips"].empty_table()
    return read_parts(part.files(), "skips")


def _reused(ctx: Context, round: int, prompts: list[str]) -> list[Row]:
    reuse = ctx.recipe.rollouts.reuse
    if reuse is None or round == 0:
        return []
    con = open_views(ctx.run)
    con.register("round_prompts", pa.table({"prompt_id": pa.array(prompts, pa.string())}))
    k = ctx.recipe.rollouts.k
    _, policy = ctx.policy_of(round)
    limits = {"max_age": reuse.max_age, "token_budget": reuse.token_budget}
    return ask(con, sql("reuse"), round=round, k=k, policy=policy, **limits).to_pylist()


def _standing(ctx: Context, round: int, prompts: list[str], sequential: Sequential) -> dict[str, Row]:
    """Draws and successes by prompt, of those that have a verdict in this round."""
    con = open_views(ctx.run)
    con.register("asked", pa.table({"prompt_id": pa.array(prompts, pa.string())}))
    k = ctx.recipe.rollouts.k
    found = ask(con, sql("sequential"), round=round, k=k, block=sequential.block, memory=sequential.memory).to_pylist()
    return {row["prompt_id"]: row for row in found}


def _drawn(ctx: Context, round: int, prompts: list[str], sequential: Sequential) -> tuple[dict[str, int], list[Row]]:
    """Samples to have by prompt, and the skips of groups that stop."""
    k, grade = ctx.recipe.rollouts.k, ctx.recipe.grade
    standing = _standing(ctx, round, prompts, sequential)
    stops = stopping(standing, k, sequential, grade.hard_max_successes, grade.easy_max_failures)
    samples, stopped = {}, []
    for prompt in prompts:
        n = standing[prompt]["draws"] if prompt in standing else 0
        samples[prompt] = n if prompt in stops else min(k, n + sequential.block)
        if prompt in stops:
            sure, p = stops[prompt]
            stopped.append(
                {
                    "prompt_id": prompt, "round": round, "source_round": round, "draws": n, "skipped": k - n,
                    "grade": sure, "chance": p, "why": "sure",
                }
            )  # fmt: skip
    return samples, stopped


def stopping(
    standing: Mapping[str, Row], k: int, sequential: Sequential, hard_max_successes: int, easy_max_failures: int
) -> dict[str, tuple[str, float]]:
    """The groups that stop, with the grade they would have had and its chance. standing: rows of sequential.sql by prompt."""
    a, b = fit_prior(Counter((row["first_successes"], row["first_draws"]) for row in standing.values()))
    stops: dict[str, tuple[str, float]] = {}
    known: dict[tuple[float, ...], tuple[float, float]] = {}
    for prompt, row in standing.items():
        n, s, past = row["draws"], row["successes"], (row["past_successes"], row["past_failures"])
        if (n, s, *past) not in known:
            law = (a + past[0] + s, b + past[1] + n - s)
            known[n, s, *past] = (
                chance(*law, k - n, k - easy_max_failures - s, k - n),
                chance(*law, k - n, 0, hard_max_successes - s),
            )
        easy, hard = known[n, s, *past]
        if n < k and max(easy, hard) >= sequential.confidence:
            stops[prompt] = ("hard", hard) if hard >= easy else ("easy", easy)
    return stops
