"""Many runs side by side, each a process of the ordinary command on one thread.

One idea: there is no state of the study's own. What is due follows from the runs' manifests each time, so a study that was
killed at any instant goes on with the same command; the processes that it started go with it, and what they had finished
stays. A run that fails is told with the last lines of its log, what waits for it is passed over, and the rest goes on.
"""

import fnmatch
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.study import cells
from pipeline.study.layout import Cell, Plan, Run
from pipeline.study.tied import TIED
from schemas.errors import DypoError, UserError

POLL_S = 0.05
TOLD_LINES = 8  # of the log of a run that failed


@dataclass
class Task:
    """One run in the order of work. `needs`: what has to be finished before."""

    run: Run
    needs: tuple[Run, ...]
    state: Literal["due", "running", "done", "failed", "waits"] = "due"
    why: str = ""
    seconds: float = 0.0


@dataclass
class Worker:
    """A process at work on a task, and the commands that follow it."""

    task: Task
    process: subprocess.Popen
    rest: Iterator[cells.Command]
    log: Path
    out: Path | None
    started: float


def tasks(plan: Plan, only: str | None = None) -> list[Task]:
    """Everything that the study is made of, in order. `only`: the results whose label fits, and what they need."""
    found: dict[Run, Task] = {}

    def need(run: Run) -> None:
        if run in found:
            return
        needs: tuple[Run, ...] = ()
        if isinstance(run, Cell):
            trials = plan.trials(run.world, run.method) if run.trial is None else []
            needs = (run.stem, *trials)
        for other in needs:
            need(other)
        found[run] = Task(run, needs)

    asked = [c for c in plan.cells() if only is None or fnmatch.fnmatch(c.label, only)]
    if not asked:
        raise UserError(f"{plan.where}: no result's label fits {only!r}; labels look like {next(plan.cells()).label}")
    for cell in asked:
        for trial in plan.trials(cell.world, cell.method):
            need(trial)
    for cell in asked:
        need(cell)
    return list(found.values())


def look(plan: Plan, todo: list[Task]) -> None:
    """Marks what is finished already."""
    for task in todo:
        if cells.finished(plan, task.run):
            task.state = "done"


def run(plan: Plan, todo: list[Task], processes: int, tell: Callable[[Task], None]) -> None:
    """Works the list off, `processes` at a time; `tell` hears of each task that ended."""
    by_run = {task.run: task for task in todo}
    workers: list[Worker] = []
    try:
        while True:
            for task in todo:
                if task.state == "due" and any(by_run[n].state in ("failed", "waits") for n in task.needs):
                    task.state, task.why = "waits", "what it needs failed"
                    tell(task)
            while len(workers) < processes and (task := _next(todo, by_run)):
                _start(plan, task, workers, tell)
            if not workers:
                return
            time.sleep(POLL_S)
            for worker in [w for w in workers if w.process.poll() is not None]:
                workers.remove(worker)
                _ended(plan, worker, workers, tell)
    finally:
        for worker in workers:  # Ctrl-C, or a defect of ours
            worker.process.terminate()
        for worker in workers:
            worker.process.wait()


def _next(todo: list[Task], by_run: dict[Run, Task]) -> Task | None:
    return next((t for t in todo if t.state == "due" and all(by_run[n].state == "done" for n in t.needs)), None)


def _start(plan: Plan, task: Task, workers: list[Worker], tell: Callable[[Task], None]) -> None:
    task.state = "running"
    log = plan.folder / "logs" / f"{task.run.label}.log"
    try:
        trial = cells.chosen(plan, task.run) if isinstance(task.run, Cell) else None
        cells.begin(plan, task.run, trial)
        rest = cells.commands(plan, task.run, trial)
        _go_on(plan, task, rest, log, workers, time.monotonic(), tell)
    except DypoError as e:
        task.state, task.why = "failed", str(e)
        tell(task)


def _go_on(
    plan: Plan,
    task: Task,
    rest: Iterator[cells.Command],
    log: Path,
    workers: list[Worker],
    started: float,
    tell: Callable[[Task], None],
) -> None:
    """The task's next command, or its end."""
    command = next(rest, None)
    if command is None:
        task.state, task.seconds = "done", time.monotonic() - started
        return tell(task)
    target = log if command.out is None else _partial(command.out)
    for path in (log, target):
        path.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as told, open(target, "a" if target == log else "w") as out:
        told.write(f"$ dypo {' '.join(command.words)}\n")
        told.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *command.words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=told,
            env={**os.environ, "OMP_NUM_THREADS": "1", TIED: str(os.getpid())},
        )
    workers.append(Worker(task, process, rest, log, command.out, started))


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _ended(plan: Plan, worker: Worker, workers: list[Worker], tell: Callable[[Task], None]) -> None:
    task = worker.task
    if worker.process.returncode != 0:
        lines = worker.log.read_text(errors="replace").splitlines()[-TOLD_LINES:]
        task.state, task.seconds = "failed", time.monotonic() - worker.started
        task.why = "\n".join([f"exit code {worker.process.returncode}; the end of {worker.log}:", *lines])
        return tell(task)
    if worker.out is not None:
        _partial(worker.out).rename(worker.out)
    try:
        _go_on(plan, task, worker.rest, worker.log, workers, worker.started, tell)
    except DypoError as e:
        task.state, task.why = "failed", str(e)
        tell(task)
