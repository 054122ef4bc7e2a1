"""logprobs: the trainer's log-probs of a round's rollouts under a policy that is not being trained, as rows by role.

Roles: `old`, the policy that sampled them; `ref`, the run's base policy; `teacher`, the policy that is distilled (method opd). One
idea: one mechanism for every role, a sub-stage of `train` that computes what is missing, so the training loop never holds a second
model. Rows of role old also say how far the sampler's own log-probs are from the trainer's (`differences`, in SQL), on which
`refuse` decides and which `dypo audit` shows.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.context import Context
from pipeline.policy import check_folder, policy_id, vocabulary
from pipeline.progress import progress
from pipeline.stage import Outcome, Spec, begin, current, finish, finished, nothing
from pipeline.store import ask, open_views, read_parts, sql
from schemas.errors import UserError
from schemas.methods import Role
from schemas.methods.opd import OPDMethod
from schemas.tables import ARROW

SHOWN = 5  # rows named when a round is refused


class LogProbs(Protocol):
    """What the trainer brings."""

    def reference_logprobs(
        self,
        model_dir: Path,
        rows: pa.Table,
        policy: Any,
        micro_batch_tokens: int,
        *,
        finished: frozenset[str],
    ) -> Iterator[pa.Table]: ...


def policies(ctx: Context, round: int, role: Role) -> dict[int, tuple[Path, str]]:
    """Folder and content id of a role's policy, by the round that the rows were sampled in (reused ones are of older rounds)."""
    parts = ctx.part("shards", round=round, route="rl").files()
    rounds = sorted(set(read_parts(parts, "shards", ["source_round"]).column("source_round").to_pylist())) or [round]
    if role == "old":
        return {n: ctx.policy_of(n) for n in rounds}
    return dict.fromkeys(rounds, distilled(ctx) if role == "teacher" else (ctx.recipe.policy.model, ctx.base_policy))


def distilled(ctx: Context) -> tuple[Path, str]:
    """Folder and content id of the policy that is distilled. UserError if its tokens are not the policy's."""
    method = ctx.recipe.train.method
    assert isinstance(method, OPDMethod)
    check_folder(method.teacher, "train.method.teacher")
    mine, theirs = (vocabulary(folder) for folder in (ctx.recipe.policy.model, method.teacher))
    if mine != theirs:
        raise UserError(
            f"train.method.teacher {method.teacher}: its tokenizer has other tokens than the policy's ({ctx.recipe.policy.model}), so its "
            "log-probs of the policy's tokens would say nothing. Distil from a model of the same tokenizer, or learn from its text "
            "as [[teachers]]"
        )
    return method.teacher, policy_id(method.teacher)


def spec(ctx: Context, round: int, role: Role) -> Spec:
    """Depends on the rl shard's rows and the role's policy. UserError if the round has no rl shard yet."""
    shards = ctx.part("shards", round=round, route="rl")
    rl = shards.manifest()
    if rl is None:
        raise UserError(f"{shards.folder}: not there or not finished. Run `dypo grade {ctx.run} --round {round}` first")
    models = sorted({model for _, model in policies(ctx, round, role).values()})
    config = {"model": " ".join(models), "dtype": ctx.recipe.policy.dtype}
    return Spec("logprobs", ctx.part("logprobs", round=round, role=role), config, {shards.label: rl.identity})


def run(ctx: Context, round: int, role: Role, trainer: LogProbs) -> Outcome:
    """The role's log-probs of every rl row of the round, by anti-join."""
    started = time.monotonic()
    it = spec(ctx, round, role)
    begin(it)
    done = {i for (i,) in finished(it, ("item_id",))}
    rl = read_parts(ctx.part("shards", round=round, route="rl").files(), "shards")
    left = rl.num_rows - len(done)
    if left == 0 and current(it) and not it.partition.loose(it.fingerprint):
        return nothing(it)
    it.partition.folder.mkdir(parents=True, exist_ok=True)
    with progress(it.partition.label, rl.num_rows, len(done)) as bar:
        for source_round, (folder, model) in policies(ctx, round, role).items() if left else ():
            ctx.verify_policy(folder)
            batches = trainer.reference_logprobs(  # planned from all rows, so that a resumed stage computes the same batches
                folder, rl.filter(pc.field("source_round") == source_round), ctx.recipe.policy,
                ctx.recipe.train.micro_batch_tokens, finished=frozenset(done),
            )  # fmt: skip
            for got in batches:
                it.partition.write(as_rows(got, {"round": round, "role": role, "model": model}), it.fingerprint)
                bar.advance(got.num_rows)
    return finish(it, started=started)


def read(ctx: Context, round: int, roles: Iterable[Role]) -> dict[str, pa.Table]:
    """The stored rows of these roles."""
    return {role: read_parts(ctx.part("logprobs", round=round, role=role).files(), "logprobs") for role in roles}


def as_rows(got: pa.Table, constant: dict[str, str | int]) -> pa.Table:
    """What the trainer computed as rows of `logprobs`."""
    return pa.table(
        {n: got.column(n) if n in got.column_names else [constant[n]] * got.num_rows for n in ARROW["logprobs"].names}
    )


def differences(ctx: Context, round: int) -> list[dict[str, Any]]:
    """Sampler against trainer in a round, one entry for each policy that sampled; its `worst` tokens and rows inside.

    Empty if the round has no current rows of role old, or no rollouts in its shards.
    """
    it = spec(ctx, round, "old")
    if not current(it):
        return []
    it.partition.verify()
    con = open_views(ctx.run)
    con.execute("set threads = 1")  # sums in one order: the same rows give the same last digits
    con.execute(f"create view compared as {sql('audit/compared')}")
    policies = ask(con, sql("audit/policies"), round=round).to_pylist()
    worst = {name: ask(con, sql(f"audit/{name}"), round=round).to_pylist() for name in ("tokens", "rows")}
    for entry in policies:
        for name, rows in worst.items():
            mine = [row for row in rows if row["policy"] == entry["policy"]]
            entry[f"worst_{name}"] = [{k: v for k, v in row.items() if k != "policy"} for row in mine]
    return policies


def refuse(ctx: Context, round: int) -> None:
    """UserError if audited rows of the round have log-probs too far from the sampler's. Nothing if none were audited."""
    limit = ctx.recipe.train.max_logprob_difference
    for entry in differences(ctx, round):
        found = entry["mean_difference"]
        if found <= limit:  # NaN is not
            continue
        rows = ", ".join(f"{r['item_id']} ({r['mean_difference']:.3g})" for r in entry["worst_rows"][:SHOWN])
        raise UserError(
            f"{ctx.run}/shards/round={round}: the log-probs that the sampler stored differ from the trainer's by {found:.3g} nats a "
            f"token on average (policy {entry['policy'][:12]}), expected at most train.max_logprob_difference = {limit:g}. "
            f"Worst rows: {rows}. `dypo audit logprobs {ctx.run} --round {round}` shows the tokens. Generate the round again "
            f"(`dypo refresh {ctx.run} --round {round} --regenerate`) with an engine that agrees, or train with "
            "--set train.max_logprob_difference=... to go on regardless"
        )
