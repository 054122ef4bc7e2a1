"""eval: a checkpoint's samples on the eval suites, their verdicts, and avg@n, pass@k and maj@n with intervals.

The same engine, sampler and scorers as training; other tables (eval_rollouts, scores of kind eval, evals), which no
grading or routing query names.
"""

import time
from collections.abc import Callable, Hashable
from typing import Any

import polars as pl
import pyarrow as pa

from pipeline.context import Context
from pipeline.engines.base import Sampling
from pipeline.scorers import vote
from pipeline.stage import Outcome, Spec, current, make_table, nothing, settings
from pipeline.stages import score
from pipeline.stages.generate import asks, prompt_rows, sample_policy, sampling_config
from pipeline.statistics import eval_metrics
from pipeline.store import read_parts
from schemas.errors import UserError
from schemas.recipe import Suite
from schemas.tables import ARROW


def sampling(ctx: Context, suite: Suite) -> Sampling:
    """How the suite is sampled: as it says, else as [eval] says."""
    own, shared = suite, ctx.recipe.eval
    return Sampling(
        shared.temperature if own.temperature is None else own.temperature,
        own.top_p or shared.top_p,
        own.max_tokens or shared.max_tokens,
    )


def sample_spec(ctx: Context, suite: Suite, round: int, step: int) -> Spec:
    config = sampling_config(ctx, ctx.checkpoint(round, step)[1], sampling(ctx, suite))
    part = ctx.part("eval_rollouts", round=round, step=step, suite=suite.name)
    return Spec("eval_rollouts", part, config, {}, ctx.recipe.seed, expensive=True)


def spec(ctx: Context, suite: Suite, round: int, step: int) -> Spec:
    keys = {"round": round, "step": step, "suite": suite.name}
    scores = ctx.part("scores", kind="eval", **keys).manifest()
    assert scores is not None
    config = {"suite": settings(suite, without=("temperature", "top_p", "max_tokens"), later=("maj",))}
    return Spec("eval", ctx.part("evals", **keys), config, {"scores": scores.identity}, 0)


def suite_prompts(ctx: Context, suite: Suite) -> list[dict[str, Any]]:
    """The eval prompts of the suite's sources, the first `limit` by id."""
    return [r for r in prompt_rows(ctx, "eval") if r["source"] in suite.sources][: suite.limit]


def run(
    ctx: Context, round: int, step: int, *, regenerate: bool = False, reference: Callable | None = None
) -> list[Outcome]:
    """Evaluates the checkpoint of (round, step) on every suite; (0, 0) is the base policy."""
    suites = ctx.recipe.eval.suites
    if not suites:
        raise UserError("eval.suites: the recipe names no suite. Add [[eval.suites]] with a name and its sources")
    outcomes = []
    for suite in suites:
        rows = suite_prompts(ctx, suite)
        if not rows:
            raise UserError(f"eval.suites.{suite.name}: its sources ({', '.join(suite.sources)}) have no eval prompt")
        it = sample_spec(ctx, suite, round, step)
        work = asks(rows, suite.n, (ctx.recipe.seed, "eval"))
        keys = {"round": round, "step": step, "suite": suite.name}
        outcomes.append(
            sample_policy(
                ctx, it, work, sampling(ctx, suite), ctx.checkpoint(round, step), keys,
                regenerate=regenerate, reference=reference,
            )
        )  # fmt: skip
    parts = [ctx.part("eval_rollouts", round=round, step=step, suite=s.name) for s in suites]
    outcomes += score.run(ctx, [("eval", p) for p in parts])
    return outcomes + [_estimate(ctx, suite, round, step) for suite in suites]


def _estimate(ctx: Context, suite: Suite, round: int, step: int) -> Outcome:
    started = time.monotonic()
    it = spec(ctx, suite, round, step)
    if current(it):
        return nothing(it)
    keys = {"round": round, "step": step, "suite": suite.name}
    asked = [r["prompt_id"] for r in suite_prompts(ctx, suite)]
    samples = pl.from_arrow(read_parts(ctx.part("eval_rollouts", **keys).files(), "eval_rollouts", ["rollout_id", "sample"]))
    scores = pl.from_arrow(
        read_parts(
            ctx.part("scores", kind="eval", **keys).files(),
            "scores",
            ["id", "prompt_id", "correct", "extracted", "verifier"],
        )
    )
    assert isinstance(samples, pl.DataFrame)
    assert isinstance(scores, pl.DataFrame)
    counted = samples.filter(pl.col("sample") < suite.n).join(scores, left_on="rollout_id", right_on="id")
    verdicts = counted.filter(pl.col("prompt_id").is_in(asked)).sort("prompt_id", "sample")
    right_PN: dict[str, list[bool]] = {}
    votes_PN: dict[str, list[Hashable]] = {}
    for prompt, verifier, said, right in verdicts.select("prompt_id", "verifier", "extracted", "correct").iter_rows():
        right_PN.setdefault(prompt, []).append(right)
        votes_PN.setdefault(prompt, []).append(vote(ctx.recipe.score.verifiers[verifier], said, right))
    votes = list(votes_PN.values()) if suite.maj else None
    rows = [
        {
            **keys, "metric": metric, "value": e.value, "ci_low": e.ci_low, "ci_high": e.ci_high,
            "problems": e.problems, "policy": ctx.checkpoint(round, step)[1],
        }
        for metric, e in eval_metrics(list(right_PN.values()), suite.pass_k, votes).items()
    ]  # fmt: skip
    facts = {r["metric"]: [float(f"{r[n]:.4f}") for n in ("value", "ci_low", "ci_high")] for r in rows}
    return make_table(it, pa.Table.from_pylist(rows, schema=ARROW["evals"]), facts=facts, started=started)
