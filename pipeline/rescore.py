"""`dypo score --against VERSION`: what a changed verifier would change. Judges anew, beside the older verdicts.

"I upgraded a verifier: what would change?" The verdicts of today (of this dypo and this recipe) are kept where `dypo score` looks
for them and in `score_versions`, but `scores`, grades and shards stay as they are. What differs is shown from the bottom up: verdicts
that flipped, some of them in full, and the grades and routes that would follow, by grading the round twice with the stage's own
functions. `dypo score` then takes today's verdicts over without judging again.

VERSION is a verifier's version number, or the beginning of the id that the list of kept versions shows, where a number is not
enough (an option of the verifier was changed, not its version). Left out: eval verdicts, which no grade reads, and those on rows of
earlier rounds that this one reuses.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.context import Context, load
from pipeline.flow import judged_in
from pipeline.stages import score
from pipeline.store import Partition, ask, lock, open_views, sql, view_parts
from pipeline.what_if import compared
from schemas.errors import UserError
from schemas.ids import digest
from schemas.manifest import Manifest
from schemas.tables import ARROW

EXAMPLES = 3  # of each kind of flip


@dataclass(frozen=True)
class Rescored:
    """The answer. verdicts: how many were compared; without: partitions that have none of that version; flips and examples: the
    rows of those queries; moves, routes, changed: as in what_if.WhatIf, now = with the older verdicts, then = with today's."""

    round: int
    version: str
    verdicts: int
    without: list[str]
    flips: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    prompts: int
    moves: list[dict[str, Any]]
    routes: list[dict[str, Any]]
    changed: list[dict[str, Any]]


def against(target: Path, overrides: list[str], round: int | None, version: str) -> Rescored:
    """Judges a round (None: the newest) as the recipe says today, where that has not been done, and compares with `version`."""
    ctx = load(target, overrides)
    round = ctx.newest_round() if round is None else round
    sources = judged_in(ctx, round)
    older = [_of_version(ctx, kind, source, version) for kind, source in sources]
    if not any(older):
        raise UserError(
            f"--against {version}: no older verdicts of that version on round {round}. {_kept_text(ctx, sources)}"
        )
    with lock(ctx.run):
        today = score.aside(ctx, sources)
    was = [path for part in older if part is not None for path in part.files()]
    now = [path for it in today for path in it.partition.files()]
    con = open_views(ctx.run)
    view_parts(con, "scores_was", was, ARROW["scores"])
    view_parts(con, "scores_now", now, ARROW["scores"])
    verdicts = ask(con, "select count(*) as n from scores_was").to_pylist()[0]["n"]
    flips = ask(con, sql("what_if/flips")).to_pylist()
    examples = ask(con, sql("what_if/flip_examples"), examples=EXAMPLES).to_pylist()
    without = [it.partition.label for it, part in zip(today, older, strict=True) if part is None]
    return Rescored(round, version, verdicts, without, flips, examples, **compared(round, (ctx, was), (ctx, now)))


def _of_version(ctx: Context, kind: str, source: Partition, version: str) -> Partition | None:
    """The kept verdicts of that version on one partition, the newest. UserError where the number means several."""
    found = [(part, m) for part, m in _kept(ctx, kind, source) if _is_of(m, version)]
    if len({_id(m) for _, m in found}) > 1:
        raise UserError(f"--against {version}: several, name one by its id. {_kept_text(ctx, [(kind, source)])}")
    return max(found, key=lambda each: each[1].created)[0] if found else None


def _kept(ctx: Context, kind: str, source: Partition) -> list[tuple[Partition, Manifest]]:
    """Every complete partition of older verdicts on this source, the one in `scores` too."""
    it = score.spec(ctx, kind, source)
    folders = sorted((ctx.run / "superseded" / "score").glob("*"))
    parts = [it.partition, *(Partition(folder, it.partition.table, it.partition.keys) for folder in folders)]
    found = [(part, manifest) for part in parts if (manifest := part.manifest()) is not None]
    return [(part, manifest) for part, manifest in found if manifest.fingerprint != it.fingerprint]


def _is_of(manifest: Manifest, version: str) -> bool:
    numbers = {str(each["version"]) for each in manifest.config["verifiers"].values()}
    return version in numbers or (len(version) >= 4 and _id(manifest).startswith(version))


def _id(manifest: Manifest) -> str:
    """What names a state of the verifiers and of their limits, over all partitions that were judged with it."""
    return digest({key: value for key, value in manifest.config.items() if key != "recorded"})[:12]


def _kept_text(ctx: Context, sources: list[tuple[str, Partition]]) -> str:
    lines = {}
    for kind, source in sources:
        for _, m in _kept(ctx, kind, source):
            verifiers = ", ".join(f"{name} {each['version']}" for name, each in m.config["verifiers"].items())
            lines[_id(m)] = f"  {_id(m)}  {m.created}  {verifiers}"
    if not lines:
        return "None are kept: every verdict is of today's verifiers"
    return "Kept are (id, when, verifiers and their versions):\n" + "\n".join(sorted(lines.values()))
