"""fits: the log-probs of the round's verified traces under the policy that the round samples, a sub-stage of grade.

Only for a method that chooses a prompt's trace by them (train.method.adjust = ["teacher_by_fit"]). They are rows of `logprobs`, role
fit: computed once by the trainer's forward, so grading again needs no model. Left out: the choice (sql/adjust/teacher_by_fit.sql).
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa

from pipeline.context import Context
from pipeline.progress import progress
from pipeline.stage import Outcome, Spec, begin, current, finish, finished, nothing
from pipeline.stages.logprobs import LogProbs, as_rows
from schemas.errors import UserError
from schemas.tables import ARROW

ROLE = "fit"


def needed(ctx: Context) -> bool:
    """Whether the recipe's method reads them."""
    return "teacher_by_fit" in ctx.recipe.train.method.adjust


def spec(ctx: Context, round: int) -> Spec:
    """Depends on the traces, their verdicts, the round's prompts (by its rollouts, if it has any) and its policy."""
    wanted = [("prompts", {}), *(("traces", {"teacher": t.name}) for t in ctx.recipe.teachers)]
    wanted += [("scores", {"kind": "trace", "teacher": t.name}) for t in ctx.recipe.teachers]
    if ctx.recipe.train.method.routing(round).rl:
        wanted.append(("rollouts", {"round": round}))
    parts = [ctx.part(table, **keys) for table, keys in wanted]
    _, model = ctx.policy_of(round)
    config = {"model": model, "dtype": ctx.recipe.policy.dtype, "max_tokens": ctx.recipe.grade.max_tokens}
    config["samples"] = {t.name: t.samples for t in ctx.recipe.teachers}
    parents = {p.label: m.identity for p in parts if (m := p.manifest()) is not None}
    return Spec("logprobs", ctx.part("logprobs", round=round, role=ROLE), config, parents)


def run(ctx: Context, round: int, fitting: Iterable[pa.RecordBatch], trainer: Callable[[], LogProbs]) -> Outcome:
    """The log-probs of these traces (sql/fitting.sql), by anti-join."""
    it, started = spec(ctx, round), time.monotonic()
    if current(it) and not it.partition.loose(it.fingerprint):
        return nothing(it)
    begin(it)
    done = {i for (i,) in finished(it, ("item_id",))}
    rows = _as_shards(fitting, round)
    folder, model = ctx.policy_of(round)
    ctx.verify_policy(folder)
    it.partition.folder.mkdir(parents=True, exist_ok=True)
    with progress(it.partition.label, rows.num_rows, len(done)) as bar:
        if rows.num_rows > len(done):
            for got in trainer().reference_logprobs(
                folder, rows, ctx.recipe.policy, ctx.recipe.train.micro_batch_tokens, finished=frozenset(done), of="sft"
            ):
                it.partition.write(as_rows(got, {"round": round, "role": ROLE, "model": model}), it.fingerprint)
                bar.advance(got.num_rows)
    return finish(it, started=started)


def stored(ctx: Context, round: int) -> list[Path]:
    """The files of a round's fits. UserError if they are not there, or of other traces or another policy."""
    it = spec(ctx, round)
    if not current(it):
        raise UserError(
            f"{it.partition.folder}: not there, or of other traces or another policy, and teacher_by_fit chooses by them. "
            f"`dypo grade {ctx.run} --round {round}` computes them"
        )
    return it.partition.files()


def _as_shards(fitting: Iterable[pa.RecordBatch], round: int) -> pa.Table:
    """Traces as sft rows of a shard, of which the trainer's forward reads prompt and tokens."""
    same = {
        "round": round,
        "source_round": round,
        "route": "sft",
        "policy": "",
        "temperature": 1.0,
        "correct": True,
        "advantage": 0.0,
    }
    same |= {"group_size": 1, "w_sft": 1.0, "w_grpo": 0.0, "w_gal": 0.0, "old_logprobs": None}
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
