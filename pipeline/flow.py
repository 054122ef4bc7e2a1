"""The order of the stages: what `dypo run` and `dypo refresh` do, as a list of named stages. Each can be run alone."""

from collections.abc import Callable, Iterator
from typing import Any

from pipeline.context import Context
from pipeline.engines import vllm
from pipeline.policy import check_folder
from pipeline.scorers.user import source_hash
from pipeline.stage import Outcome
from pipeline.stages import evaluate, generate, grade, ingest, logprobs, score, train
from pipeline.store import Partition
from schemas.recipe import Suite
from schemas.scorers import UserScorer


def score_round(ctx: Context, round: int, *, again: bool = False) -> list[Outcome]:
    """Verdicts on the round's rollouts and on the traces that are there (grading wants every teacher's). again: see score.run."""
    return score.run(ctx, judged_in(ctx, round), again=again)


def judged_in(ctx: Context, round: int) -> list[tuple[str, Partition]]:
    """The partitions that a round's verdicts are on, with their kind."""
    traces = [ctx.part("traces", teacher=t.name) for t in ctx.recipe.teachers]
    found = [("trace", part) for part in traces if part.manifest() is not None]
    return [("rollout", ctx.part("rollouts", round=round)), *found]


def refresh(ctx: Context, round: int, *, regenerate: bool = False, reference: Callable | None = None) -> Iterator[Outcome]:
    """On-policy refresh: rollouts, verdicts, grades and shards for the round that samples the newest checkpoint."""
    while True:
        *told, drawn = generate.rollouts(ctx, round, regenerate=regenerate, reference=reference)
        yield from (*told, drawn)
        scored = score_round(ctx, round)
        yield from scored
        if ctx.recipe.rollouts.sequential is None or (drawn.added == 0 and scored[0].action == "nothing"):
            break  # else new verdicts may ask for more draws
    yield from grade.run(ctx, round)


def run_all(ctx: Context, trainer: Any, *, regenerate: bool = False, reference: Callable | None = None) -> Iterator[Outcome]:
    """All stages, all rounds; what is there already under the same fingerprint is passed over."""
    refuse_missing_files(ctx)  # a run must not pay for teachers and rollouts first
    yield ingest.run(ctx)
    yield from generate.teachers(ctx, regenerate=regenerate)
    if ctx.recipe.eval.suites:
        yield from evaluate.run(ctx, 0, 0, regenerate=regenerate, reference=reference)
    for round in range(ctx.recipe.rounds):
        yield from refresh(ctx, round, regenerate=regenerate, reference=reference)
        vllm.shut_down()  # its memory is the trainer's now
        yield from train.run(ctx, round, trainer, regenerate=regenerate, empty_ok=True)
        if due := due_for_eval(ctx, round):
            step = final_step(ctx, round)
            yield from evaluate.run(ctx, round, step, suites=due, regenerate=regenerate, reference=reference)


def refuse_missing_files(ctx: Context) -> None:
    """UserError for a policy, a verifier's file or a query that the recipe names and that is not there."""
    check_folder(ctx.recipe.policy.model)
    if "teacher" in ctx.recipe.train.method.loss.logprob_roles:
        logprobs.distilled(ctx)
    for verifier in ctx.recipe.score.verifiers.values():
        if isinstance(verifier, UserScorer):
            source_hash(verifier)
    grade.query_text(ctx.recipe.grade.query, "grade")
    grade.curriculum_text(ctx.recipe.grade.curriculum)
    grade.query_text(ctx.recipe.train.method.query, "route")
    grade.adjust_texts(ctx.recipe.train.method)


def due_for_eval(ctx: Context, round: int) -> list[Suite]:
    """What `run` evaluates after this round: every suite after the last, and before it each by its `every_rounds`."""
    e = ctx.recipe.eval
    last = round == ctx.recipe.rounds - 1
    every = [e.every_rounds if s.every_rounds is None else s.every_rounds for s in e.suites]
    return [s for s, n in zip(e.suites, every, strict=True) if last or (n > 0 and (round + 1) % n == 0)]


def final_step(ctx: Context, round: int) -> int:
    """Updates done when a round ended."""
    end = ctx.round_end(round)
    assert end is not None
    return int(end.facts["steps"])
