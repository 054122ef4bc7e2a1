"""audit: what was stored against what the trainer computes again. Writes rows of role old; changes nothing else.

One idea: the numbers are a query over the stored rows (pipeline/sql/audit), so an audit that was made once is only read, `train`
decides on the same rows, and anyone can ask further with `dypo sql`. Left out: the refusal (logprobs.py).
"""

from collections.abc import Iterator
from typing import Any

from pipeline.context import Context
from pipeline.policy import Renderer
from pipeline.stage import need
from pipeline.stages import logprobs
from pipeline.stages.train import refuse_other_policies
from pipeline.store import partitions, read_parts
from schemas.errors import UserError


def rounds(ctx: Context) -> list[int]:
    """Every round with shards. UserError if there is none."""
    found = {int(dict(p.keys)["round"]) for p in partitions(ctx.run, "shards")}
    if not found:
        raise UserError(f"{ctx.run}: no shards yet. Run `dypo grade {ctx.run}` first")
    return sorted(found)


def audit_logprobs(ctx: Context, round: int, trainer: logprobs.LogProbs) -> Iterator[dict[str, Any]]:
    """Sampler against trainer on the round's rollouts, one entry for each policy that sampled (logprobs.differences).

    Added to each: round, limit (train.max_logprob_difference), refused, and each worst token's text. UserError if the round has
    no shards, or rollouts of another policy than the one it samples.
    """
    need(ctx.run, "shards", {"round": round, "route": "rl"}, command=f"dypo grade {ctx.run} --round {round}")
    folder, _ = ctx.policy_of(round)
    files = ctx.part("shards", round=round, route="rl").files()
    refuse_other_policies(ctx, round, read_parts(files, "shards", ["source_round", "policy"]))
    logprobs.run(ctx, round, "old", trainer)
    renderer, limit = Renderer(folder), ctx.recipe.train.max_logprob_difference
    for entry in logprobs.differences(ctx, round):
        for token in entry["worst_tokens"]:
            token["text"] = renderer.text([token["token"]], special=True)
        yield {"round": round, **entry, "limit": limit, "refused": not entry["mean_difference"] <= limit}
