"""`dypo study`: reads the file, works it off, tells how it goes, writes the report. The parts are the other files here."""

import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from pipeline.store import lock, publish
from pipeline.study import layout, schedule
from pipeline.study.layout import Cell, Plan, Stem
from pipeline.study.schedule import Task
from schemas.errors import Reported, UserError


def study(file: Path, processes: int, only: str | None, plan_only: bool, report_only: bool, as_json: bool) -> None:
    """The whole command. Reported(1) if a run failed, after everything else has been done."""
    if plan_only and report_only:
        raise UserError("--plan and --report exclude each other")
    plan = layout.read(file)
    todo = schedule.tasks(plan, only)
    if plan_only or report_only:
        schedule.look(plan, todo)
        return _show(plan, todo, as_json) if plan_only else _report(plan, todo, as_json)
    with lock(plan.folder):
        schedule.look(plan, todo)
        schedule.run(plan, todo, processes, Teller(todo, processes, as_json))
        _report(plan, todo, as_json)
    if failed := [t for t in todo if t.state in ("failed", "waits")]:
        print(
            f"{len(failed)} of {len(todo)} runs failed or wait for one that did; the same command tries them again",
            file=sys.stderr,
        )
        raise Reported(1)


class Teller:
    """One line for each run that ended, with what is left and about how long it takes."""

    def __init__(self, todo: list[Task], processes: int, as_json: bool) -> None:
        self.todo, self.processes, self.as_json = todo, processes, as_json
        self.started = time.monotonic()
        due = sum(t.state == "due" for t in todo)
        if not as_json:
            print(f"{len(todo)} runs: {len(todo) - due} finished, {due} to do, {processes} side by side", flush=True)

    def __call__(self, task: Task) -> None:
        if self.as_json:
            return print(
                json.dumps({"run": task.run.label, "state": task.state, "seconds": task.seconds, "why": task.why}),
                flush=True,
            )
        left = sum(t.state in ("due", "running") for t in self.todo)
        ended = [t for t in self.todo if t.seconds > 0]
        rest = (time.monotonic() - self.started) / len(ended) * left if ended else 0.0
        after = f"{left} left, about {rest / 60:.0f} min" if left else "none left"
        why = f": {task.why}" if task.why else ""
        print(f"{task.run.label}: {task.state} in {task.seconds:.0f} s ({after}){why}", flush=True)


def _show(plan: Plan, todo: list[Task], as_json: bool) -> None:
    """What is finished and what is due: by world and method, trials and stems beside them."""
    if as_json:
        for task in todo:
            print(json.dumps({"run": task.run.label, "state": task.state}), flush=True)
        return
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for task in todo:
        run = task.run
        name = (
            "stems" if isinstance(run, Stem) else f"{run.world} {run.method}{' (trials)' if run.trial is not None else ''}"
        )
        counts[name][task.state] += 1
    for name, states in sorted(counts.items()):
        print(f"{name:40s} {states['done']:4d} finished, {states['due']:4d} due", flush=True)
    cells = [t for t in todo if isinstance(t.run, Cell) and t.run.trial is None]
    print(
        f"{sum(t.state == 'done' for t in cells)} of {len(cells)} results; {sum(t.state == 'due' for t in todo)} runs to do",
        flush=True,
    )


def _report(plan: Plan, todo: list[Task], as_json: bool) -> None:
    """Of all results that are there, whatever was asked for this time."""
    from pipeline.study import report

    known = {t.run: t for t in todo}
    rest = [t for t in schedule.tasks(plan) if t.run not in known]
    schedule.look(plan, rest)
    ended = {t.run for t in [*todo, *rest] if t.state == "done"}
    done = [cell for cell in plan.cells() if cell in ended]
    html, text = report.build(plan, done)
    for path, content in ((plan.folder / f"{plan.study.name}.html", html), (plan.folder / f"{plan.study.name}.md", text)):
        publish(path, lambda p, content=content: p.write_text(content, encoding="utf-8"))
        print(json.dumps({"report": str(path)}) if as_json else f"report: {path}", flush=True)
