"""One run of a study: what it takes from its stem, whether it is finished, and the commands that are left to run.

A run's state is its own manifests and nothing else: finished means that `dypo plan` would have nothing to do. A cell begins
as a copy of its stem by hard links, so that every method reads the very same stored rows of round 0; that is safe because a part
is never written to again (store.py publishes by rename), and manifests are copied.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.context import Context, resolved
from pipeline.flow import final_step, refuse_missing_files
from pipeline.plan import plan as partitions_due
from pipeline.stage import Spec, current
from pipeline.stages import evaluate, generate, ingest, score
from pipeline.store import Partition, publish, read_parts
from pipeline.study.layout import Cell, Plan, Run, Stem
from schemas.errors import UserError
from schemas.recipe import Suite


@dataclass(frozen=True)
class Command:
    """Words for `dypo`. `out`: the file that its standard output becomes, if it ends well; else it is a log's."""

    words: tuple[str, ...]
    out: Path | None = None


# ---------------------------------------------------------------- what is there
def finished(plan: Plan, run: Run) -> bool:
    """Whether nothing is left to do for a run, by its manifests under the recipe that the study gives it today."""
    if isinstance(run, Stem):
        return next(commands(plan, run), None) is None
    trial = chosen(plan, run)
    return trial is not None and next(commands(plan, run, trial), None) is None


def whole(ctx: Context) -> bool:
    """Whether `dypo run` would find nothing to do. A run that cannot be read is not whole; its own command says why."""
    try:
        return (ctx.run / "recipe.toml").exists() and all(p.state == "done" for p in partitions_due(ctx))
    except UserError:
        return False


def chosen(plan: Plan, cell: Cell) -> int | None:
    """The number of the trial whose setting a cell takes; None while its trials are not finished."""
    trials = [] if cell.trial is not None else plan.trials(cell.world, cell.method)
    if not trials:
        return cell.trial or 0
    return best([validation(plan, trial) for trial in trials])


def best(values: Sequence[float | None]) -> int | None:
    """Which trial is chosen: the best, of equals the first; None while one is not finished."""
    return None if None in values else max(range(len(values)), key=lambda n: (values[n], -n), default=None)


def validation(plan: Plan, trial: Cell) -> float | None:
    """What a finished trial is judged by: avg@n on the tuning suite after the last round; None while it is not finished."""
    if trial not in plan.reached:
        ctx = plan.context(trial)
        if not whole(ctx):
            return None
        last, (suite,) = ctx.recipe.rounds - 1, ctx.recipe.eval.suites
        part = ctx.part("evals", round=last, step=final_step(ctx, last), suite=suite.name)
        rows = read_parts(part.files(), "evals", ["metric", "value"]).to_pylist()
        plan.reached[trial] = next(float(row["value"]) for row in rows if row["metric"] == f"avg@{suite.n}")
    return plan.reached[trial]


# ---------------------------------------------------------------- what is to do
def commands(plan: Plan, run: Run, trial: int | None = None) -> Iterator[Command]:
    """The dypo commands that are left, each to be run before the next is asked for. Writes nothing by itself."""
    ctx = plan.context(run, trial)
    recipe = str(recipe_path(plan, run))
    if isinstance(run, Stem):
        for n in range(len(_stem_stages(ctx))):
            words, specs = _stem_stages(ctx)[n]  # anew: what is there has changed
            if not all(_made(make) for make in specs):
                yield Command((words[0], recipe, *words[1:]))
        return
    if not whole(ctx):
        yield Command(("run", recipe))
    budget = plan.world(run.world).rollout_tokens
    if run.trial is None and budget is not None:
        round, step = within(ctx, budget)
        if not all(_made(make) for suite in ctx.recipe.eval.suites for make in _evals(ctx, suite, round, step)):
            yield Command(("eval", recipe, "--round", str(round), "--step", str(step)))
    probe = plan.study.probe
    if probe is not None and run.trial is None and (run.method, run.seed) == (probe.method, probe.seed):
        for round in probe.rounds:
            if _probed(ctx, out := probe_path(plan, run, round), round) is None:
                yield Command(("probe", "variance", str(ctx.run), "--round", str(round), "--json"), out)


def probe_path(plan: Plan, cell: Cell, round: int) -> Path:
    """Where a measurement of a cell's gradients lies."""
    return plan.folder / "probes" / cell.world / cell.base / f"{cell.method}-{cell.seed}-round-{round}.json"


def _probed(ctx: Context, path: Path, round: int) -> dict[str, Any] | None:
    """The measurement, if there is one of the policy that the run's round sampled."""
    found = json.loads(path.read_text()) if path.exists() else None
    return found if found is not None and found["policy"] == ctx.policy_of(round)[1] else None


def probes(plan: Plan, cell: Cell) -> list[dict[str, Any]]:
    """A finished cell's measurements, those that were asked for and are there."""
    ctx, rounds = plan.context(cell), plan.study.probe.rounds if plan.study.probe else []
    found = [_probed(ctx, probe_path(plan, cell, round), round) for round in rounds]
    return [f for f in found if f is not None]


def _stem_stages(ctx: Context) -> list[tuple[list[str], list[Callable[[], Spec]]]]:
    """The stages that no method has a part in, with what each makes."""
    teachers, rollouts = ctx.recipe.teachers, ctx.part("rollouts", round=0)
    traces = [ctx.part("traces", teacher=t.name) for t in teachers]
    return [
        (["ingest"], [lambda: ingest.spec(ctx)]),
        (
            ["generate"],
            [lambda: generate.rollout_spec(ctx, 0), *(lambda t=t: generate.teacher_spec(ctx, t) for t in teachers)],
        ),
        (
            ["score"],
            [lambda: score.spec(ctx, "rollout", rollouts), *(lambda p=p: score.spec(ctx, "trace", p) for p in traces)],
        ),
        (["eval", "--round", "0", "--step", "0"], [s for suite in ctx.recipe.eval.suites for s in _evals(ctx, suite, 0, 0)]),
    ]


def _evals(ctx: Context, suite: Suite, round: int, step: int) -> list[Callable[[], Spec]]:
    keys = {"round": round, "step": step, "suite": suite.name}
    if ctx.part("scores", kind="eval", **keys).manifest() is None:
        return [lambda: evaluate.sample_spec(ctx, suite, round, step), _nothing_yet]
    return [lambda: evaluate.sample_spec(ctx, suite, round, step), lambda: evaluate.spec(ctx, suite, round, step)]


def _nothing_yet() -> Spec:
    raise UserError("no verdicts")


def _made(make: Callable[[], Spec]) -> bool:
    try:
        return current(make())
    except UserError:
        return False  # what it is made of is not there


def within(ctx: Context, budget: int) -> tuple[int, int]:
    """(round, step) of the newest end of a round at which a finished run had generated no more rollout tokens than this."""
    found, spent = (0, 0), 0
    for round in range(ctx.trained_rounds()):
        part = ctx.part("rollouts", round=round)
        spent += sum(read_parts(part.files(), "rollouts", ["length"]).column("length").to_pylist())
        if spent > budget:
            break
        found = (round, final_step(ctx, round))
    return found


# ---------------------------------------------------------------- how it begins
def recipe_path(plan: Plan, run: Run) -> Path:
    """The file that a run's commands are given."""
    return plan.folder / "recipes" / f"{run.label}.toml"


def begin(plan: Plan, run: Run, trial: int | None = None) -> None:
    """Writes the run's recipe; a cell that is not there yet begins as a copy of its stem."""
    ctx = plan.context(run, trial)
    refuse_missing_files(ctx)
    path, text = recipe_path(plan, run), resolved(ctx)
    if not path.exists() or path.read_text() != text:
        publish(path, lambda p: p.write_text(text))
    if isinstance(run, Cell) and not ctx.run.exists():
        _copy(plan.context(run.stem), ctx)


def _copy(stem: Context, cell: Context) -> None:
    """What a cell has in common with its stem, under a temporary name and then renamed as a whole."""
    new = cell.run.with_name(f".{cell.run.name}.tmp")
    if new.exists():
        shutil.rmtree(new)
    for part in _common(stem, cell):
        folder = new / part.label
        folder.mkdir(parents=True)
        for path in part.files():
            _link(path, folder / path.name)
        shutil.copy2(part.folder / "manifest.json", folder)  # last: a partition without it counts as unfinished
    new.rename(cell.run)


def _common(stem: Context, cell: Context) -> Iterator[Partition]:
    """The stem's partitions that a stage of the cell would make alike."""
    yield stem.part("prompts")
    for teacher in cell.recipe.teachers:
        if current_in(stem, generate.teacher_spec(stem, teacher)):
            yield stem.part("traces", teacher=teacher.name)
            yield stem.part("scores", kind="trace", teacher=teacher.name)
    if stem.recipe.rollouts == cell.recipe.rollouts and cell.recipe.train.method.routing(0).rl:
        yield stem.part("rollouts", round=0)
        yield stem.part("scores", kind="rollout", round=0)
    for suite in cell.recipe.eval.suites:
        if suite in stem.recipe.eval.suites:
            keys = {"round": 0, "step": 0, "suite": suite.name}
            yield stem.part("eval_rollouts", **keys)
            yield stem.part("scores", kind="eval", **keys)
            yield stem.part("evals", **keys)


def current_in(stem: Context, spec: Spec) -> bool:
    """Whether the stem's partition is what this spec would make."""
    manifest = stem.part(spec.partition.table, **dict(spec.partition.keys)).manifest()
    return manifest is not None and manifest.fingerprint == spec.fingerprint


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
