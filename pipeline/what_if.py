"""`dypo grade --what-if`: how a round would be graded and routed under other settings. Reads stored rows, writes nothing.

One idea: both gradings are computed now by the stage's own functions, so a what-if and the grading that follows it cannot
disagree; what differs is then three queries (pipeline/sql/what_if). Left out: settings that need new text (a larger k than
was sampled shows as `incomplete_group`).
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.context import Context, load
from pipeline.stages.grade import grade_now
from pipeline.store import ask, sql
from schemas.errors import UserError


@dataclass(frozen=True)
class WhatIf:
    """The answer. moves, routes, changed: the rows of the queries of those names; settings as they were given."""

    round: int
    settings: list[str]
    prompts: int
    moves: list[dict[str, Any]]
    routes: list[dict[str, Any]]
    changed: list[dict[str, Any]]


def with_settings(ctx: Context, settings: list[str]) -> Context:
    """The run's context with KEY=VALUE settings: a recipe key, or `k` for rollouts.k, or `teachers` as names with commas.

    UserError for a key that is none, or a teacher that the recipe does not have.
    """
    plain = [f"rollouts.{item}" if item.startswith("k=") else item for item in settings if not item.startswith("teachers=")]
    then = load(ctx.run, plain)
    for item in settings:
        if item.startswith("teachers="):
            names = [name.strip() for name in item.removeprefix("teachers=").split(",") if name.strip()]
            known = {t.name: t for t in then.recipe.teachers}
            if unknown := sorted(set(names) - set(known)):
                raise UserError(f"--what-if {item}: no teacher {', '.join(unknown)}; the recipe has {', '.join(known)}")
            kept = [known[name] for name in known if name in names]
            then = Context(then.run, then.recipe.model_copy(update={"teachers": kept}))
    return then


def what_if(ctx: Context, round: int, settings: list[str]) -> WhatIf:
    """Grades the round as the recipe says and as it would with `settings`, and compares."""
    import duckdb

    con = duckdb.connect()
    for name, each in (("now", ctx), ("then", with_settings(ctx, settings))):
        grades, shards = grade_now(each, round)
        con.register(f"grades_{name}", grades)
        con.register(f"shards_{name}", shards)
    found: dict[str, pa.Table] = {name: ask(con, sql(f"what_if/{name}")) for name in ("moves", "routes", "changed")}
    prompts = sum(found["moves"]["prompts"].to_pylist())
    return WhatIf(round, settings, prompts, **{name: rows.to_pylist() for name, rows in found.items()})
