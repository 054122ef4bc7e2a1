"""Verdicts from a pool of processes: a stuck or crashing verdict costs that verdict, and nothing else.

Items travel in chunks, and a worker marks the item it is at. What a limit of its own ended (the memory; for `math`, which runs in
one thread, the processor's time) is recorded as `error` or `timeout` at once: it would end so again. What may be chance (a crash;
wall-clock time, which the machine's load shares) is tried once more, alone, and then recorded. The rest of its chunk goes on.

What is left out: a user's function that starts processes of its own has to end them itself.
"""

import contextlib
import os
import resource
import signal
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from pebble import ProcessExpired, ProcessPool

from pipeline.scorers import dispatch, user
from pipeline.scorers.base import Item, Verdict, error, unparseable
from pipeline.scorers.clean_fork import CleanForkContext, end_with_the_parent
from schemas.errors import UserError, WorkError
from schemas.scorers import GymScorer, MathScorer, ScorerConfig, UserScorer

CHUNK = 64
CHUNK_CHARS = 1_000_000
TEXT_CHARS = 1_000_000  # a longer text is not sent to any worker
TASKS_PER_WORKER = 500  # chunks; then a fresh worker, so that what sympy caches does not add up
START_S = 120.0  # a worker's imports, a user's module among them
BUSY = 10  # times the limit in wall-clock time for what has a clock of processor time: a busy machine is not its fault
BREAKDOWNS = 5  # in a row, without one verdict in between

_OUT_OF_MEMORY = 71  # exit codes of our own
_LEFT_QUIETLY = 70


@dataclass(frozen=True, slots=True)
class _Job:
    """Positions in the work list that travel together; `last`: one item's second try. `mark`: the file that says where it is."""

    positions: tuple[int, ...]
    last: bool = False
    mark: Path | None = None


class VerdictPool:
    """`with VerdictPool(verifiers, workers=2, timeout_s=10, memory_mb=2048) as pool: pool.score(items)`.

    `memory_mb` is what a verdict may allocate beyond what a fresh worker holds. A relative path of
    a user's function starts at `root` (the recipe's folder), by default at the working directory.
    Entering starts the workers and loads the users' functions: a missing file or function, or a
    signature that is neither TRL's nor verl's, is a UserError there, before any work.
    """

    def __init__(
        self,
        verifiers: Mapping[str, ScorerConfig],
        *,
        workers: int,
        timeout_s: float,
        memory_mb: int | None,
        root: Path | None = None,
    ) -> None:
        if workers < 1:
            raise UserError(f"workers: wants at least 1, found {workers}")
        if not timeout_s > 0:
            raise UserError(f"timeout_s: wants more than 0, found {timeout_s}")
        self.verifiers = {name: _absolute(each, root) for name, each in verifiers.items()}
        self.workers = workers
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self._context: CleanForkContext | None = None
        self._pool: ProcessPool | None = None
        self._marks: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "VerdictPool":
        for config in self.verifiers.values():
            if isinstance(config, UserScorer):
                user.source_hash(config)  # a missing file needs no worker to be found
        try:
            self._start()
            self._check_workers()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def score(self, items: Sequence[Item]) -> list[Verdict]:
        """A verdict for each item, in the items' order."""
        if self._pool is None:
            raise RuntimeError("VerdictPool is a context manager: use it in a with statement")
        for item in items:
            if item.verifier not in self.verifiers:
                known = ", ".join(sorted(self.verifiers)) or "none"
                raise UserError(
                    f"{item.id}: its verifier {item.verifier!r} is not in the recipe; [score.verifiers] has: {known}"
                )
        return _Round(self, items).run()

    def _start(self) -> None:
        self._marks = tempfile.TemporaryDirectory(prefix="dypo-score-")
        self._context = CleanForkContext(_modules(self.verifiers))
        self._pool = self._workers(self.workers, self.verifiers, self.memory_mb)

    def _workers(self, count: int, verifiers: Mapping[str, ScorerConfig], memory_mb: int | None) -> ProcessPool:
        assert self._context is not None
        return ProcessPool(
            max_workers=count,
            max_tasks=TASKS_PER_WORKER,
            initializer=_begin_worker,
            initargs=(verifiers, memory_mb),
            context=self._context,
        )

    def _stop(self) -> None:
        pool, self._pool = self._pool, None
        context, self._context = self._context, None
        marks, self._marks = self._marks, None
        if pool is not None:
            pool.stop()
            pool.join()
        if context is not None:
            context.stop()
        if marks is not None:
            marks.cleanup()

    def _check_workers(self) -> None:
        assert self._pool is not None
        users = [each.function for each in self.verifiers.values() if isinstance(each, UserScorer)]
        if users:
            # A file that ends its process is imported in a task first: in the initializer it would be started for ever.
            others = {name: each for name, each in self.verifiers.items() if not isinstance(each, UserScorer)}
            alone = self._workers(1, others, None)
            try:
                self._check(alone, UserError, "importing the file of a user function", ", ".join(users))
            finally:
                alone.stop()
                alone.join()
        advice = f"if memory is short, raise memory_mb (now {self.memory_mb})"
        self._check(self._pool, WorkError, "starting a scoring worker", advice)

    def _check(self, pool: ProcessPool, kind: type[UserError] | type[WorkError], what: str, more: str) -> None:
        try:
            problems = pool.schedule(_load_problems, args=[self.verifiers]).result(timeout=START_S)
        except TimeoutError as reason:
            raise kind(f"{what} took longer than {START_S:g} s: {more}") from reason
        except (ProcessExpired, BrokenProcessPool, RuntimeError) as reason:
            raise kind(f"{what} ended the process: {more}") from reason
        if problems:
            raise UserError("\n".join(problems))

    def _restart(self) -> None:
        self._stop()
        self._start()


class _Round:
    """One call of `score`: what is queued, what is in flight, what is decided."""

    def __init__(self, pool: VerdictPool, items: Sequence[Item]) -> None:
        self.pool = pool
        self.items = items
        self.verdicts: list[Verdict | None] = [decided_unread(item) for item in items]
        self.queue: deque[_Job] = deque(_chunked(items, self.verdicts))
        self.in_flight: dict[Future[list[Verdict]], _Job] = {}
        self.breakdowns = 0
        # A worker leaves a chunk after half the limit, so what runs longer than one and a half has an item that hangs.
        self.budget_s = pool.timeout_s / 2
        self.chunk_timeout_s = pool.timeout_s * 1.5
        self.begun = 0

    def run(self) -> list[Verdict]:
        while self.queue or self.in_flight:
            self._fill()
            done, _ = wait(
                self.in_flight,
                timeout=self.chunk_timeout_s * BUSY + START_S,
                return_when=FIRST_COMPLETED,
            )
            if not done:  # a worker died between taking a task and saying so: pebble would wait for ever
                self._break_down("a scoring worker was lost")
            for future in done:
                if future in self.in_flight:
                    self._take(future)
        return [verdict for verdict in self.verdicts if verdict is not None]

    def _fill(self) -> None:
        # A few at a time: an interrupted run has little to call off.
        while self.queue and len(self.in_flight) < 2 * self.pool.workers:
            job = self.queue.popleft()
            batch = [self.items[position] for position in job.positions]
            assert self.pool._pool is not None
            assert self.pool._marks is not None
            self.begun += 1
            job = replace(job, mark=Path(self.pool._marks.name, f"{id(self)}-{self.begun}"))
            limit = self.pool.timeout_s if job.last else self.chunk_timeout_s
            if all(self._has_a_clock(position) for position in job.positions):
                limit *= BUSY
            try:
                future = self.pool._pool.schedule(
                    _score_batch, args=(batch, self.budget_s, self.pool.timeout_s, str(job.mark)), timeout=limit
                )
            except RuntimeError as reason:
                self.queue.appendleft(job)
                self._break_down(str(reason))
                continue
            self.in_flight[future] = job

    def _has_a_clock(self, position: int) -> bool:
        return isinstance(self.pool.verifiers[self.items[position].verifier], MathScorer)

    def _take(self, future: Future[list[Verdict]]) -> None:
        job = self.in_flight.pop(future)
        late = Verdict(
            "timeout", detail=f"no verdict within {self.pool.timeout_s:g} s", elapsed_ms=self.pool.timeout_s * 1000
        )
        try:
            verdicts = future.result()
        except TimeoutError:
            self._failed(job, late)
        except ProcessExpired as ended:
            out_of_time, out_of_memory = ended.exitcode == -signal.SIGPROF, ended.exitcode == _OUT_OF_MEMORY
            verdict = late if out_of_time else error(_obituary(ended.exitcode, self.pool.memory_mb))
            self._failed(job, verdict, certain=out_of_time or out_of_memory)
        except (BrokenProcessPool, RuntimeError) as reason:
            self.in_flight[future] = job
            self._break_down(str(reason))
        except Exception as reason:  # the item could not be sent: it holds something that has no pickle
            self._failed(job, error(f"{type(reason).__name__}: {reason}"[:500]))
        else:
            self.breakdowns = 0
            self._record(job, verdicts)
        if job.mark is not None:
            job.mark.unlink(missing_ok=True)

    def _record(self, job: _Job, verdicts: list[Verdict]) -> None:
        slow = []
        for position, verdict in zip(job.positions, verdicts, strict=False):
            if verdict.elapsed_ms > self.pool.timeout_s * 1000 and not job.last and not self._has_a_clock(position):
                slow.append(_Job((position,), last=True))  # the limit is the same in a chunk as alone
            else:
                self.verdicts[position] = verdict
        self.queue.extendleft(slow)
        if rest := job.positions[len(verdicts) :]:
            self.queue.appendleft(_Job(rest))

    def _failed(self, job: _Job, verdict: Verdict, *, certain: bool = False) -> None:
        """The item that the worker was at has failed, in a way that is certain to repeat or not; the others are to be judged."""
        at = _marked(job)
        if at is None:  # it had not begun, or cannot say: each on its own
            self.queue.extendleft(_Job((position,)) for position in reversed(job.positions))
        elif certain or job.last:
            self.verdicts[job.positions[at]] = verdict
        else:
            self.queue.appendleft(_Job((job.positions[at],), last=True))
        if at is not None:
            self.queue.extendleft(_Job(rest) for rest in (job.positions[at + 1 :], job.positions[:at]) if rest)

    def _break_down(self, reason: str) -> None:
        """The pool itself is unusable: begin a new one, and run what was in flight item by item."""
        self.breakdowns += 1
        if self.breakdowns > BREAKDOWNS:
            raise WorkError(
                f"the scoring workers keep dying ({reason}); if memory is short, lower the number of workers"
                f" or raise memory_mb (now {self.pool.memory_mb})"
            )
        jobs = list(self.in_flight.values())
        self.in_flight.clear()
        for job in jobs:
            self._failed(job, error(f"the scoring pool broke down: {reason}"))
        self.pool._restart()


def _marked(job: _Job) -> int | None:
    """Which of the job's items its worker is, or was, at."""
    if len(job.positions) == 1:
        return 0
    try:
        return int(job.mark.read_bytes()) if job.mark is not None else None
    except (OSError, ValueError):
        return None


def _absolute(config: ScorerConfig, root: Path | None) -> ScorerConfig:
    if not isinstance(config, UserScorer):
        return config
    path, _, name = config.function.rpartition(":")
    found = ((root or Path.cwd()) / Path(path).expanduser()).absolute()
    return config.model_copy(update={"function": f"{found}:{name}"})


def decided_unread(item: Item) -> Verdict | None:
    """The verdict on an item that no verifier is to see."""
    if item.finish_reason == "length":
        return Verdict("truncated", detail="generation stopped at its length limit")
    if len(item.text) > TEXT_CHARS:
        return unparseable(f"the text has {len(item.text)} characters, more than {TEXT_CHARS}")
    return None


def _chunked(items: Sequence[Item], verdicts: Sequence[Verdict | None]) -> list[_Job]:
    jobs: list[_Job] = []
    chunk: list[int] = []
    chars = 0
    for position, item in enumerate(items):
        if verdicts[position] is not None:
            continue
        if chunk and (len(chunk) == CHUNK or chars + len(item.text) > CHUNK_CHARS):
            jobs.append(_Job(tuple(chunk)))
            chunk, chars = [], 0
        chunk.append(position)
        chars += len(item.text)
    if chunk:
        jobs.append(_Job(tuple(chunk)))
    return jobs


def _obituary(code: int | None, memory_mb: int | None) -> str:
    if code == _OUT_OF_MEMORY:
        return f"out of memory: more than memory_mb = {memory_mb} for one verdict"
    if code is not None and code < 0:
        try:
            return f"the worker was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"the worker was killed by signal {-code}"
    return f"the worker ended with exit code {0 if code == _LEFT_QUIETLY else code}"


def _modules(verifiers: Mapping[str, ScorerConfig]) -> list[str]:
    modules = ["pipeline.scorers.pool"]
    if any(isinstance(config, MathScorer) for config in verifiers.values()):
        modules.append("pipeline.scorers.warm_math")
    if any(isinstance(config, GymScorer) for config in verifiers.values()):
        modules.append("reasoning_gym")
    return modules


# What follows runs in a worker.

_verifiers: dict[str, ScorerConfig] = {}


def _begin_worker(verifiers: dict[str, ScorerConfig], memory_mb: int | None) -> None:
    end_with_the_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Python's handler would wait for a C call that never ends
    os.dup2(2, 1)  # what a user's function prints must not end up in the command's own output
    warnings.simplefilter("ignore")
    _verifiers.update(verifiers)
    for module in _modules(verifiers):
        __import__(module)
    for config in verifiers.values():
        if isinstance(config, UserScorer):
            with contextlib.suppress(UserError):  # _load_problems says it
                user.load(config)
    if memory_mb is not None:
        limit = _mapped_bytes() + memory_mb * 2**20
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _mapped_bytes() -> int:
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 2**30  # no /proc: a generous guess at a fresh worker


def _load_problems(verifiers: dict[str, ScorerConfig]) -> list[str]:
    problems = []
    for config in verifiers.values():
        if isinstance(config, UserScorer):
            try:
                user.load(config)
            except UserError as reason:
                problems.append(str(reason))
    return problems


def _score_batch(items: list[Item], budget_s: float, timeout_s: float, mark: str) -> list[Verdict]:
    """Verdicts for the first of these items, as many as the budget allows, at least one."""
    leave = os._exit

    def leave_visibly(code: int) -> Any:
        leave(code or _LEFT_QUIETLY)  # a worker that ends with 0 amid a task would count as recycled

    os._exit = leave_visibly
    until = time.perf_counter() + budget_s
    verdicts: list[Verdict] = []
    place = os.open(mark, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        for at, item in enumerate(items):
            os.pwrite(place, b"%06d" % at, 0)
            verdicts.append(_score_in_time(item, timeout_s))
            if time.perf_counter() > until:
                break
    except MemoryError:
        leave(_OUT_OF_MEMORY)
    finally:
        os._exit = leave
        os.close(place)
    return verdicts


def _score_in_time(item: Item, timeout_s: float) -> Verdict:
    """For `math`, with a clock of processor time that ends the process, whatever sympy is doing."""
    config = _verifiers[item.verifier]
    if not isinstance(config, MathScorer):
        return dispatch.score_item(config, item)
    signal.setitimer(signal.ITIMER_PROF, timeout_s)
    try:
        return dispatch.score_item(config, item)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
