"""Verified traces as token ids of the policy, and the refusal of a policy whose tokenizer is not the rollouts' own.

One idea: traces come as a stream, are tokenised, and go to a Parquet file that DuckDB reads as `fitting_traces`, so memory holds
a batch of them. Every prompt that has such a trace is rendered again and must give the tokens that its rollouts have. Prompts
without one only need the tokenizer to be the same: where the rollouts' policy and its files say so, RENDERED rollouts are looked
at too (another version of transformers would show), else all of them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.context import Context
from pipeline.policy import Renderer, tokenizer_id
from pipeline.store import ROW_GROUP, ask, sql, stream
from schemas.errors import UserError
from schemas.tables import IDS, S

if TYPE_CHECKING:
    import duckdb

FITTING = pa.schema(
    [
        ("trace_id", S), ("prompt_id", S), ("teacher", S), ("sample", pa.int32()), ("prompt_tokens", IDS), ("tokens", IDS),
        ("n_tokens", pa.int64()), ("finish_reason", S), ("reward", pa.float64()),
    ]
)  # fmt: skip
RENDERED = 2048


def write_fitting_traces(ctx: Context, con: "duckdb.DuckDBPyConnection", round: int, path: Path) -> None:
    """Verified traces of the round's prompts: prompt as the rollouts have it (or rendered, where there are none), text, end-of-sequence.

    Traces of a teacher that the recipe no longer names, or beyond its `samples`, stay on disk and out of the result.
    """
    renderer = Renderer(ctx.recipe.policy.model, ctx.recipe.policy.template)
    refuse_another_tokenizer(ctx, con, renderer, round)
    with pq.ParquetWriter(path, FITTING, compression="zstd") as writer:
        for rows in _tokenised(ctx, con, renderer, round):
            writer.write_table(pa.Table.from_pylist(rows, schema=FITTING))


def _tokenised(
    ctx: Context, con: "duckdb.DuckDBPyConnection", renderer: Renderer, round: int
) -> Iterator[list[dict[str, Any]]]:
    samples = {t.name: t.samples for t in ctx.recipe.teachers}
    for batch in stream(con, sql("verified_traces"), ROW_GROUP) if samples else ():
        rows = [r for r in batch.to_pylist() if r["sample"] < samples.get(r["teacher"], 0)]
        if ctx.recipe.train.method.routing(round).rl:  # without rollouts a prompt has no grade, so no way into a shard
            rows = [r for r in rows if r["prompt_tokens"] is not None]
        for r in rows:
            messages = r.pop("messages")
            if r["prompt_tokens"] is None:
                r["prompt_tokens"] = _rendered(renderer, messages)
            else:
                _same_prompt(ctx, renderer, round, r["prompt_id"], messages, r["prompt_tokens"])
            if not r["prompt_tokens"]:
                continue
            try:
                r["tokens"] = renderer.trace_tokens(r["prompt_tokens"], r.pop("text"))
            except UserError as e:
                raise UserError(f"trace {r['trace_id']} of teacher {r['teacher']}: {e}") from None
            r["n_tokens"] = len(r["prompt_tokens"]) + len(r["tokens"])
        yield [r for r in rows if r["prompt_tokens"]]


def _rendered(renderer: Renderer, messages: list[dict[str, str]]) -> list[int]:
    """The prompt's tokens; none of one that cannot be rendered, which `dypo generate` has told and counted."""
    try:
        return renderer.prompt_tokens(messages)
    except UserError:
        return []


def refuse_another_tokenizer(ctx: Context, con: "duckdb.DuckDBPyConnection", renderer: Renderer, round: int) -> None:
    """UserError if the policy's tokenizer or template does not give the prompt tokens that the rollouts have."""
    found = ask(con, "select distinct policy from rollouts where round = $round", round=round)["policy"].to_pylist()
    there = round == 0 or ctx.round_end(round - 1) is not None
    folder, policy = ctx.policy_of(round) if there else (ctx.recipe.policy.model, "")
    known = found == [policy] and tokenizer_id(folder) == tokenizer_id(ctx.recipe.policy.model)
    for batch in stream(con, sql("sampled_prompts"), ROW_GROUP, round=round, rows=RENDERED if known else None):
        for row in batch.to_pylist():
            _same_prompt(ctx, renderer, round, row["prompt_id"], row["messages"], row["tokens"])


def _same_prompt(
    ctx: Context, renderer: Renderer, round: int, prompt_id: str, messages: list[dict[str, str]], tokens: list[int]
) -> None:
    now = renderer.prompt_tokens(messages)
    if now != tokens:
        raise UserError(
            f"{ctx.part('rollouts', round=round).folder}: prompt {prompt_id} was sampled as tokens "
            f"{tokens[:8]}..., but the tokenizer of {ctx.recipe.policy.model} renders {now[:8]}...: another "
            "tokenizer or chat template. Use the policy that made the rollouts, or generate them again"
        )
