"""What a step of training is made of: derived from the recipe and the shards, for `dypo plan`.

One idea: a user sets a token budget, and everything else follows by arithmetic, so it can be told before anything runs.
Slots are counted in the newest shards (sql/plan/slots.sql), as packed rows hold them; before there are any, they are what the
recipe's limits allow. Left out: models whose rows cannot be packed, which only loading one shows; memory (memory.py).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.context import Context
from pipeline.memory import Group, memory, model_or_why, trained_parameters
from pipeline.store import ask, open_views, partitions, sql
from schemas.errors import UserError
from schemas.recipe import Recipe, Train


@dataclass(frozen=True)
class Slots:
    """Token slots of packed rows. From the shards of `round`, or the recipe's limits where it is None: then `mean`s are
    None, and a group's `most` leaves its prompt out."""

    round: int | None
    group_mean: float | None
    group_most: int
    trace_mean: float | None
    trace_most: int
    sequence_most: int
    visits: int  # prompts that a step draws
    step_mean: float | None
    step_most: int
    group: Group


@dataclass(frozen=True)
class Sizes:
    """Everything `dypo plan` derives. memory: bytes by what holds them, of one process; None, and why_no_memory, if unknown."""

    prompts_per_step: int
    sequences_per_step: int
    slots: Slots
    micro_batch_tokens: int
    micro_batches: int | None  # on each process, from the means
    micro_batches_most: int
    processes: int
    pieces_of_the_longest_group: int
    rounds: int
    updates: int
    lr: float
    micro_batch_slots: int  # the largest one that memory is told for
    parameters: int | None
    trained_parameters: int | None
    memory: dict[str, int] | None
    why_no_memory: str | None

    @property
    def total(self) -> int | None:
        return None if self.memory is None else sum(self.memory.values())

    def as_json(self) -> dict[str, Any]:
        return {"kind": "sizes", **asdict(self), "memory_total": self.total}


def sizes(ctx: Context) -> Sizes:
    """The sizes of a recipe's training. Reads headers and lengths only."""
    r = ctx.recipe
    t = r.train
    slots = _slots(ctx)
    model, why = model_or_why(r.policy.model)
    unit = max(slots.group_most, slots.trace_most if slots.round is not None else 0)
    micro_batch = min(t.micro_batch_tokens, max(unit, math.ceil(_update_most(slots, t) / t.processes)))
    micro_batch = max(micro_batch, slots.sequence_most)  # one sequence is never cut
    return Sizes(
        prompts_per_step=t.prompts_per_step,
        sequences_per_step=t.prompts_per_step * r.rollouts.k,
        slots=slots,
        micro_batch_tokens=t.micro_batch_tokens,
        micro_batches=None if slots.step_mean is None else _micro_batches(slots.step_mean, slots.visits, t),
        micro_batches_most=_micro_batches(slots.step_most, slots.visits, t),
        processes=t.processes,
        pieces_of_the_longest_group=math.ceil(slots.group_most / t.micro_batch_tokens),
        rounds=r.rounds,
        updates=r.rounds * t.steps,
        lr=t.method.lr,
        micro_batch_slots=micro_batch,
        parameters=None if model is None else model.parameters,
        trained_parameters=None if model is None else trained_parameters(model, t.lora),
        memory=None if model is None else memory(model, r, micro_batch, slots.group),
        why_no_memory=why,
    )


def _micro_batches(slots: float, units: int, t: Train) -> int:
    """On each process: `units` of one size, `slots` together, as trainer.batch.plan_micro_batches puts them into budgets."""
    together = max(1, math.floor(t.micro_batch_tokens * units / slots))
    return math.ceil(math.ceil(units / together) / t.processes)


def _update_most(slots: Slots, t: Train) -> int:
    """Slots of the largest update: a step's, or a queue's that the step fills."""
    if (queues := t.method.queues) is None:
        return slots.step_most
    groups, traces = queues.groups + t.prompts_per_step, queues.sft
    return max(groups * slots.group_most, traces * slots.trace_most if slots.round is not None else 0)


# ---------------------------------------------------------------- token slots
def _slots(ctx: Context) -> Slots:
    rounds = [int(dict(p.keys)["round"]) for p in partitions(ctx.run, "shards")]
    found = _of_shards(ctx, max(rounds)) if rounds else None
    return found or _bound(ctx.recipe)


def _of_shards(ctx: Context, round: int) -> Slots | None:
    """From what there is; None if the round has nothing to train on."""
    import duckdb

    r = ctx.recipe
    try:
        rows = ask(open_views(ctx.run), sql("plan/slots"), round=round, visits=r.train.prompts_per_step).to_pylist()
    except duckdb.Error as e:
        raise UserError(f"{ctx.run}/shards/round={round}: cannot be read ({e})") from None
    by_route = {row["route"]: row for row in rows}
    rl, sft = by_route.get("rl"), by_route.get("sft")
    if not rows:
        return None
    prompts = rows[0]["prompts"]  # of both routes together
    visits = min(r.train.prompts_per_step, prompts)
    mean = sum(row["visits"] * row["slots"] for row in rows) / prompts
    return Slots(
        round=round,
        group_mean=rl and rl["slots"],
        group_most=rl["most"] if rl else 0,
        trace_mean=sft and sft["slots"],
        trace_most=sft["most"] if sft else 0,
        sequence_most=max(row["sequence"] for row in rows),
        visits=visits,
        step_mean=mean * visits,
        step_most=sum(row["largest"] for row in rows),
        group=Group(rl["prompt"], rl["response"], r.rollouts.k) if rl else Group(sft["prompt"], sft["response"], 1),  # pyright: ignore[reportOptionalSubscript]
    )


def _bound(r: Recipe) -> Slots:
    """What the recipe's limits allow a step of Mid groups, their prompts left out: nothing has been counted yet."""
    response = min(r.rollouts.max_tokens, r.grade.max_tokens) - 1
    routing = r.train.method.routing(r.rounds - 1)
    trace = r.grade.max_tokens - 1
    beside = trace if routing.union or set(routing.rl) & set(routing.sft) else 0
    group = max(r.rollouts.k * response, 1)
    return Slots(
        round=None,
        group_mean=None,
        group_most=group,
        trace_mean=None,
        trace_most=trace,
        sequence_most=max(response, trace) if beside or not routing.rl else response,
        visits=r.train.prompts_per_step,
        step_mean=None,
        step_most=r.train.prompts_per_step * (group + beside if routing.rl else trace),
        group=Group(response, response, r.rollouts.k),
    )


# ---------------------------------------------------------------- in words
Line = tuple[str, str, str]  # what, how much, how it comes about


def in_words(s: Sizes, recipe: Recipe) -> tuple[list[Line], list[Line]]:
    """(a step, memory of a process) for people."""
    method, k, slots = recipe.train.method, recipe.rollouts.k, s.slots
    queue = method.queues
    on_each = f" on each of {s.processes} processes" if s.processes > 1 else ""
    step = [
        ("prompts", f"{s.prompts_per_step:,}", "gated ones, Hard and Mid" + (", drawn into two queues" if queue else "")),
        (
            "sequences",
            f"at most {s.sequences_per_step:,}",
            f"if all were Mid, {k} rollouts each; a Hard prompt is one trace",
        ),
        ("token slots", *_slots_in_words(slots, k)),
        ("micro-batches", _micro_batches_in_words(s), f"of up to {s.micro_batch_tokens:,} slots" + on_each),
        ("longest group", *_longest_in_words(s)),
        (
            "updates",
            f"{s.updates:,}" + (" steps" if queue else ""),
            f"{s.rounds} rounds of {recipe.train.steps} steps"
            + (
                f"; a step makes at most one of {queue.sft} traces and one of {queue.groups} groups or more" if queue else ""
            ),
        ),
        ("learning rate", f"{s.lr:g}", _rate_in_words(recipe)),
    ]
    if s.memory is None or s.parameters is None or s.trained_parameters is None:
        return step, [("unknown", "", f"{s.why_no_memory}")]
    lines = [(name, _bytes(size), "") for name, size in s.memory.items()]
    trained = "" if recipe.train.lora is None else f", {s.trained_parameters:,} of an adapter are trained"
    first = (
        f"{s.parameters:,} parameters{trained}; masters in {'float64' if recipe.policy.dtype == 'float64' else 'float32'}"
    )
    lines[0] = (*lines[0][:2], first)
    limits = "" if slots.round is not None else "; from the recipe's limits, as no shards are there yet"
    lines = [
        (n, b, f"a micro-batch of {s.micro_batch_slots:,} slots{limits}" if n.startswith("activations") else how)
        for n, b, how in lines
    ]
    return step, [*lines, ("total", _bytes(s.total or 0), "beside Python and torch themselves")]


def _slots_in_words(slots: Slots, k: int) -> tuple[str, str]:
    if slots.step_mean is None:
        return f"at most {slots.step_most:,}", f"and prompts: a Mid group {slots.group_most:,}, k times rollouts.max_tokens"
    parts = [
        f"a {what} {mean:,.0f}, at most {most:,}"
        for what, mean, most in (
            ("group", slots.group_mean, slots.group_most),
            ("trace", slots.trace_mean, slots.trace_most),
        )
        if mean is not None
    ]
    return (
        f"about {slots.step_mean:,.0f}",
        f"at most {slots.step_most:,}; in round {slots.round}'s shards {'; '.join(parts)}",
    )


def _micro_batches_in_words(s: Sizes) -> str:
    mean, most = s.micro_batches, s.micro_batches_most
    if mean is None:
        return f"at most {most:,}"
    return f"about {mean:,}" if mean == most else f"about {mean:,}, at most {most:,}"


def _longest_in_words(s: Sizes) -> tuple[str, str]:
    n = s.pieces_of_the_longest_group
    most = f"{s.slots.group_most:,}" if s.slots.round is not None else f"at most {s.slots.group_most:,}"
    if n <= 1:
        return most, "fits: one pass"
    return most, f"more than train.micro_batch_tokens: runs in {n} pieces or more, twice forward"


def _rate_in_words(recipe: Recipe) -> str:
    o, method = recipe.train.optimizer, recipe.train.method
    words = [f"AdamW, {o.decay}" + (f" to {o.final_fraction:g} of it" if o.decay != "constant" else "")]
    if o.warmup_steps:
        words.append(f"{o.warmup_steps} steps of warm-up")
    if "sft" in method.rates:
        words.append(f"{method.rates['sft']:g} for traces")
    return ", ".join(words)


def _bytes(n: int) -> str:
    unit, power = ("GB", 9) if n >= 1e9 else ("MB", 6) if n >= 1e6 else ("kB", 3)
    return f"{n / 10**power:,.1f} {unit}"
