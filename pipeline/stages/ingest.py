"""ingest: the recipe's sources -> prompts. Checks every row and every gold answer before it writes anything.

With [decontaminate], table `contamination` first: train prompts that share text with eval prompts.
"""

import json
import time
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipeline.contamination import contamination
from pipeline.context import Context
from pipeline.hub import fetch
from pipeline.scorers import check_gold
from pipeline.sources import content_id, merged_rows, read_source, split_prompts
from pipeline.stage import Outcome, Spec, begin, counts, current, make_table, nothing, restore, settings
from schemas.errors import UserError
from schemas.recipe import FileSource


def spec(ctx: Context) -> Spec:
    """Depends on the sources' contents and settings, not on where they lie."""
    config = {
        s.name: {**settings(s, without=("path", "hub"), later=("template", "options_seed")), "content": content_id(s)}
        for s in ctx.recipe.sources
    }
    if (decontaminate := ctx.recipe.decontaminate) is not None:
        config["[decontaminate]"] = decontaminate.model_dump(mode="json")
    return Spec("ingest", ctx.part("prompts"), config, {}, ctx.recipe.seed)


def run(ctx: Context) -> Outcome:
    started = time.monotonic()
    for source in ctx.recipe.sources:
        if isinstance(source, FileSource):
            fetch(source)
    it = spec(ctx)
    shares = replace(it, partition=ctx.part("contamination"))
    restore(it)
    if current(it):
        begin(shares)
        return nothing(it)
    tables = [read_source(source) for source in ctx.recipe.sources]
    rows = split_prompts(tables, list(ctx.recipe.sources))
    _refuse_bad_gold(ctx, rows)
    if "train" not in rows.column("split").to_pylist():
        raise UserError("sources: no train prompt at all. Give at least one source with split = 'train'")
    merged = sum(merged_rows(t) for t in tables)
    facts: dict[str, Any] = {"repeated_questions_merged": merged} if merged else {}
    begin(shares)  # else a table of other settings would stay
    if (wanted := ctx.recipe.decontaminate) is not None:
        found = contamination(rows, wanted.ngram)
        facts["contaminated"] = {k: len(found.column(k).unique()) for k in ("prompt_id", "eval_prompt_id")}
        rows = _dropped(rows, found) if wanted.action == "drop" else rows
        make_table(shares, found)
    return make_table(it, rows, facts={"splits": counts(rows, "split"), **facts}, started=started)


def _dropped(rows: pa.Table, found: pa.Table) -> pa.Table:
    """The prompts with the contaminated ones on neither side of the split."""
    bad = set(found.column("prompt_id").to_pylist())
    pairs = zip(rows.column("prompt_id").to_pylist(), rows.column("split").to_pylist(), strict=True)
    split = ["contaminated" if key in bad else side for key, side in pairs]
    if "train" not in split:
        raise UserError(
            f"[decontaminate]: all {len(bad)} train prompts share text with an eval prompt, so nothing is left to train on. "
            "Set action = 'flag' and see table contamination, or raise ngram"
        )
    return rows.set_column(rows.schema.get_field_index("split"), rows.schema.field("split"), pa.array(split, pa.string()))


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
