"""A run folder whose prompts, rollouts and verdicts are made in SQL, as large as wanted, in the store's own layout.

One idea: grading reads keys, verdicts and lengths, so every token list has a single token here unless `tokens` says how many a
response has; ids are md5, so that they are as hard to sort and as random as real ones. Of 100 groups 22 are Easy, 28 Hard, 50 Mid;
rewards are shaped, so that a group's sums are of fractions.
Rows of a prompt stand together and verdicts stand in the order of the rollouts, as the stages write them.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa

from pipeline.context import Context, load
from pipeline.policy import Renderer
from pipeline.stage import describe_part
from pipeline.store import partition, write_parts
from schemas.ids import digest
from schemas.manifest import Manifest
from schemas.tables import ARROW

ROOT = Path(__file__).parents[2]
K = 8
ASKED = "12+3="
RECIPE = f"""
name = "made"
run = "{{run}}"

[policy]
model = "{ROOT}/data/tiny_policy"

[[sources]]
type = "file"
name = "sums"
path = "{ROOT}/data/tiny/train.jsonl"
verifier = "sum"

[grade]
memory_mb = {{memory_mb}}

[score]
verifiers.sum = {{{{ type = "exact" }}}}

[train]
steps = 1
prompts_per_step = 1
"""

PROMPTS = """
select
    md5('p' || i) as prompt_id, [{{'role': 'user', 'content': $asked}}] as messages, '51' as answer, 'sum' as verifier,
    'sums' as source, 'train' as split, cast(null as varchar) as metadata
from range({prompts}) as t(i)
"""
ROLLOUTS = """
select
    md5('r' || i) as rollout_id, md5('p' || i // {k}) as prompt_id, 0::integer as round, (i % {k})::integer as sample,
    $policy as policy, '' as text, $prompt as prompt_tokens,
    {tokens} as tokens, {logprobs} as logprobs,
    'stop' as finish_reason, 'hf' as engine, 1e0 as temperature, 1e0 as top_p, i // {k} as seed
from range({rows}) as t(i)
"""
SCORES = """
with drawn as (
    select i, hash(i // {k}) % 100 as level, (i % {k} = 0 or (i % {k} > 1 and hash(i) % 2 = 0)) as lucky
    from range({rows}) as t(i)
),
judged as (select i, level < 22 or (level < 72 and lucky) as correct from drawn)
select
    'rollout' as kind, md5('r' || i) as id, md5('p' || i // {k}) as prompt_id, 0::integer as round, cast(null as integer) as step,
    cast(null as varchar) as suite, cast(null as varchar) as teacher, '0123456789abcdef' as text_sha,
    if(correct, 'ok', 'wrong') as status, correct::integer - (hash(i, 1) % 10) / 50e0 as reward, correct, '51' as extracted, 'sum' as verifier,
    1::integer as verifier_version, 0.5e0 as elapsed_ms, cast(null as varchar) as detail
from judged
"""
ONE_TOKEN = ("[3::integer]", "[(-0.5)::float]")
MANY_TOKENS = (  # 0.5 to 1.5 times {tokens}, ids and log-probs as good as random
    "[(hash(i, j) % 32000)::integer for j in range({tokens} // 2 + (hash(i) % {tokens})::bigint)]",
    "[-((hash(j, i) % 1000003) / 250000.0)::float for j in range({tokens} // 2 + (hash(i) % {tokens})::bigint)]",
)


def make(run: Path, rows: int, tokens: int | None = None, memory_mb: int = 384) -> Context:
    """Writes the run and returns it."""
    run.mkdir(parents=True)
    (run / "recipe.toml").write_text(RECIPE.format(run=run, memory_mb=memory_mb))
    ctx = load(run)
    asked = [{"role": "user", "content": ASKED}]
    lists = ONE_TOKEN if tokens is None else tuple(text.format(tokens=tokens) for text in MANY_TOKENS)
    sizes = {"prompts": rows // K, "rows": rows, "k": K, "tokens": lists[0], "logprobs": lists[1]}
    prompt = Renderer(ctx.recipe.policy.model).prompt_tokens(asked)
    for table, keys, text, parameters in (
        ("prompts", {}, PROMPTS, {"asked": ASKED}),
        ("rollouts", {"round": 0}, ROLLOUTS, {"policy": ctx.base_policy, "prompt": prompt}),
        ("scores", {"kind": "rollout", "round": 0}, SCORES, {}),
    ):
        con = duckdb.connect(config={"threads": 1})
        batches = con.sql(text.format(**sizes), params=parameters or None).to_arrow_reader(1 << 14)
        _write(run, table, keys, (_cast(batch, ARROW[table]) for batch in batches))
    return ctx


def _write(run: Path, table: str, keys: dict[str, str | int], batches: Iterator[pa.RecordBatch]) -> None:
    part = partition(run, table, keys)
    parts = [describe_part(path) for path in write_parts(part.folder, table, batches, "made")]
    rows = sum(p.rows for p in parts)
    facts = {}
    if table == "scores":
        query = "select status, count(*) from read_parquet($paths, hive_partitioning=false) group by 1 order by 1"
        facts["statuses"] = dict(duckdb.execute(query, {"paths": [str(part.folder / p.name) for p in parts]}).fetchall())
    part.complete(
        Manifest(
            table=table, keys=dict(part.keys), stage="made", fingerprint="made", config={}, parents={}, parts=parts, rows=rows,
            rows_digest=digest([table, rows]), seed=0, code="bench", created=datetime.now(UTC).isoformat(timespec="seconds"),
            facts=facts,
        )
    )  # fmt: skip


def _cast(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    wanted = pa.schema([f for f in schema if f.name in batch.schema.names])
    return pa.Table.from_batches([batch]).select(wanted.names).cast(wanted).combine_chunks().to_batches()[0]
