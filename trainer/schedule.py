"""The plan of a round: which prompts, teachers and rows each optimizer step takes.

One idea: the plan is a pure function of (shards, settings, seed, round). Every choice is a hash of what it is about, so
nothing has to be remembered between steps: whoever resumes computes the plan again and goes on at the step's number.

    visits   Gated prompts in a seeded order, anew each epoch; a step takes the next prompts_per_step of them. A Hard
             prompt's visit draws a teacher uniformly among those with a trace of it, then one of its traces uniformly.
             A Mid prompt's visit is its whole group.
    joint    One update a step, Hard and Mid visits together (DYPO Eq. 4).
    queues   Visits enter two FIFO queues (ALGORITHMS 7.2, 7.3 rows 10, 12, 13). queues.sft Hard visits waiting: one SFT
             update of exactly so many, at most one a step and before the RL update. queues.groups Mid visits waiting:
             one RL update of all of them. A Mid visit may wait one step; when it would be trained two or more steps
             after its draw it is dropped. Queues begin empty in each round, since their rows belong to the round; with
             queues.flush the round's last step takes up to queues.sft of the Hard visits that still wait.

Left out: batches, tensors, and any look at how training goes.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import pyarrow as pa

from schemas.ids import seed_from
from schemas.methods import Queues
from schemas.recipe import Train
from trainer.rows import Key

MAX_WAIT = 1  # steps that a Mid visit may wait in its queue


@dataclass(frozen=True)
class Visit:
    """One prompt drawn once for one route: a trace of one teacher (sft) or the whole group (rl)."""

    prompt_id: str
    route: Literal["sft", "rl"]
    teacher: str | None
    items: tuple[Key, ...]
    drawn: int  # the step that drew it


@dataclass(frozen=True)
class Update:
    """One call of one optimizer, `main` or `sft`, on these visits. `prompts` is n of the mixture."""

    optimizer: Literal["main", "sft"]
    visits: tuple[Visit, ...]
    prompts: int


@dataclass(frozen=True)
class Cursor:
    """Where the plan stands after a step, for inspection; resuming needs only the step's number."""

    epoch: int = 0
    prompts_drawn: int = 0
    hard_trained: int = 0
    mid_trained: int = 0
    hard_waiting: int = 0
    mid_waiting: int = 0
    mid_dropped: int = 0


@dataclass(frozen=True)
class Step:
    """The updates of one step, in order; none while the queues fill."""

    index: int
    updates: tuple[Update, ...]
    dropped: tuple[Visit, ...] = ()
    cursor: Cursor = Cursor()


@dataclass
class _Prompt:
    """What the shards hold for one prompt."""

    traces: dict[str, list[str]] = field(default_factory=dict)  # teacher -> item ids
    group: list[tuple[int, str]] = field(default_factory=list)  # (sample, item id)


def plan_round(shards: pa.Table, train: Train, *, seed: int, round: int) -> list[Step]:
    """The steps of a round; an empty list if the shards hold no prompt. The order of the shards' rows does not matter."""
    prompts = _prompts(shards)
    if not prompts:
        return []
    size = min(
        train.prompts_per_step, len(prompts)
    )  # a shard shorter than a step is visited once; a step across two epochs may hold a prompt twice
    draws = _draws(prompts, seed=seed, round=round)
    queues, optimizer = train.method.queues, train.method.stage(round, round + 1).optimizer
    hard: deque[Visit] = deque()
    mid: deque[Visit] = deque()
    steps: list[Step] = []
    cursor = Cursor()
    for index in range(train.steps):
        drawn = [(epoch, p) for epoch, p in islice(draws, size)]
        visits = [v for epoch, p in drawn for v in _visits(p, prompts[p], index, seed=seed, round=round, epoch=epoch)]
        if queues is None:
            updates, dropped = [Update(optimizer, tuple(visits), len(drawn))], []
        else:
            hard.extend(v for v in visits if v.route == "sft")
            mid.extend(v for v in visits if v.route == "rl")
            dropped = [mid.popleft() for _ in range(sum(index - v.drawn > MAX_WAIT for v in mid))]
            updates = list(_pops(hard, mid, queues, last=index == train.steps - 1))
        trained = [v.route for u in updates for v in u.visits]
        cursor = Cursor(
            epoch=drawn[-1][0],
            prompts_drawn=cursor.prompts_drawn + len(drawn),
            hard_trained=cursor.hard_trained + trained.count("sft"),
            mid_trained=cursor.mid_trained + trained.count("rl"),
            hard_waiting=len(hard),
            mid_waiting=len(mid),
            mid_dropped=cursor.mid_dropped + len(dropped),
        )
        steps.append(Step(index, tuple(updates), tuple(dropped), cursor))
    return steps


def first_epoch(shards: pa.Table, *, seed: int, round: int) -> list[Visit]:
    """Every prompt's visits in the order of the round's first epoch, as one joint step would draw them."""
    prompts = _prompts(shards)
    order = islice(_draws(prompts, seed=seed, round=round), len(prompts)) if prompts else ()
    return [v for epoch, p in order for v in _visits(p, prompts[p], 0, seed=seed, round=round, epoch=epoch)]


def _prompts(shards: pa.Table) -> dict[str, _Prompt]:
    """What there is to draw from, in an order that does not depend on the table's."""
    names = ("prompt_id", "route", "teacher", "sample", "item_id")
    found: dict[str, _Prompt] = {}
    for prompt_id, route, teacher, sample, item in sorted(
        zip(*(shards[n].to_pylist() for n in names), strict=True), key=lambda row: (*row[:2], row[2] or "", *row[3:])
    ):
        prompt = found.setdefault(prompt_id, _Prompt())
        if route == "rl":
            prompt.group.append((sample, item))
        else:
            prompt.traces.setdefault(teacher, []).append(item)
    return found


def _draws(prompts: dict[str, _Prompt], *, seed: int, round: int) -> Iterator[tuple[int, str]]:
    """(epoch, prompt_id) for ever: each epoch holds every prompt once, ordered by a hash."""
    epoch = 0
    while True:
        for prompt_id in sorted(prompts, key=lambda p: seed_from("order", seed, round, epoch, p)):
            yield epoch, prompt_id
        epoch += 1


def _visits(prompt_id: str, prompt: _Prompt, step: int, *, seed: int, round: int, epoch: int) -> Iterator[Visit]:
    if prompt.traces:
        teachers = sorted(prompt.traces)
        teacher = teachers[seed_from("teacher", seed, round, epoch, prompt_id) % len(teachers)]
        traces = prompt.traces[teacher]
        item = traces[seed_from("trace", seed, round, epoch, prompt_id) % len(traces)]
        yield Visit(prompt_id, "sft", teacher, (("sft", item),), step)
    if prompt.group:
        yield Visit(prompt_id, "rl", None, tuple(("rl", item) for _, item in prompt.group), step)


def _pops(hard: deque[Visit], mid: deque[Visit], queues: Queues, *, last: bool) -> Iterator[Update]:
    if len(hard) >= queues.sft or (last and queues.flush and hard):
        visits = tuple(hard.popleft() for _ in range(min(queues.sft, len(hard))))
        yield Update("sft", visits, len(visits))
    if len(mid) >= queues.groups:
        visits = tuple(mid)
        mid.clear()
        yield Update("main", visits, len(visits))
