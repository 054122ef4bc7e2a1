"""`dypo grade --what-if`: how a round would be graded and routed under other settings. Reads stored rows, writes nothing.

One idea: both gradings are computed now by the stage's own functions, so a what-if and the grading that follows it cannot
disagree; what differs is then three queries (pipeline/sql/what_if). Left out: settings that need new text (a larger k than
was sampled shows as `incomplete_group`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.context import Context, load
from pipeline.grading import scratch
from pipeline.interrupts import database
from pipeline.stages.grade import grade_now
from pipeline.store import ask, sql, view_parts
from schemas.errors import UserError
from schemas.recipe import Recipe
from schemas.tables import ARROW


@dataclass(frozen=True)
class WhatIf:
    """The answer. moves, routes, changed: the rows of the queries of those names; settings as they were given."""

    round: int
    settings: list[str]
    prompts: int
    moves: list[dict[str, Any]]
    routes: list[dict[str, Any]]
    changed: list[dict[str, Any]]


def _then(target: Path, overrides: list[str], settings: list[str], now: Context) -> Context:
    """`now`, which is `load(target, overrides)`, with KEY=VALUE settings: a recipe key, `k` for rollouts.k, `teachers` as names with commas.

    UserError for a key that is none or that no grading reads, or a teacher that the recipe does not have.
    """
    for item in settings:
        if "=" not in item:
            raise UserError(f"--what-if {item}: expected KEY=VALUE, for example --what-if grade.easy_max_failures=1")
    plain = [f"rollouts.{item}" if item.startswith("k=") else item for item in settings if not item.startswith("teachers=")]
    then = load(target, [*overrides, *plain])
    if _ungraded(then.recipe) != _ungraded(now.recipe):
        raise UserError(
            f"--what-if {', '.join(settings)}: a grading reads grade.*, k, teachers, and of train.method "
            "query, adjust, supervise, grpo.advantage and eps, nothing else; what another key would do, `dypo plan --set KEY=VALUE` says"
        )
    known = {t.name: t for t in then.recipe.teachers}
    for item in settings:
        if item.startswith("teachers="):
            names = [name.strip() for name in item.removeprefix("teachers=").split(",") if name.strip()]
            if unknown := sorted(set(names) - set(known)):
                raise UserError(f"--what-if {item}: no teacher {', '.join(unknown)}; the recipe has {', '.join(known)}")
            kept = [known[name] for name in known if name in names]
            then = Context(then.run, then.recipe.model_copy(update={"teachers": kept}))
    return then


def _ungraded(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe no grading or routing reads."""
    return recipe.model_dump(
        mode="json",
        exclude={
            "grade": True,
            "teachers": True,
            "rollouts": {"k"},
            "train": {"method": {"query": True, "adjust": True, "supervise": True, "grpo": {"advantage", "eps"}}},
        },
    )


def what_if(target: Path, overrides: list[str], round: int | None, settings: list[str]) -> WhatIf:
    """Grades a round (None: the newest) of a recipe or run as it says, and as it would with `settings`, and compares."""
    now = load(target, overrides)
    then = _then(target, overrides, settings, now)
    round = now.newest_round() if round is None else round
    return WhatIf(round, settings, **compared(round, (now, []), (then, [])))


def compared(round: int, now: tuple[Context, list[Path]], then: tuple[Context, list[Path]]) -> dict[str, Any]:
    """prompts, moves, routes and changed of a round graded twice: by a context each, with the verdicts of those parts in place of
    the stored ones."""
    with scratch(None) as folder:
        con = database()
        for name, (ctx, scores) in (("now", now), ("then", then)):
            grades, lengths = grade_now(ctx, round, folder / name, scores)
            view_parts(con, f"grades_{name}", grades, ARROW["grades"])
            view_parts(con, f"shards_{name}", [lengths], pa.schema([]))
        found = {name: ask(con, sql(f"what_if/{name}")).to_pylist() for name in ("moves", "routes", "changed")}
    return {"prompts": sum(row["prompts"] for row in found["moves"]), **found}
