"""eval: a checkpoint's samples on the eval suites, their verdicts, and avg@n and pass@k with intervals.

The same engine, sampler and scorers as training; other tables (eval_rollouts, scores of kind eval, evals), which no
grading or routing query names.
"""

import time
from collections.abc import Callable
from typing import Any

import polars as pl
import pyarrow as pa

from pipeline.context import Context
from pipeline.engines.base import Sampling
from pipeline.stage import Outcome, Spec, current, make_table, nothing
from pipeline.stages import score
from pipeline.stages.generate import asks, prompt_rows, sample_policy, sampling_config
from pipeline.statistics import eval_metrics
from pipeline.store import read_parts
from schemas.errors import UserError
from schemas.recipe import Suite
from schemas.tables import ARROW


def sample_spec(ctx: Context, suite: Suite, round: int, step: int) -> Spec:
    e = ctx.recipe.eval
    config = sampling_config(ctx, ctx.checkpoint(round, step)[1], Sampling(e.temperature, e.top_p, e.max_tokens))
    part = ctx.part("eval_rollouts", round=round, step=step, suite=suite.name)
    return Spec("eval_rollouts", part, config, {}, ctx.recipe.seed, expensive=True)


def spec(ctx: Context, suite: Suite, round: int, step: int) -> Spec:
    keys = {"round": round, "step": step, "suite": suite.name}
    scores = ctx.part("scores", kind="eval", **keys).manifest()
    assert scores is not None
    config = {"suite": suite.model_dump(mode="json")}
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
        e = ctx.recipe.eval
        it = sample_spec(ctx, suite, round, step)
        work = asks(rows, suite.n, (ctx.recipe.seed, "eval"))
        keys = {"round": round, "step": step, "suite": suite.name}
        outcomes.append(
            sample_policy(
                ctx, it, work, Sampling(e.temperature, e.top_p, e.max_tokens), ctx.checkpoint(round, step), keys,
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
        read_parts(ctx.part("scores", kind="eval", **keys).files(), "scores", ["id", "prompt_id", "correct"])
    )
    assert isinstance(samples, pl.DataFrame)
    assert isinstance(scores, pl.DataFrame)
    counted = samples.filter(pl.col("sample") < suite.n).join(scores, left_on="rollout_id", right_on="id")
    verdicts = counted.filter(pl.col("prompt_id").is_in(asked)).sort("prompt_id", "sample")
    correct_PN = verdicts.group_by("prompt_id", maintain_order=True).agg("correct")["correct"].to_list()
    rows = [
        {
            **keys, "metric": metric, "value": e.value, "ci_low": e.ci_low, "ci_high": e.ci_high,
            "problems": e.problems, "policy": ctx.checkpoint(round, step)[1],
        }
        for metric, e in eval_metrics(correct_PN, suite.pass_k).items()
    ]  # fmt: skip
    facts = {r["metric"]: [float(f"{r[n]:.4f}") for n in ("value", "ci_low", "ci_high")] for r in rows}
    return make_table(it, pa.Table.from_pylist(rows, schema=ARROW["evals"]), facts=facts, started=started)
