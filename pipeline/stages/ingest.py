"""ingest: the recipe's sources -> prompts. Checks every row and every gold answer before it writes anything."""

import json
import time

import pyarrow as pa

from pipeline.context import Context
from pipeline.scorers import check_gold
from pipeline.sources import content_id, merged_rows, read_source, split_prompts
from pipeline.stage import Outcome, Spec, counts, current, make_table, nothing, restore
from schemas.errors import UserError


def spec(ctx: Context) -> Spec:
    """Depends on the sources' contents and settings, not on where they lie."""
    config = {s.name: {**s.model_dump(mode="json", exclude={"path"}), "content": content_id(s)} for s in ctx.recipe.sources}
    return Spec("ingest", ctx.part("prompts"), config, {}, ctx.recipe.seed)


def run(ctx: Context) -> Outcome:
    started = time.monotonic()
    it = spec(ctx)
    restore(it)
    if current(it):
        return nothing(it)
    tables = [read_source(source) for source in ctx.recipe.sources]
    rows = split_prompts(tables, list(ctx.recipe.sources))
    _refuse_bad_gold(ctx, rows)
    if "train" not in rows.column("split").to_pylist():
        raise UserError("sources: no train prompt at all. Give at least one source with split = 'train'")
    merged = sum(merged_rows(t) for t in tables)
    facts = {"splits": counts(rows, "split")} | ({"repeated_questions_merged": merged} if merged else {})
    return make_table(it, rows, facts=facts, started=started)


def _refuse_bad_gold(ctx: Context, rows: pa.Table) -> None:
    """UserError naming the first prompts whose gold answer their verifier cannot use."""
    bad = []
    for row in rows.select(["prompt_id", "messages", "answer", "verifier", "source", "metadata"]).to_pylist():
        why = check_gold(ctx.recipe.score.verifiers[row["verifier"]], row["answer"], json.loads(row["metadata"] or "{}"))
        if why:
            bad.append(
                f"  {row['source']}: prompt {row['messages'][-1]['content'][:60]!r}, answer {row['answer'][:60]!r}: {why}"
            )
    if bad:
        more = f"\n  ... and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UserError(
            f"{len(bad)} gold answers cannot be judged by their verifier:\n"
            + "\n".join(bad[:5])
            + more
            + "\nCorrect or remove these rows, or name another verifier for the source"
        )
