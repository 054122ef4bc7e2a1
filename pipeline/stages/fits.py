"""fits: the log-probs of a teacher's verified traces under the policy that the round samples, a sub-stage of grade.

Only for a method whose adjustments read `fits` (train.method.adjust, sql/adjust/teacher_by_fit.sql). They are rows of `logprobs`, one role a
teacher: computed once by the trainer's forward, so grading again needs no model, and one teacher's do not hang on another's. The
work list is the traces that the round's prompts have now; the choice by them is the query's.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.context import Context
from pipeline.policy import tokenizer_id
from pipeline.progress import progress
from pipeline.stage import Outcome, Spec, begin, current, finish, finished, nothing
from pipeline.stages.logprobs import LogProbs, as_rows
from schemas.errors import UserError
from schemas.tables import ARROW


def spec(ctx: Context, round: int, teacher: str) -> Spec:
    """Depends on the teacher's traces, how prompts are rendered, and the round's policy; which traces are wanted is the work list."""
    traces = ctx.part("traces", teacher=teacher)
    policy = ctx.recipe.policy
    config = {"model": ctx.policy_of(round)[1], "dtype": policy.dtype, "template": policy.template}
    config["tokenizer"] = tokenizer_id(policy.model)
    manifest = traces.manifest()
    parents = {} if manifest is None else {traces.label: manifest.identity}
    return Spec("logprobs", ctx.part("logprobs", round=round, role=f"fit-{teacher}"), config, parents)


def specs(ctx: Context, round: int) -> list[Spec]:
    """One for each teacher of the recipe."""
    return [spec(ctx, round, t.name) for t in ctx.recipe.teachers]


def run(ctx: Context, round: int, fitting: Iterable[pa.RecordBatch], trainer: Callable[[], LogProbs]) -> list[Outcome]:
    """What is missing of the log-probs of these traces (sql/fitting.sql), teacher by teacher."""
    rows = _as_shards(fitting, round)
    return [
        _of_teacher(ctx, round, t.name, rows.filter(pc.field("teacher") == t.name), trainer) for t in ctx.recipe.teachers
    ]


def _of_teacher(ctx: Context, round: int, teacher: str, rows: pa.Table, trainer: Callable[[], LogProbs]) -> Outcome:
    it, started = spec(ctx, round, teacher), time.monotonic()
    begin(it)
    done = {i for (i,) in finished(it, ("item_id",))}
    missing = set(rows["item_id"].to_pylist()) - done
    if current(it) and not missing and not it.partition.loose(it.fingerprint):
        return nothing(it)
    folder, model = ctx.policy_of(round)
    it.partition.folder.mkdir(parents=True, exist_ok=True)
    with progress(it.partition.label, rows.num_rows, rows.num_rows - len(missing)) as bar:
        if missing:
            ctx.verify_policy(folder)
            batches = trainer().reference_logprobs(
                folder, rows, ctx.recipe.policy, ctx.recipe.train.micro_batch_tokens, finished=frozenset(done), of="sft"
            )
            for got in batches:
                same = {"round": round, "role": dict(it.partition.keys)["role"], "model": model}
                it.partition.write(as_rows(got, same), it.fingerprint)
                bar.advance(got.num_rows)
    return finish(it, started=started)


def stored(ctx: Context, round: int) -> list[Path]:
    """The files of a round's fits, verified. UserError if a teacher's are not there, or of other traces or another policy."""
    files: list[Path] = []
    for it in specs(ctx, round):
        if not current(it):
            raise UserError(
                f"{it.partition.folder}: not there, or of other traces or another policy, and the routed traces are chosen by them. "
                f"`dypo grade {ctx.run} --round {round}` computes them where train.method.adjust asks for them (or give it by --set)"
            )
        it.partition.verify()
        files += it.partition.files()
    return files


def _as_shards(fitting: Iterable[pa.RecordBatch], round: int) -> pa.Table:
    """Traces as sft rows of a shard, of which the trainer's forward reads prompt and tokens."""
    same = {"round": round, "source_round": round, "route": "sft", "policy": "", "temperature": 1.0, "group_size": 1}
    same |= {"correct": True, "advantage": 0.0, "w_sft": 1.0, "w_grpo": 0.0, "w_gal": 0.0, "old_logprobs": None}
    schema = ARROW["shards"]
    batches = [
        pa.table(
            {
                f.name: batch["trace_id"] if f.name == "item_id"
                else batch[f.name] if f.name in batch.schema.names
                else pa.array([same[f.name]] * batch.num_rows, f.type)
                for f in schema
            }
        ).cast(schema)
        for batch in fitting
    ]  # fmt: skip
    return pa.concat_tables(batches) if batches else schema.empty_table()
