"""The plan of a round: who is drawn, in which order, and what the queues do."""

from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas.tables import ARROW
from tests.trainer.tiny import make_shards, make_train, shard_row
from trainer.schedule import plan_round

FEW = settings(deadline=None, max_examples=15)
QUEUE = {"schedule": "queue", "sft_lr": 1e-2, "queue_size": 3, "queue_groups": 2}


def test_the_plan_is_a_pure_function_that_does_not_see_the_order_of_rows() -> None:
    shards, train = make_shards(), make_train()
    upside_down = shards.take(list(range(len(shards)))[::-1])
    assert plan_round(shards, train, seed=1, round=0) == plan_round(upside_down, train, seed=1, round=0)
    assert plan_round(shards, train, seed=1, round=0) != plan_round(shards, train, seed=2, round=0)
    assert plan_round(shards, train, seed=1, round=0) != plan_round(shards, train, seed=1, round=1)


@given(st.integers(1, 9), st.integers(0, 100))
@example(9, 0)
@FEW
def test_every_epoch_visits_every_prompt_once_and_goes_on_into_the_next(size: int, seed: int) -> None:
    shards = make_shards(hard=4, mid=4)
    plan = plan_round(shards, make_train(steps=16, prompts_per_step=size), seed=seed, round=0)
    assert {len(s.updates[0].visits) for s in plan} == {min(size, 8)}
    visited = [v.prompt_id for s in plan for u in s.updates for v in u.visits]
    for epoch in range(len(visited) // 8):
        assert len(set(visited[8 * epoch : 8 * epoch + 8])) == 8


def test_a_mid_visit_is_the_whole_group_and_a_hard_visit_one_trace_of_the_drawn_teacher() -> None:
    shards = make_shards(k=5)
    members: dict[str, set[str]] = {}
    for row in shards.to_pylist():
        members.setdefault(f"{row['prompt_id']}/{row['teacher']}", set()).add(row["item_id"])
    for step in plan_round(shards, make_train(), seed=0, round=0):
        for visit in step.updates[0].visits:
            mine = members[f"{visit.prompt_id}/{visit.teacher}"]
            items = {item for _, item in visit.items}
            assert items == mine if visit.route == "rl" else (len(items) == 1 and items <= mine)


def chi_square(counts: dict[str, int]) -> float:
    expected = sum(counts.values()) / len(counts)
    return sum((n - expected) ** 2 / expected for n in counts.values())


def test_teachers_are_drawn_uniformly_however_many_traces_each_has() -> None:
    """chi-square over 3 teachers with 1, 2 and 6 traces: 13.8 is passed once in 1,000 by chance."""
    rows = [
        shard_row("sft", f"h{h:03}", sample, [3, 4], [5, 1], teacher=teacher)
        for h in range(100)
        for teacher, n in (("a", 1), ("b", 2), ("c", 6))
        for sample in range(n)
    ]
    shards = pa.Table.from_pylist(rows, ARROW["shards"])
    plan = plan_round(shards, make_train(steps=30, prompts_per_step=100), seed=5, round=0)
    visits = [v for s in plan for u in s.updates for v in u.visits]
    teachers = Counter(v.teacher for v in visits)
    assert set(teachers) == {"a", "b", "c"}
    assert chi_square(teachers) < 13.8
    traces = Counter(v.items[0][1].rsplit("-", 1)[1] for v in visits if v.teacher == "c")
    assert len(traces) == 6
    assert chi_square(traces) < 20.5
    by_epoch = {p: len({v.teacher for v in visits if v.prompt_id == p}) for p in ("h000", "h001", "h002")}
    assert set(by_epoch.values()) == {3}, "the draw is anew each epoch"


def test_teachers_and_traces_are_drawn_anew_for_another_seed_or_round() -> None:
    shards, train = make_shards(hard=12, mid=0, teachers=3, traces=3), make_train(steps=1, prompts_per_step=12)

    def drawn(seed: int, round: int) -> dict[str, tuple[str | None, str]]:
        (step,) = plan_round(shards, train, seed=seed, round=round)
        return {v.prompt_id: (v.teacher, v.items[0][1].rsplit("-", 1)[1]) for v in step.updates[0].visits}

    first = drawn(0, 0)
    assert len(first) == 12
    for other in (drawn(1, 0), drawn(0, 1)):
        assert any(first[p][0] != other[p][0] for p in first), "teacher"
        same_teacher = [p for p in first if first[p][0] == other[p][0]]
        assert any(first[p][1] != other[p][1] for p in same_teacher), "trace"


def test_only_teachers_with_a_trace_of_the_prompt_are_drawn() -> None:
    rows = [shard_row("sft", "h0", 0, [3], [1], teacher="a"), shard_row("sft", "h1", 0, [3], [1], teacher="b")]
    plan = plan_round(pa.Table.from_pylist(rows, ARROW["shards"]), make_train(prompts_per_step=2), seed=0, round=0)
    assert {(v.prompt_id, v.teacher) for s in plan for v in s.updates[0].visits} == {("h0", "a"), ("h1", "b")}


def test_no_rows_is_an_empty_plan() -> None:
    assert plan_round(ARROW["shards"].empty_table(), make_train(), seed=0, round=0) == []


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 50))
@FEW
def test_queues_are_first_in_first_out_and_lose_or_double_nothing(per_step: int, size: int, groups: int, seed: int) -> None:
    shards = make_shards(hard=5, mid=4, traces=1, teachers=1)
    settings_ = {"steps": 25, "prompts_per_step": per_step}
    drawn = plan_round(shards, make_train(**settings_), seed=seed, round=0)
    queued = plan_round(
        shards, make_train(QUEUE | {"queue_size": size, "queue_groups": groups}, **settings_), seed=seed, round=0
    )
    for route, optimizer in (("sft", "sft"), ("rl", "main")):
        into = [v for s in drawn for v in s.updates[0].visits if v.route == route]
        leaves = []  # in the order of leaving: dropped first, then trained
        for step in queued:
            leaves += [v for v in step.dropped if v.route == route]
            leaves += [v for u in step.updates if u.optimizer == optimizer for v in u.visits]
        assert leaves == into[: len(leaves)]
        waiting = queued[-1].cursor.hard_waiting if route == "sft" else queued[-1].cursor.mid_waiting
        assert len(leaves) + waiting == len(into)


def test_an_sft_update_has_exactly_its_size_comes_first_and_at_most_once_a_step() -> None:
    shards = make_shards(hard=8, mid=4)
    plan = plan_round(shards, make_train(QUEUE, steps=20, prompts_per_step=8), seed=0, round=0)
    for step in plan:
        kinds = [u.optimizer for u in step.updates]
        assert kinds in ([], ["sft"], ["main"], ["sft", "main"])
        for update in step.updates:
            assert {v.route for v in update.visits} == {"sft" if update.optimizer == "sft" else "rl"}
            assert len(update.visits) == 3 if update.optimizer == "sft" else len(update.visits) >= 2
    assert max(s.cursor.hard_waiting for s in plan) > 3, "more Hard prompts come than one update a step can take"


def test_a_group_that_waited_more_than_one_step_is_dropped_not_trained() -> None:
    shards = make_shards(hard=8, mid=2)
    plan = plan_round(shards, make_train(QUEUE | {"queue_groups": 2}, steps=40, prompts_per_step=1), seed=0, round=0)
    waits = [s.index - v.drawn for s in plan for u in s.updates for v in u.visits if v.route == "rl"]
    assert waits
    assert max(waits) <= 1
    assert sum(len(s.dropped) for s in plan) > 0
    assert all(s.index - v.drawn == 2 for s in plan for v in s.dropped)


@pytest.mark.parametrize("method", [{}, QUEUE])
def test_a_longer_round_begins_with_the_same_steps(method: dict) -> None:
    shards = make_shards()
    short = plan_round(shards, make_train(method, steps=4), seed=0, round=0)
    assert plan_round(shards, make_train(method, steps=9), seed=0, round=0)[:4] == short
